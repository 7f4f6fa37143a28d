"""Access to the outside: object storage, experiment tracking, the model registry, mirrors and the local stack."""
