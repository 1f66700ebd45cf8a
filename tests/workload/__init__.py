"""A verifying workload: writes that name themselves, acknowledgements kept outside the volume.

Three parts that share no state but the block's layout and the log: `writer` writes and fsyncs and
logs what was acknowledged; `verify`, a program of its own, compares the files with the log.
"""
