"""Research ladder: one architecture from 10 million to 1 billion parameters, on any data of bytes.

Rows of 1,024 tokens, 20 tokens per parameter (arXiv:2203.15556). The peak rate falls as 1 / width:
a starting point for a sweep, not its result.

    torus train --config=ladder:100m --workdir=RUN        # sizes: 10m 20m 60m 100m 200m 400m 1b
"""

from models.presets import LADDER, ladder
from trainer.config import Experiment

# Size → (rows of 1,024 tokens a step, steps); 20 tokens per parameter.
LENGTHS = {
    "10m": (64, 3_300),
    "20m": (64, 6_000),
    "60m": (128, 8_800),
    "100m": (256, 7_600),
    "200m": (256, 15_800),
    "400m": (512, 15_200),
    "1b": (1024, 19_400),
}


def get_config(size: str = "10m") -> Experiment:
    """Raises UsageError for a size that is not on the ladder."""
    exp = Experiment(name=f"ladder-{size}", model=ladder(size))
    exp.data.seq_len = 1024
    exp.train.batch_size, exp.train.steps = LENGTHS[size]
    exp.optimizer.peak_lr = 3e-3 * LADDER["10m"][1] / exp.model.width
    exp.optimizer.warmup_steps = exp.train.steps // 20
    exp.eval.every = exp.train.steps // 20
    exp.checkpoint.every = exp.train.steps // 20
    return exp
