"""Llama 3.2 1B: 1.2 billion parameters, context extended to 131,072 tokens.

Its weights came from pruning and distilling larger models (model card of Llama 3.2), so there is
no recipe to repeat: the values are a starting point for training on from converted weights.

    torus train --config=llama32_1b --config.data.path=DATASET --workdir=RUN
"""

from models.presets import PRESETS
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="llama3.2-1b", model=PRESETS["llama3.2-1b"]())
    exp.data.seq_len = 8192
    exp.optimizer.peak_lr = 1e-5
    exp.optimizer.warmup_steps = 200
    exp.train.batch_size = 64
    exp.train.steps = 10_000
    exp.eval.every = 500
    return exp
