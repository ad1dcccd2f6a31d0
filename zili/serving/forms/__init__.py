"""Answers held to a form: JSON schemas, expressions, calls of tools."""
