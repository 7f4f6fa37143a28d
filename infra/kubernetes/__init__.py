"""Kubernetes: the manifests to apply once, the template of a training's Job, and the client that creates Jobs."""
