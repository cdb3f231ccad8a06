"""The screen of a chat: what turns look like, the line that is typed, and who owns the terminal."""
