"""`megagpt generate`: texts from a checkpoint, after prompts from options, a file or a person."""
