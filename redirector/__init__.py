"""The data path: below one `BlockDevice` an I/O goes direct, is carried by a peer, or waits."""
