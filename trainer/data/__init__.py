"""What the model is fed: token files with a manifest, packing as a plan, and the loader.

Row r of the endless sequence is a pure function of (dataset, config): any host computes it alone.
Nothing here knows about models or optimizers, and only loader.py imports JAX.
"""
