"""Snapshots in the memory of the hosts, which outlive a trainer and, coded, the loss of a host.

`slots` is the shared memory, `parity` the code across hosts, `wire` how processes talk, `rounds`
which snapshot counts: numpy and the standard library. `snapshots` and `restore` are the trainer's
side and use JAX. The process that owns the memory is trainer/recovery/keeper.py.
"""
