"""The report of a build: its figures, plots and HTML page."""
