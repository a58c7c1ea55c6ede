"""Groups of the `parley` command, and what all its commands share."""
