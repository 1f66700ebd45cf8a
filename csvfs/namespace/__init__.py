"""Inodes, names, attributes, open files."""
