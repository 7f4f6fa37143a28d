"""Training on several nodes.

The flow's machine runs a *coordinator*; each node runs an *agent*, started by `convoy join` or by a scheduler. They
exchange small objects in the bucket. No process listens on a port for this, one set of credentials serves all nodes,
and a node needs to reach only the storage and the other nodes. The coordinator decides which nodes form a *generation*:
one start of torchrun, from the newest checkpoint, with a fixed world size that divides the lanes. When a node is lost,
joins or leaves, the next generation begins.

The result does not depend on all nodes agreeing: a node that was given up and trains on behind a cut link computes the
same bits, so all that it may still write equals what the other nodes write.
"""
