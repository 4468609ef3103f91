"""Run each task of a build once, in processes on this machine or a cluster."""
