"""The bundled tiny model: its tasks, its tokenizer, its training script and its checkpoint."""
