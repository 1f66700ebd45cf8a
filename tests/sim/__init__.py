"""Whole clusters of pure cores in one synchronous loop, from one seed. See `tests.sim.world`."""
