"""A config for tests: a model that compiles and trains in seconds on one core."""

from models.config import ModelConfig
from trainer.config import Experiment


def get_config() -> Experiment:
    exp = Experiment(name="tiny")
    exp.model = ModelConfig(
        vocab=259,
        layers=2,
        width=32,
        heads=4,
        kv_heads=4,
        head_dim=8,
        mlp=64,
        max_length=64,
        dtype="float32",
        remat="none",
        tie_embeddings=True,
    )
    exp.data.seq_len = 32
    exp.train.steps = 20
    exp.train.batch_size = 8
    exp.optimizer.peak_lr = 1e-2
    exp.optimizer.warmup_steps = 4
    exp.eval.every = 0
    exp.checkpoint.every = 4
    exp.log.every = 1
    exp.log.tensorboard = False
    return exp
