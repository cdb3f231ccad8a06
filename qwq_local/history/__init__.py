"""Conversations that last: every turn in a SQLite database, searched, exported, picked up after a crash."""
