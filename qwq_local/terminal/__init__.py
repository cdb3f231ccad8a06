"""The screen: streamed Markdown, thinking, progress, the chat. The only door to rich and prompt_toolkit."""
