"""One module per command: flags in, exit status out. The only door to Typer."""
