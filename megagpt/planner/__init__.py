"""Estimate the memory, communication and time of a run by arithmetic."""
