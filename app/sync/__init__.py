"""The same chats on every device: one exchange that pushes and pulls, and the rule by which changes are merged."""
