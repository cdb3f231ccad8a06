"""Hugging Face weights to GGUF in one pass; `pipeline.convert` is the way in."""
