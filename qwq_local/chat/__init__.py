"""A conversation: it takes the lines that a user enters, questions and /commands, and returns events."""
