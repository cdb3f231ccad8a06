"""Importance matrices: collecting them from a model, and their files."""
