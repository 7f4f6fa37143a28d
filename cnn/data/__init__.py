"""The packed dataset version: manifest, splits, writing and reading of shards, and checks."""
