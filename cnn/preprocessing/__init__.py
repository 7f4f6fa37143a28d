"""Turns labelled images of any format into a dataset version, in two passes that can be resumed."""
