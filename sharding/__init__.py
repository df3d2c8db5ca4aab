"""Places arrays on devices: hardware facts, the mesh, and the rules from logical axes to mesh axes.

The lowest floor: imports JAX and nothing of Torus.
"""
