"""What a person sees: live Markdown, dim thinking, progress bars. The only door to rich."""
