"""Kubernetes: the manifests that are applied once, the template of a training's Job, and the API that creates it."""
