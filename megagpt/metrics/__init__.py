"""What a run measures, and the files and trackers that it is written to."""
