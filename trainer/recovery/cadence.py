"""How often to save: the interval that loses least, from what a save costs and how often it fails.

Young (1974) and Daly (2006): with d seconds that a save holds the run up and M seconds between
failures, saving every sqrt(2 d M) seconds costs least. M begins as what a large cluster saw and is
corrected by the run's own failures.
"""

import math

DEVICE_HOURS = 54 * 24 * 16_384 / 419
"""Between failures of one device: 419 unexpected interruptions of 16,384 GPUs in 54 days (Llama 3,
arXiv:2407.21783, section 3.3.4)."""


def hours_between_failures(devices: int, failures: int = 0, hours: float = 0.0) -> float:
    """Returns the expected hours, after a run saw so many `failures` in so many `hours`.

    The cluster's figure counts as one failure seen (the mean of a Gamma posterior of the rate).
    """
    return (DEVICE_HOURS / devices + hours) / (1 + failures)


def steps_between_saves(save_seconds: float, step_seconds: float, hours: float) -> int:
    """Returns the interval in steps, at least one, for `hours` between failures."""
    seconds = math.sqrt(2 * save_seconds * 3600 * hours)
    return max(1, round(seconds / max(step_seconds, 1e-6)))
