"""Files between the stages of a build, and the shards it ends with."""
