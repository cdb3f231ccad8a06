"""Messages in, events out: conversation, prompt, thinking parser, turn, loop guard."""
