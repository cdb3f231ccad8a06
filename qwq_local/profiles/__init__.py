"""Names, TOML files, environment and flags in, one profile out."""

DEFAULT_MODEL = "qwq-32b"
"""The model, and the profile of the same name, that is used when none is named."""
