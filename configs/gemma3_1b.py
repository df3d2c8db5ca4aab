"""Gemma 3 1B: 1.0 billion parameters, five local layers to each global one.

The report (arXiv:2503.19786) trains this size by distillation on 2 trillion tokens and gives no
rates: those here are a common choice for the size. One KV head is replicated over `tensor`.

    torus train --config=gemma3_1b --config.data.path=DATASET --workdir=RUN
"""

from models.presets import PRESETS
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="gemma3-1b", model=PRESETS["gemma3-1b"]())
    exp.data.seq_len = 8192
    exp.optimizer.peak_lr = 6e-4
    exp.optimizer.warmup_steps = 2_000
    exp.train.batch_size = 256
    exp.train.steps = 953_000
    exp.eval.every = 5_000
    return exp
