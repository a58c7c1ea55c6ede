"""Periodic work: what is done how often, who does it, and what became of it."""
