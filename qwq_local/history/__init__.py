"""The history: every turn in a SQLite database, searched, exported, and found again after a crash."""
