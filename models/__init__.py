"""Computes: the decoder as a table of parameter specs and pure functions, attention, the loss.

Imports sharding only; knows nothing of optimizers, data or files.
"""
