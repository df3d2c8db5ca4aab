"""The experiment behind `make train`: a byte-level decoder on the standard library's own text.

    torus train --config=quickstart --workdir=runs/quickstart
"""

from models.config import ModelConfig
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="quickstart")
    exp.model = ModelConfig(
        vocab=259, layers=4, width=256, heads=4, kv_heads=2, head_dim=64, mlp=768,
        max_length=2048, tie_embeddings=True, dtype="float32", remat="none",
    )
    exp.data.seq_len = 256
    exp.optimizer.peak_lr = 3e-3
    exp.optimizer.warmup_steps = 40
    exp.train.steps = 400
    exp.train.batch_size = 8
    exp.eval.every = 200
    exp.checkpoint.every = 200
    return exp
