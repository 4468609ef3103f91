"""The files that stages of a build leave for each other, and the shards at its end."""
