"""What a run will need and how fast it will go on chips that are not there.

`compile.py` asks libtpu for the step's program, `hlo.py` reads its text, `cost.py` walks its
schedule for time, `memory.py` for what each byte holds.
"""
