"""The local servers: their ports, secrets and processes, and how they start, stop and are migrated."""
