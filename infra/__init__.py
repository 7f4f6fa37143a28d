"""The outside world: object storage, experiment tracking, the model registry, mirrors and the local stack."""
