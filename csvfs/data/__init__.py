"""The bytes of files: extents, reads and writes, truncation, reclaim."""
