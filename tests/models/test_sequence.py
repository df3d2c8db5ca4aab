"""Sequence parallelism: every strategy gives the loss and the gradients of one device."""

import dataclasses
import functools
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models import spec
from models.attention import sequence
from models.attention.mask import Mask, reach, visible_BTS
from models.attention.sequence import Rows
from models.attention.sequence_plan import Sizes, estimate, sequence_plan
from models.config import ModelConfig
from models.decoder import param_specs
from sharding.config import AXES, MeshConfig
from sharding.errors import UsageError
from sharding.hardware import CHIPS
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from sharding.topology import compiler_environment
from tests.trainer.test_step import first_state
from tests.trainer.test_step import placed as placed_state
from trainer.config import Experiment, OptimizerConfig, TrainConfig, check_sizes
from trainer.state import TrainState, make_layout
from trainer.step import loss_sums, make_train_step

# float32, of the largest gradient, or relative for losses: another order of the same sums.
TOLERANCE = 2e-5
ROOT = Path(__file__).resolve().parents[2]
B, T = 2, 64
EIGHT = MeshConfig(fsdp=1, seq=8)
OPTIONS = {"xla_backend_optimization_level": "0"}
if jax.__version_info__ < (0, 11):  # half of the compile time; later versions have no such option
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
jit = functools.partial(jax.jit, compiler_options=OPTIONS)

MODEL = ModelConfig(
    vocab=61, layers=1, width=32, heads=8, kv_heads=8, head_dim=8, mlp=32, max_length=T,
    dtype="float32", remat="none", pad_vocab_to=64, attention="blockwise",
)  # fmt: skip
LOCAL = {"pattern": ("local",), "window": 11}
CASES = {
    "causal MHA": {},
    "packed MHA": {},
    "window": LOCAL,
    "softcap and GQA 8 to 1": {"attention_softcap": 1.0, "kv_heads": 1},
    "packed GQA softcap window": {"kv_heads": 2, "attention_softcap": 1.0, **LOCAL},
}
MIXED = "packed GQA softcap window"
STRATEGIES = ("gather", "ulysses", "ring", "bidirectional", "hybrid")
ORDERS = {  # beside those that `auto` takes
    "gather contiguous": {},
    "ring contiguous": {},
    "ring striped": {},
    "bidirectional zigzag": {"attention": "reference"},  # whose gradient is JAX's own
    "hybrid striped": {"seq_head_devices": 4},
    "ulysses auto": {},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several tiles to a block, so that some are skipped and some are not."""
    monkeypatch.setattr(sequence, "PIECE", 3)


def batch(packed: bool, length: int = T) -> dict[str, np.ndarray]:
    """Rows of one document each, or of several and padding."""
    lengths = [(5, 30, 3, 17), (41, 2, 21)] if packed else [(length,), (length,)]
    segments_BT, positions_BT = np.zeros((2, B, length), np.int32)
    for b, documents in enumerate(lengths):
        start = 0
        for number, size in enumerate(documents, 1):
            segments_BT[b, start : start + size] = number
            positions_BT[b, start : start + size] = range(size)
            start += size
    rng = np.random.default_rng(0)
    tokens_BT, targets_BT = rng.integers(0, 61, (2, B, length), dtype=np.int32)
    return dict(
        tokens=tokens_BT, targets=targets_BT, positions=positions_BT, segment_ids=segments_BT
    )


def placed(columns: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    rows = NamedSharding(jax.sharding.get_mesh(), P(BATCH, SEQ))
    return {name: jax.device_put(a_BT, rows) for name, a_BT in columns.items()}


def mesh_of(config: MeshConfig):
    return make_mesh(config, jax.devices()[: math.prod(getattr(config, a) for a in AXES)])


# ---------------------------------------------------------------- loss and gradients


@functools.cache
def program(case: str, changes: tuple, axes: tuple):
    """A function from packed or not to (loss, gradients) of the whole model."""
    config = dataclasses.replace(MODEL, **CASES[case], **dict(changes))
    mesh = mesh_of(MeshConfig(**dict(axes)))
    rng = np.random.default_rng(0)
    params = spec.map_specs(
        lambda _, s: s.fill + (s.std or 0.1) * rng.normal(size=s.shape).astype(np.float32),
        param_specs(config),
    )
    params = jax.device_put(params, spec.shardings(param_specs(config), mesh))
    experiment = Experiment(model=config)
    step = jit(jax.value_and_grad(lambda p, columns: loss_sums(p, columns, experiment)[0]))

    @functools.cache
    def run(packed: bool):
        with jax.set_mesh(mesh):
            return jax.tree.map(np.asarray, step(params, placed(batch(packed))))

    return run


def check(case: str, changes: dict, mesh: MeshConfig = EIGHT):
    program_of = case.replace("packed MHA", "causal MHA")  # the same program on other rows
    packed = "packed" in case
    loss, gradients = program(program_of, (), (("fsdp", 1),))(packed)
    axes = tuple((axis, getattr(mesh, axis)) for axis in AXES)
    found_loss, found = program(program_of, tuple(changes.items()), axes)(packed)
    np.testing.assert_allclose(found_loss, loss, rtol=TOLERANCE)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, found)
        largest = np.abs(gradient).max()
        assert largest > 0, f"{path}: no gradient at all"
        np.testing.assert_allclose(ours, gradient, atol=TOLERANCE * largest, err_msg=str(path))


@pytest.mark.parametrize(
    "case",  # all of them together are tested on every change, with each order of columns
    [c if c.endswith("MHA") else pytest.param(c, marks=pytest.mark.soak) for c in CASES],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_those_of_one_device(strategy, case):
    check(case, {"seq_strategy": strategy})


@pytest.mark.parametrize(
    "strategy",
    [s if s in ("gather", "ring") else pytest.param(s, marks=pytest.mark.soak) for s in STRATEGIES],
)
def test_bfloat16_gradients_follow_float32(strategy):
    """By the norm of the difference: blocks of keys are summed in float32, whatever travels.

    One device in bfloat16 is up to 1.8% off float32, for a layer rounds about twenty values in a
    row by 0.17% in the mean; a strategy rounds a few others, which is 1.2 times as much.
    """
    axes = tuple((axis, getattr(EIGHT, axis)) for axis in AXES)
    changes = (("dtype", "bfloat16"), ("seq_strategy", strategy))
    wanted = program(MIXED, (), (("fsdp", 1),))(True)[1]

    def errors(found):
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])

    one = errors(program(MIXED, changes[:1], (("fsdp", 1),))(True)[1])
    spread = errors(program(MIXED, changes, axes)(True)[1])
    assert one.max() < 0.025 and (spread < 1.4 * one).all(), (one, spread)


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_of_columns_gives_the_same_gradients(name):
    strategy, order = name.split()
    changes = {"seq_strategy": strategy, "seq_order": order, **ORDERS[name]}
    check(MIXED, changes)


def test_the_tpu_kernels_skip_within_whole_stretches(monkeypatch):
    monkeypatch.setattr(sequence, "PIECE", 64)  # what they take at once on a TPU: all of it
    check(MIXED, {"seq_strategy": "ring", "attention": "pallas"}, MeshConfig(fsdp=1, seq=2))


# ---------------------------------------------------------------- training


@functools.cache
def start() -> TrainState:
    return first_state(Experiment(model=dataclasses.replace(MODEL, kv_heads=4)))


@functools.cache
def losses(strategy: str, mesh: tuple) -> np.ndarray:
    exp = Experiment(
        model=dataclasses.replace(MODEL, kv_heads=4, remat="attention", seq_strategy=strategy),
        mesh=MeshConfig(**dict(mesh)),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=4),
        train=TrainConfig(steps=20, batch_size=B),
    )
    mesh = mesh_of(exp.mesh)
    layout = make_layout(exp, mesh)
    with jax.set_mesh(mesh):
        state = placed_state(start(), exp, layout)
        step = jit(make_train_step(exp, layout), donate_argnums=0)
        found = []
        for _ in range(20):
            state, metrics = step(state, placed(batch(packed=True)))
            found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.mark.parametrize(
    ("strategy", "mesh"),
    [
        ("ring", (("data", 2), ("fsdp", 1), ("seq", 2), ("tensor", 2))),
        ("ulysses", (("fsdp", 2), ("seq", 2), ("tensor", 2))),
        ("gather", (("fsdp", 1), ("seq", 4))),
        ("hybrid", (("fsdp", 1), ("seq", 4))),
        *(
            pytest.param(name, (("fsdp", 1), ("seq", 4)), marks=pytest.mark.soak)
            for name in ("ulysses", "ring", "bidirectional")
        ),
    ],
    ids=str,
)
def test_twenty_steps_lose_as_on_one_device(strategy, mesh):
    wanted = losses("auto", (("fsdp", 1),))
    assert wanted[-1] < 0.7 * wanted[0]
    np.testing.assert_allclose(losses(strategy, mesh), wanted, rtol=TOLERANCE)


# ---------------------------------------------------------------- what the backward pass keeps


def test_remat_keeps_the_output_of_the_ring_and_nothing_that_travelled():
    sizes = {}
    with jax.set_mesh(mesh_of(EIGHT)):
        mesh, columns = jax.sharding.get_mesh(), placed(batch(packed=False))
        for remat in ("full", "attention"):
            config = dataclasses.replace(MODEL, layers=2, remat=remat, seq_strategy="ring")
            params = spec.abstract(param_specs(config), spec.shardings(param_specs(config), mesh))
            experiment = Experiment(model=config)
            _, back = jax.eval_shape(
                lambda p, e=experiment: jax.vjp(lambda p: loss_sums(p, columns, e)[0], p), params
            )
            sizes[remat] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(back))
    kept = (sizes["attention"] - sizes["full"]) / (2 * B * T)
    assert round(kept) == 8 * 8 + 8  # per layer and token: an output and a log-sum-exp


def test_with_its_names_kept_the_forward_ring_runs_once():
    counts = {}
    with jax.set_mesh(mesh_of(EIGHT)):
        mesh = jax.sharding.get_mesh()
        for remat in ("none", "full", "attention"):
            config = dataclasses.replace(MODEL, remat=remat, seq_strategy="ring")
            params = spec.abstract(param_specs(config), spec.shardings(param_specs(config), mesh))
            experiment = Experiment(model=config)
            step = jax.jit(jax.grad(lambda p, b, e=experiment: loss_sums(p, b, e)[0]))
            text = step.lower(params, placed(batch(packed=False))).as_text()
            counts[remat] = text.count("collective_permute")
    assert counts["attention"] == counts["none"] < counts["full"]


# ---------------------------------------------------------------- skipping


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_tile_with_a_visible_pair_is_never_skipped(data):
    """Rows in any order, segments not in order, padding anywhere."""
    causal = data.draw(st.booleans())
    window = data.draw(st.integers(1, 9)) if causal and data.draw(st.booleans()) else None
    mask = Mask(causal=causal, window=window)

    def rows():
        numbers = st.lists(st.integers(0, 8), min_size=24, max_size=24)
        positions, segments = (np.array(data.draw(numbers), np.int32) for _ in range(2))
        return Rows(*(jnp.asarray(x.reshape(2, 12)) for x in (positions, segments % 4)))

    q, k = rows(), rows()
    needed_PP = np.asarray(sequence._may_see(mask, sequence._extent(q, 3), sequence._extent(k, 4)))
    seen_BTS = np.asarray(visible_BTS(mask, reach(mask, q[0], k[0], q[1], k[1])))
    visible_PP = seen_BTS.reshape(2, 4, 3, 3, 4).any((0, 2, 4))
    assert not (visible_PP & ~needed_PP).any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 11])
def test_tiles_that_hold_nothing_are_skipped_where_rows_are_in_order(packed, window):
    columns = batch(packed)
    rows = Rows(jnp.asarray(columns["positions"][:1]), jnp.asarray(columns["segment_ids"][:1]))
    mask, extent = Mask(window=window), sequence._extent(rows, 8)
    seen_BTS = np.asarray(visible_BTS(mask, reach(mask, rows[0], rows[0], rows[1], rows[1])))
    visible_PP = seen_BTS.reshape(8, 8, 8, 8).any((1, 3))
    np.testing.assert_array_equal(np.asarray(sequence._may_see(mask, extent, extent)), visible_PP)


# ---------------------------------------------------------------- plans


def sizes(**changes) -> Sizes:
    known = dict(devices=8, length=4096, heads=8, kv_heads=8, head_dim=128, item_bytes=2,
                 window=0, chip=CHIPS["v5e"])  # fmt: skip
    return Sizes(**{**known, **changes})


def plan(strategy="auto", order="auto", head_devices=0, **changes):
    config = dataclasses.replace(
        MODEL, seq_strategy=strategy, seq_order=order, seq_head_devices=head_devices
    )
    return sequence_plan(config, sizes(**changes))


def test_orders_are_permutations_with_equal_work():
    """Counts the causal pairs of each station: zigzag and striped are balanced, contiguous not."""
    work = {}
    for order in ("contiguous", "zigzag", "striped"):
        columns = plan("ring", order, length=128).columns()
        np.testing.assert_array_equal(np.sort(columns), np.arange(128))
        work[order] = (columns.reshape(8, 16) + 1).sum(1)
    assert np.ptp(work["zigzag"]) == 0
    assert np.ptp(work["striped"]) < 0.15 * work["striped"].mean()
    assert work["contiguous"][-1] > 1.8 * work["contiguous"].mean()


def test_a_window_in_contiguous_order_needs_few_hops():
    ring = plan("ring", window=100)
    assert ring.order == "contiguous" and ring.length // ring.ring == 512
    assert [ring.hops(w) for w in (1, 2, 513, 514, 4096, None)] == [1, 2, 2, 3, 8, 8]
    assert plan("ring", "zigzag").hops(100) == 8


@pytest.mark.parametrize(
    ("changes", "strategy"),
    [
        # Heads divide: exchanging them costs least, whatever the length.
        (dict(length=2048, devices=4, heads=16, kv_heads=16), "ulysses"),
        (dict(length=2**17, devices=16, heads=32, kv_heads=8), "ulysses"),
        # More devices than heads: exchanged among some of them, with few stations for keys.
        (dict(length=2**20, devices=64, heads=32, kv_heads=8), "hybrid"),
        # Hops hide behind their arithmetic, and their sums are little beside it.
        (dict(length=2**20, devices=16, heads=8, kv_heads=8), "ring"),
        # Heads do not divide; keys are few beside the arithmetic.
        (dict(length=2**17, devices=4, heads=9, kv_heads=3), "gather"),
        (dict(chip=None), "gather"),
    ],
    ids=["short rows", "long rows", "many devices", "few heads", "odd heads", "unknown links"],
)
def test_auto(changes, strategy):
    chosen = plan(**changes)
    assert chosen.strategy == strategy, chosen.reason
    assert chosen.reason.startswith("auto")


def test_keys_both_ways_wait_half_as_long():
    chip = dataclasses.replace(CHIPS["v5e"], hbm_bandwidth=math.inf)  # what is summed aside
    one, both = (estimate(plan(s), sizes(chip=chip)) for s in ("ring", "bidirectional"))
    assert 0 < both < 0.5 * one


@pytest.mark.parametrize(
    ("arguments", "changes", "match"),
    [
        (("ulysses",), dict(heads=4, kv_heads=4),
         "exchanges heads among 8 devices, which do not divide the 4 query heads"),
        (("ulysses", "zigzag"), {}, "gives every device whole rows: leave seq_order auto"),
        (("hybrid",), dict(devices=2), "seq_head_devices = 1 of seq = 2, which must divide"),
        (("hybrid", "auto", 3), {}, "seq_head_devices = 3 of seq = 8"),
        (("hybrid", "auto", 4), dict(heads=2, kv_heads=2), "4 devices, which do not divide the 2"),
        (("ring", "zigzag"), dict(length=4104), "16 stretches, which do not divide their length"),
        (("bidirectional",), dict(length=4104), "other strategies: gather, ulysses, ring, hybrid"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_says_why(arguments, changes, match):
    with pytest.raises(UsageError, match=match):
        plan(*arguments, **changes)


def test_a_config_is_refused_before_devices_are_asked_for():
    exp = Experiment(model=dataclasses.replace(MODEL, seq_strategy="ulysses"))
    exp.data.seq_len = 48
    with pytest.raises(UsageError, match="16 devices, which do not divide the 8 query heads"):
        check_sizes(exp, dict(data=1, fsdp=1, seq=16, tensor=1))
    exp.model.seq_strategy = "rings"
    with pytest.raises(UsageError, match=r"seq_strategy = 'rings': .* did you mean `ring`"):
        exp.model.validate()


# ---------------------------------------------------------------- with libtpu


@pytest.mark.soak  # half a minute; tests/trainer/plan compiles for TPUs on every change
@pytest.mark.tpu_compile
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_on_a_tpu_every_transfer_of_a_ring_runs_beside_the_tiles_of_a_hop():
    """In a process of its own, whose environment the compiler needs; keys and sums travel apart."""
    command = [sys.executable, "-m", "tests.benchmarks.sequence", "--strategies=ring"]
    done = subprocess.run(
        [*command, "--lengths=32768", "--kv-heads=2"],
        capture_output=True, text=True, timeout=120, check=True, cwd=ROOT,
        env={**os.environ, **compiler_environment()},
    )  # fmt: skip
    assert "blocking: none" in done.stdout, done.stdout
    assert "forward hop: 2 asynchronous, 2 across the tile loop" in done.stdout
    assert "backward hop: 3 asynchronous, 3 across the tile loop" in done.stdout
