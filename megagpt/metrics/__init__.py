"""The metrics of a run, and the files and trackers that they are written to."""
