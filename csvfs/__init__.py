"""The filesystem: format, journal, allocation, namespace, volume, FUSE operations."""
