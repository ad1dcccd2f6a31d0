"""Tokens from a model: alone, or many answers at once."""
