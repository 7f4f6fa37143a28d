"""Connects tasks with Prefect: retries, progress, cancellation, leases and notifications."""
