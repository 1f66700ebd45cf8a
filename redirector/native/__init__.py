"""The C core that moves the bytes, and its Cython boundary."""
