"""Conversations: an index over every chat, wherever it was held, that lists and finds them without reading them."""
