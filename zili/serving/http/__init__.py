"""OpenAI's API over an engine, and the chat page."""
