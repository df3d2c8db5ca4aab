"""Llama 3 8B (3.0): 8.0 billion parameters, 8,192 tokens of context.

The Llama 3 paper (arXiv:2407.21783, section 3.4.1) gives the full recipe for 405B only: warm-up of
8,000 steps, cosine to 1% over 1.2 million. This size's peak rate is in its table 3; 4 million
tokens a step and 15 trillion in all are our reading of the rest.

    torus train --config=llama3_8b --config.data.path=DATASET --workdir=RUN
"""

from models.presets import PRESETS
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="llama3-8b", model=PRESETS["llama3-8b"]())
    exp.data.seq_len = 8192
    exp.optimizer.peak_lr = 3e-4
    exp.optimizer.warmup_steps = 8_000
    exp.optimizer.final_lr_fraction = 0.01
    exp.train.batch_size = 512
    exp.train.steps = 3_576_000
    exp.eval.every = 10_000
    return exp
