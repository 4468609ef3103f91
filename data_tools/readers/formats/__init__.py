"""Read each file format: its bytes, to text, to documents."""
