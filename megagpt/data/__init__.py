"""From shards on disk to micro-batches on the device."""
