"""The record of a training: its MLflow run, what it was started with, and what came of it."""
