"""A name in, a local GGUF out: header reader, store."""
