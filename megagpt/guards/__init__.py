"""Guards that stop or repair a run that goes wrong (`guards` in the run file)."""
