"""The packed dataset version: its manifest, its splits, writing and reading its shards, and checks of it."""
