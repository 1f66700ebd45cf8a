"""Figures: the mount beside the raw LUN in one run, and micro-benchmarks of the parts."""
