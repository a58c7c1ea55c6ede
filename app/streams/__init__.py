"""The durable, gap-free log of every answer, and its readers."""
