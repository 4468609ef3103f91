"""Read shards on disk, and make micro-batches on the device."""
