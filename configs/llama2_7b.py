"""Llama 2 7B: 6.7 billion parameters, 4,096 tokens of context.

Recipe of the Llama 2 paper (arXiv:2307.09288, section 2.2): 4 million tokens a step, 2 trillion in
all, warm-up of 2,000 steps, cosine to 10%, AdamW with epsilon 1e-5.

    torus train --config=llama2_7b --config.data.path=DATASET --workdir=RUN
"""

from models.presets import PRESETS
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="llama2-7b", model=PRESETS["llama2-7b"]())
    exp.data.seq_len = 4096
    exp.optimizer.peak_lr = 3e-4
    exp.optimizer.warmup_steps = 2_000
    exp.optimizer.eps = 1e-5
    exp.train.batch_size = 1024
    exp.train.steps = 477_000
    exp.eval.every = 5_000
    return exp
