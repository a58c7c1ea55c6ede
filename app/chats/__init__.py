"""Chats, their messages, and what they cost."""
