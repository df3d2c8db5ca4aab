"""Attention: one function for every model, several backends behind it.

Call `models.attention.dispatch.attention`; say who may attend to whom with `mask.Mask`.
`reference.py` is the dense definition and serves decoding; `blockwise.py` needs O(length) memory.
"""
