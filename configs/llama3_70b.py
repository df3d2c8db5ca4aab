"""Llama 3 70B (3.0): 70.6 billion parameters, 8,192 tokens of context.

The Llama 3 paper (arXiv:2407.21783, section 3.4.1) gives the full recipe for 405B only: warm-up of
8,000 steps, cosine to 1% over 1.2 million. This size's peak rate is in its table 3; 4 million
tokens a step and 15 trillion in all are our reading of the rest.

Tensor parallelism of 4 keeps a layer's gathered weights and its activations small on chips of 16 to
32 GB.

    torus train --config=llama3_70b --config.data.path=DATASET --workdir=RUN
"""

from models.presets import PRESETS
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="llama3-70b", model=PRESETS["llama3-70b"]())
    exp.data.seq_len = 8192
    exp.optimizer.peak_lr = 1.5e-4
    exp.optimizer.warmup_steps = 8_000
    exp.optimizer.final_lr_fraction = 0.01
    exp.train.batch_size = 512
    exp.train.steps = 3_576_000
    exp.eval.every = 10_000
    exp.mesh.tensor = 4
    return exp
