"""Training on several nodes.

The flow's machine runs a *coordinator*; each node runs an *agent*, by `convoy join` or by whatever starts it. They
talk through small objects in the bucket, so that nobody listens on a port for it, one set of credentials serves for
all, and nodes need to reach only the storage and each other. The coordinator decides which nodes train together, as
a *generation*; each generation is one start of torchrun on its nodes, with a fixed world size that divides
the lanes, and goes on from the newest checkpoint. When a node is lost, comes or goes, the next generation begins.

Nothing rests on all nodes agreeing: a node that was given up and trains on behind a cut link computes the same bits,
so that whatever it may still write is what the others write.
"""
