"""What this computer has, or one that a file describes."""
