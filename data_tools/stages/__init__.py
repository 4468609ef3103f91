"""The stages of a build: its tasks, and the pipeline that runs them in order."""
