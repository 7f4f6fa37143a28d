"""Validated configuration of preprocessing, networks and training; importing it loads pydantic only."""
