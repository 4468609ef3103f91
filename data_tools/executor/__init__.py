"""Tasks that are done once, over processes on this machine or a cluster."""
