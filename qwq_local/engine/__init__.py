"""Token ids in, token ids out: the Engine protocol, and llama.cpp behind it."""
