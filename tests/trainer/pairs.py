"""The tiny config with one feature each, for the tests of pairs of features.

`get_config("buckets")` is the feature "buckets". PAIRS_DATA names the folder, or the bucket, that
holds the datasets set0 and set1. Features that go together share a row of `TOGETHER`.
"""

import os
from collections.abc import Callable

from models.config import RopeConfig
from sharding.config import MeshConfig
from tests import tiny
from trainer.config import Experiment
from trainer.data.config import CollateConfig

STEPS, HALF = 6, 3


def _set(part: str, **values) -> Callable[[Experiment], None]:
    def change(exp: Experiment) -> None:
        owner = getattr(exp, part)
        for name, value in values.items():
            setattr(owner, name, value)

    return change


def _mixture(exp: Experiment) -> None:
    first, second = (f"{os.environ['PAIRS_DATA']}/set{n}" for n in range(2))
    exp.data.mixture = ((first, 1.0), (second, ((0, 0.0), (16, 2.0))))


def _local_layers(exp: Experiment) -> None:
    model = exp.model
    model.pattern, model.window = ("local", "global"), 8
    model.rope = RopeConfig(local_theta=1000.0)
    model.norm, model.norm_placement, model.qk_norm = "rmsnorm_plus_one", "sandwich", "head"
    model.attention_softcap, model.final_softcap, model.scale_embeddings = 50.0, 30.0, True


def _mesh(**sizes) -> Callable[[Experiment], None]:
    def change(exp: Experiment) -> None:
        exp.mesh = MeshConfig(**sizes)

    return change


FEATURES: dict[str, Callable[[Experiment], None]] = {
    # Data.
    "concat": _set("data", packing="concat"),
    "balance": _set("data", balance=4),
    "buckets": _set("data", buckets=(16,)),
    "mixture": _mixture,
    "fim": _set("data", collate=CollateConfig("fim", sentinels=(10, 11, 12, 13))),
    "prefix": _set("data", collate=CollateConfig("prefix")),
    "instruction": _set("data", collate=CollateConfig("instruction", begin=(97,), end=(98,))),
    # Model and precision.
    "bfloat16": lambda exp: (
        _set("model", dtype="bfloat16")(exp), _set("optimizer", moment_dtype="bfloat16")(exp)
    ),
    "remat": _set("model", remat="full"),
    "local layers": _local_layers,
    "z-loss": _set("train", z_loss=1e-3),
    # Mesh.
    "zero 1": _mesh(fsdp=-1, zero=1),
    "tensor": _mesh(fsdp=-1, tensor=2),
    "ulysses": lambda exp: (_mesh(fsdp=-1, seq=2)(exp), _set("model", seq_strategy="ulysses")(exp)),
    "ring": lambda exp: (_mesh(fsdp=-1, seq=2)(exp), _set("model", seq_strategy="ring")(exp)),
    # What watches a run.
    "skip spikes": _set("health", skip_spikes=True, factor=1.0, window=4),
    "repeats": lambda exp: (
        _set("health", compare_every=2, replay_every=2)(exp), _set("log", fingerprint_every=2)(exp)
    ),
    "cadence": _set("checkpoint", every=-1),
}  # fmt: skip

# Two processes and the supervisor start slowly, so that features which go together share a run.
TOGETHER = {
    "mixture, fim, balance": ("mixture", "fim", "balance", "z-loss"),
    "buckets, bfloat16": ("buckets", "bfloat16", "repeats"),
    "prefix, zero 1": ("prefix", "zero 1", "remat", "skip spikes"),
    "instruction, ulysses": ("instruction", "ulysses", "local layers", "cadence"),
    "concat, tensor": ("concat", "tensor"),
    "ring": ("ring",),  # takes long to compile: soak only
}


def get_config(features: str = "") -> Experiment:
    """Returns the tiny config with the features, separated by `+` or a key of `TOGETHER`."""
    exp = tiny.get_config()
    exp.data.path = f"{os.environ['PAIRS_DATA']}/set0"
    exp.train.steps, exp.train.batch_size = STEPS, 16
    exp.eval.every, exp.eval.batches, exp.checkpoint.every = 2, 2, 0
    exp.log.fingerprint_every = 0
    for feature in TOGETHER.get(features, filter(None, features.split("+"))):
        FEATURES[feature](exp)
    return exp
