"""Parley: a conversation gateway whose every answer is a durable, resumable log."""

__version__ = "0.1.0"
