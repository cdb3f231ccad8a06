"""Run QwQ-32B on your own computer: models, planning, engine, dialogue, terminal, command line."""

__version__ = "0.1.0"
