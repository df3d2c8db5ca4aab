"""Qwen3 0.6B: 596 million parameters, norms on queries and keys.

The report (arXiv:2505.09388, section 3) gives 36 trillion tokens at 4,096 tokens of context for the
first stages, and no rates or batch: those here are a common choice for the size.

    torus train --config=qwen3_06b --config.data.path=DATASET --workdir=RUN
"""

from models.presets import PRESETS
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="qwen3-0.6b", model=PRESETS["qwen3-0.6b"]())
    exp.data.seq_len = 4096
    exp.optimizer.peak_lr = 1e-3
    exp.optimizer.warmup_steps = 2_000
    exp.train.batch_size = 512
    exp.train.steps = 500_000
    exp.eval.every = 5_000
    return exp
