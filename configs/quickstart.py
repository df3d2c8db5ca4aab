"""The experiment behind `make train`: a small decoder on the standard library's own text.

About a million parameters and a BPE vocabulary of 2,048, sized for two CPU cores: see
docs/benchmarks.md for what it reaches.

    torus train --config=quickstart --workdir=runs/quickstart

The longer run of the same config, half an hour on a slow machine, is `--config.train.steps=3000`.
"""

from models.config import ModelConfig
from trainer.config import Experiment


def get_config() -> Experiment:
    """Returns the quickstart: 2,048 tokens (6 KB of text) a step for 700 steps."""
    exp = Experiment(name="quickstart")
    exp.model = ModelConfig(
        vocab=2048,
        layers=4,
        width=128,
        heads=2,
        kv_heads=1,
        head_dim=64,
        mlp=384,
        max_length=2048,
        tie_embeddings=True,
        dtype="float32",
        remat="none",
        scan_layers=False,
    )
    exp.data.path = "builtin:2048"
    exp.data.seq_len = 256
    exp.optimizer.peak_lr = 6e-3
    exp.optimizer.warmup_steps = 50
    exp.optimizer.final_lr_fraction = 0.02
    exp.train.steps = 700
    exp.train.batch_size = 8
    exp.eval.every = 350
    exp.checkpoint.every = 175
    exp.log.every = 20
    return exp
