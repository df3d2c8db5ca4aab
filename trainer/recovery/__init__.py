"""Keeps a run going: what a trainer is doing, what went wrong with it, and what follows from that.

`progress` is written by the trainer and read by its supervisor, `policy` decides and touches
nothing, `supervisor` starts, watches, stops and starts again. Nothing here imports JAX.
"""
