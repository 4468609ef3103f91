"""`megagpt doctor`: check that hosts are ready to train, by an agent on each."""
