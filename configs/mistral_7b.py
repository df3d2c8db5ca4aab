"""Mistral 7B v0.1: 7.2 billion parameters, every layer sees a window of 4,096 tokens.

The paper (arXiv:2310.06825) describes the model and not its training: batch, rate and schedule are
those of Llama 2 7B, rows are 8,192 tokens so that the window matters.

    torus train --config=mistral_7b --config.data.path=DATASET --workdir=RUN
"""

from models.presets import PRESETS
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="mistral-7b", model=PRESETS["mistral-7b"]())
    exp.data.seq_len = 8192
    exp.optimizer.peak_lr = 3e-4
    exp.optimizer.warmup_steps = 2_000
    exp.train.batch_size = 512
    exp.train.steps = 477_000
    exp.eval.every = 5_000
    return exp
