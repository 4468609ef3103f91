"""What stops or repairs a run that goes wrong (`guards` in the run file)."""
