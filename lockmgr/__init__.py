"""A distributed lock manager after VMS and the Linux DLM, useful without csvfs."""
