"""The chat on a terminal, named by what is on the screen."""
