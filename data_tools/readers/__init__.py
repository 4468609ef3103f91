"""From paths to documents, by file format."""
