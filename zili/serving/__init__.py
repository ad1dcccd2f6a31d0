"""Using a model: generation with a key/value cache, conversations, and the terminal."""
