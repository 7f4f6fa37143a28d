"""What every task needs of Prefect: retries, progress, cancelling, leases and notifications."""
