"""Exit codes: 0 finished, 2 something the user gave is wrong, 75 saved and to be started again, 1 anything else."""

SAVED_AND_WANTS_RESTART = 75  # EX_TEMPFAIL of sysexits.h
