"""The formula against the compiler: of four random meshes the two that it keeps hold the fastest.

Random small models on small slices; each mesh is compiled, so a case takes minutes the first time
(`make soak`). Answers are kept, so that a second run is quick.
"""

import importlib.util
import random

import pytest

from models.config import ModelConfig
from sharding.topology import parse_slice
from trainer.config import Experiment
from trainer.plan.process import Compilation
from trainer.plan.search import Candidate, shortlist, space

POOL, KEEP = 4, 2
TIE = 0.02  # of the step: the walk is exact to the bit, but what XLA fuses is not a law
SLICES = ("v5e-4", "v5e-8", "v5e-16", "v6e-8", "v5p-8", "v5p-16", "v4-8")

pytestmark = [
    pytest.mark.soak,
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu"),
]


def case(seed: int) -> tuple[Experiment, str, list[Candidate]]:
    """Returns a random experiment, a slice and a pool of its candidates, by formula."""
    draw = random.Random(seed)
    heads = draw.choice([4, 8, 16])
    exp = Experiment(name=f"case-{seed}")
    exp.model = ModelConfig(
        vocab=draw.choice([1000, 8000, 32000]), layers=draw.choice([2, 4, 8]),
        width=draw.choice([256, 512, 1024, 2048]), heads=heads,
        kv_heads=heads // draw.choice([1, 2, 4]), head_dim=draw.choice([64, 128]),
        mlp=draw.choice([512, 1024, 4096]), max_length=4096, remat="full",
    )  # fmt: skip
    exp.data.seq_len = draw.choice([256, 1024, 4096])
    exp.train.batch_size = draw.choice([16, 32, 64])
    name = draw.choice(SLICES)
    best: dict[tuple[int, ...], Candidate] = {}
    for candidate in shortlist(space(exp, parse_slice(name)).fit):
        best.setdefault(tuple(candidate.mesh.values()), candidate)
    pool = draw.sample([best[mesh] for mesh in sorted(best)], min(POOL, len(best)))
    return exp, name, sorted(pool, key=lambda c: c.seconds)


@pytest.mark.parametrize("seed", range(30))
def test_the_fastest_is_kept(seed):
    _, name, pool = case(seed)
    assert len(pool) > KEEP
    times = []
    for candidate in pool:
        with Compilation(candidate.experiment, parse_slice(name)) as compilation:
            status, plan, log = compilation.result()
        assert status == 0 and "refused" not in plan, plan or log[-1000:]
        times.append(plan["forecast"]["seconds"]["estimate"] if plan["fits"] else float("inf"))
    rows = [(c.mesh, c.seconds, t) for c, t in zip(pool, times, strict=True)]
    print(name, *rows, sep="\n")
    assert min(times[:KEEP]) <= (1 + TIE) * min(times), rows
