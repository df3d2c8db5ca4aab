"""OLMo 2 7B: 7.3 billion parameters, norms after each branch.

First stage of the recipe in the OLMo 2 paper (arXiv:2501.00656): 1,024 rows of 4,096 tokens,
warm-up of 2,000 steps, cosine to 10% over 5 trillion tokens, stopped near 4 trillion, z-loss 1e-5.

    torus train --config=olmo2_7b --config.data.path=DATASET --workdir=RUN
"""

from models.presets import PRESETS
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="olmo2-7b", model=PRESETS["olmo2-7b"]())
    exp.data.seq_len = 4096
    exp.optimizer.peak_lr = 3e-4
    exp.optimizer.warmup_steps = 2_000
    exp.train.batch_size = 1024
    exp.train.steps = 1_192_000  # 5 trillion tokens
    exp.train.stop_at = 928_000
    exp.train.z_loss = 1e-5
    exp.eval.every = 5_000
    return exp
