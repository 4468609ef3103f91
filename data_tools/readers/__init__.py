"""Read documents from input files, by file format: see by_format.py."""
