"""The object store, its client, and the cache for its files on this machine."""
