"""Every structure on the disk, a file each; `csvfs.format` shows them all under one name."""
