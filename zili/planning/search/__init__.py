"""Layouts searched, and the plan that comes of it."""
