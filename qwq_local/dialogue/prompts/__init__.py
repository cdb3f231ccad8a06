"""Prompts: how messages become token ids, for each prompt format that a chat template can ask for."""
