"""A real QEMU guest for tests and the demo."""
