"""Who may write: claiming a volume, its view and slots, leaving it."""
