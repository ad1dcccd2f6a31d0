"""Seconds of a step of any framework, by numbers fitted to published runs."""
