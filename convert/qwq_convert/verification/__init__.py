"""A GGUF in, what is wrong with it out; beside its source, how far it is from that."""
