"""This computer, or one that a file describes."""
