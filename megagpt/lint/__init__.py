"""Check a run file for mistakes, and for keys that have no effect."""
