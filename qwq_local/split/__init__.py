"""A text that no context holds, asked in parts, and then once over their answers."""
