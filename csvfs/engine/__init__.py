"""From a call to a transaction under its locks; recovery of a slot."""
