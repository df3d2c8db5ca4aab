"""The tiny config, in trainers whose phases last longer: SLOW is like "data=0.1 eval=5"."""

import os
import time

from tests import tiny
from trainer.config import Experiment
from trainer.recovery.progress import VARIABLE, ProgressPage


def get_config() -> Experiment:
    slow = dict(pair.split("=") for pair in os.environ.get("SLOW", "").split())
    if VARIABLE in os.environ and slow:
        enter = ProgressPage.enter

        def enter_slowly(page: ProgressPage, phase: str, step: int | None = None) -> None:
            enter(page, phase, step)
            time.sleep(float(slow.get(phase, 0)))

        ProgressPage.enter = enter_slowly
    return tiny.get_config()
