"""Real replicas under faults: nothing lost, nothing doubled, every answer ended (docs/chaos.md)."""
