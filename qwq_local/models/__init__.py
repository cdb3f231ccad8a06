"""A name in, a local GGUF out: found, fetched, its header checked, removed."""
