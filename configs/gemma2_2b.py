"""Gemma 2 2B: 2.6 billion parameters, local and global layers in turn, soft-capped.

The report (arXiv:2408.00118) trains this size by distillation on 2 trillion tokens of 8,192-token
rows and gives no rates: those here are a common choice for the size.

    torus train --config=gemma2_2b --config.data.path=DATASET --workdir=RUN
"""

from models.presets import PRESETS
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="gemma2-2b", model=PRESETS["gemma2-2b"]())
    exp.data.seq_len = 8192
    exp.optimizer.peak_lr = 5e-4
    exp.optimizer.warmup_steps = 2_000
    exp.train.batch_size = 256
    exp.train.steps = 953_000
    exp.eval.every = 5_000
    return exp
