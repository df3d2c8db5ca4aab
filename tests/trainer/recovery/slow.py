"""The tiny config, in trainers whose phases last longer.

SLOW is like "data=0.1 compile=5*1": seconds to wait in a phase, and how often (always); "sync=3"
is a disk that takes so long to be done with a checkpoint.
"""

import os
import time

from checkpoint import steps
from tests import tiny
from trainer.config import Experiment
from trainer.recovery.progress import VARIABLE, ProgressPage


def get_config() -> Experiment:
    slow = {}
    for pair in os.environ.get("SLOW", "").split():
        phase, _, given = pair.partition("=")
        seconds, _, times = given.partition("*")
        slow[phase] = [float(seconds), int(times or 10**9)]
    if VARIABLE in os.environ and slow:
        enter = ProgressPage.enter

        def enter_slowly(page: ProgressPage, phase: str, step: int | None = None) -> None:
            enter(page, phase, step)
            wait = slow.get(phase, [0.0, 0])
            wait[1] -= 1
            if wait[1] >= 0:
                time.sleep(wait[0])

        ProgressPage.enter = enter_slowly
        sync_step, wait = steps.sync_step, slow.get("sync", [0.0])[0]
        steps.sync_step = lambda *step: (time.sleep(wait), sync_step(*step))
        time.sleep(slow.get("start", [0.0])[0])  # the supervisor enters it
    return tiny.get_config()
