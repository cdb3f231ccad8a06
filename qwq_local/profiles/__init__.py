"""Names, TOML files, environment and flags in, one profile out."""
