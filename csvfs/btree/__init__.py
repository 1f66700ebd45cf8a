"""The one B-tree: extents, directories, lists, on packed blocks."""
