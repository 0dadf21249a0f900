"""Engines: who runs the shards."""
