"""GGUF files: read, written, and believed only as far as they can be checked."""
