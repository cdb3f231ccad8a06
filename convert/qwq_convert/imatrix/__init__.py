"""Text and a model in, an importance matrix out."""
