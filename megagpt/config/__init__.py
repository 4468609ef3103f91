"""The run file: its schema, DeepSpeed's keys, batch arithmetic and parsing."""
