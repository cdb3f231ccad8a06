"""A text that no context holds, asked in parts, then once over their answers."""
