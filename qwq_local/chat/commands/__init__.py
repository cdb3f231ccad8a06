"""The /commands of a chat: one file for each group, one entry for each command."""
