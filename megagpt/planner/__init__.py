"""Memory, communication and time of a run, estimated by arithmetic."""
