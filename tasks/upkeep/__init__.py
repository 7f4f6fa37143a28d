"""What was left behind, what may go, and what to put into a bug report."""
