"""What a run file gets wrong, or says without effect."""
