"""Measure what a model can do: tasks of lm-evaluation-harness, and how much of its training text it recites."""
