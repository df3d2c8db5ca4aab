"""Experiments: one Python file each, `get_config()` returns a `trainer.config.Experiment`.

Copy one, change it, run it: `torus train --config=FILE`. The only floor above trainer.
"""
