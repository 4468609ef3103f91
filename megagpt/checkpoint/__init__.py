"""The commit protocol: save, verify, rotate, and resume on any number of ranks."""
