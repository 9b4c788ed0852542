"""The command line: one file a command, each at most one hop from the function that does the work."""

from factormix.cli.app import app, main

__all__ = ["app", "main"]
