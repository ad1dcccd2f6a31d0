"""The command line: one small module a command, each parsing, calling and printing."""

from zili.cli.app import main

__all__ = ["main"]
