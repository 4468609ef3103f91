"""The report of a build: summary, plots and HTML page."""
