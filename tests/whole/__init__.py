"""Whole hosts in one process: the product's own node, volume, locks and membership, over a
simulated LUN and a simulated network, in virtual time, with faults, all from one seed.

    machines    what runs on a host, which can be frozen; the clock that all hosts have
    wires       the network: connections that break, datagrams that are lost
    cables      each host's way to the LUN, and the eye on what lands there
    hosts       daemons and programs: they start, serve, leave, die, come back
    registers   what reads may return, after whatever has happened
    faults      what is done to them
    run         one seed, from the first host to the check of the volume
"""
