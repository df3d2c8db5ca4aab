"""GPT-2 small: 124 million parameters, the model of Radford et al. 2019.

GPT-2's learning rate was not published; batch and schedule are those of GPT-3's smallest model
(arXiv:2005.14165, table 2.1 and appendix B): 0.5 million tokens a step, 300 billion in all.

    torus train --config=gpt2_124m --config.data.path=DATASET --workdir=RUN
"""

from models.presets import PRESETS
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="gpt2-124m", model=PRESETS["gpt2-124m"]())
    exp.data.seq_len = 1024
    exp.optimizer.peak_lr = 6e-4
    exp.optimizer.warmup_steps = 715  # 375 million tokens
    exp.train.batch_size = 512
    exp.train.steps = 572_000
    exp.eval.every = 5_000
    return exp
