"""The commands: a file for each, or a folder whose command.py is run."""
