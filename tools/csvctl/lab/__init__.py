"""A cluster on one machine: `csvctl lab`.

    switch namespace   bridge "san"       bridge "cluster"
                        |    |    |          |        |
    target namespace   tgtd  |    |          |        |
    host1 namespace         san   |       cluster     |
    host2 namespace              san               cluster

Only the network is apart. Hosts share the machine's mounts, so host2's volume is seen at DIR/host2
by everybody. Nothing of a lab is in the machine's own network, so labs do not meet, whatever
addresses they use.

state       what a lab consists of, in DIR/lab.json; names are made from its id
processes   whoever lives in a lab's namespaces, and their end
network     namespaces, bridges, links; cutting one
frames      what the relay makes of an Ethernet frame (pure)
relay       a process in a host's SAN link that delays, or answers every TCP segment with a reset
target      the tgtd
host        commands on a host; mount and daemon
faults      the table of what can go wrong, and of how it is mended
lab         up, down, status
block, history, verdict      the verifying workload's block, its log, and the judgement (pure)
workload, directory_work     what runs on the hosts
directory_model              is there an order in which all this could have happened? (pure)
stage                        files, programs and faults of a scenario, and its result
scenarios, fault_scenario, directory_scenario   what `lab run` plays
"""
