"""The offline builder: text to Arrow shards that megagpt trains on."""
