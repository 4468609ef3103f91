"""Hyperparameter tuning: a space of run files, trials that train them, and a study that chooses the next one."""
