"""The object store, its client, and the cache of its files on this machine."""
