"""Training on several ranks: who they are, what they exchange, in how many bytes.

A rank is one process with one device. All ranks draw the same batches, and each computes its part of every one. The
device buffer is replicated; cold row i lives on the host of rank i mod R. Gradients of rows are added rank by rank in
the same order everywhere, so the replicas agree to the bit.

    ranks         the processes: collectives that count bytes, say what went wrong and where, and never wait for ever
    launch        finds them in the environment that torchrun or a cluster gives
    rows          the cold tier in shards, and moves of its rows
    lookahead     which rows the parts of a batch look up, told to all ranks ahead of time
    gradients     sums of gradients over ranks
    compression   gradients in fewer bytes
"""
