"""The conversation that is being held: lines that a person enters in, events out. Knows no terminal."""
