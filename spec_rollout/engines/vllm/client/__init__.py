"""What lives in the caller's process: the engine, its requests, the two-pass baseline."""
