"""Survives: what a run needs to go on after it stops, on any mesh and any number of processes.

`manager` saves and restores steps, `steps` knows which ones a folder holds, `tree` gives every
array a name that outlives a change of optimizer. Imports models and sharding, never the trainer.
"""
