"""BlockDevice and its kinds, and persistent reservations."""
