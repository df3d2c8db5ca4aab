"""A wall clock that jumps: put first on PYTHONPATH, for every Python process of a run.

CLOCK_JUMP is a seed. Each process begins up to a day off, and jumps by as much again within its
first seconds; no two agree. Only what Python asks `time.time` and `time.time_ns` is changed, so
neither the monotonic clock nor what C++ asks by itself.
"""

import os
import random
import time

_DAY = 86_400

if "CLOCK_JUMP" in os.environ:
    _draw = random.Random(f"{os.environ['CLOCK_JUMP']}/{os.getpid()}")
    _off, _jump = _draw.uniform(-_DAY, _DAY), _draw.uniform(-_DAY, _DAY)
    _when, _time = time.monotonic() + _draw.uniform(1, 8), time.time

    def _jumping() -> float:
        return _time() + _off + (_jump if time.monotonic() > _when else 0.0)

    time.time = _jumping
    time.time_ns = lambda: int(_jumping() * 1e9)
