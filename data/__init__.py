"""Bytes in, batches out: shards, catalogue, plan, decoding, the procedural world."""
