"""`megagpt evaluate`: on datasets, on tasks, on passages of the training data."""
