"""Time, memory and audit, on two stored programs and on small ones written by hand.

`programs/` holds the train step of the quickstart's shape (3 layers, width 256, 2 heads of 128, MLP
512, 16 rows of 256 tokens, remat attention and gate) for v5e-4, fsdp 2 x tensor 2, as libtpu
0.0.42 and 0.0.51 compiled it; the kernels' own code is cut out.
"""

import dataclasses
import gzip
from pathlib import Path

import pytest

from configs.quickstart import get_config
from models.attention.tpu_cost import kernel_seconds
from sharding.hardware import CHIPS
from sharding.topology import parse_slice
from trainer.plan.cost import LINK_SHARE, Setting, time_step
from trainer.plan.forecast import forecast
from trainer.plan.hlo import parse
from trainer.plan.memory import memory_at_peak

PROGRAMS = Path(__file__).parent / "programs"
V5E, MESH = CHIPS["v5e"], {"data": 1, "fsdp": 2, "seq": 1, "tensor": 2}
TINY = Setting(V5E, MESH, (2, 2), wrap=False)


def stored(version: str) -> str:
    with gzip.open(PROGRAMS / f"tiny_{version}.hlo.gz", "rt") as file:
        return file.read()


def experiment(**model):
    exp = get_config()
    exp.model = dataclasses.replace(
        exp.model, layers=3, width=256, heads=2, kv_heads=2, head_dim=128, mlp=512, vocab=1000,
        dtype="bfloat16", remat="attention,gate", **model,
    )  # fmt: skip
    exp.data.seq_len, exp.train.batch_size = 256, 16
    exp.mesh.tensor = 2
    return exp


@pytest.fixture(scope="module", params=["042", "051"])
def program(request):
    return parse(stored(request.param))


@pytest.fixture(scope="module")
def timing(program):
    return time_step(program, TINY)


def test_every_matmul_is_counted(timing):
    """By hand: forward and backward of 3 layers, the head, and q, k, v, output and up again."""
    tokens, width, heads, mlp, vocab = 16 * 256 // 2, 256, 256 // 2, 512 // 2, 1024 // 2
    layer = 2 * tokens * width * (4 * heads + 3 * mlp)
    again = 2 * tokens * width * (4 * heads + mlp)
    expected = 3 * (3 * layer + again) + 3 * 2 * tokens * width * vocab
    rows = timing.rows
    assert sum(row.flops for row in rows if row.kind == "matmul") == expected
    # Attention forward and backward of 8 rows x 1 head, 128 of 256 keys: 4 and 10 a pair.
    attention = 3 * (4 + 10) * 8 * 256 * 128 * 128
    assert sum(row.flops for row in rows if row.kind == "attention") == attention


def test_the_models_of_time_are_in_order(timing):
    assert 0 < timing.seconds["roofline"] < timing.seconds["estimate"] < timing.seconds["cycles"]
    assert not timing.notes
    # What is waited for adds up to the step: nothing is lost and nothing is counted twice.
    waited = sum(waited for waited, _ in timing.shares().values())
    assert waited == pytest.approx(timing.seconds["estimate"], rel=1e-6)
    assert {"all-reduce over tensor", "all-gather over fsdp", "matmul"} <= set(timing.shares())


def test_state_is_counted_to_the_byte(program):
    """Weights as the config has them: those of fsdp x tensor on 4 devices, norms on each."""
    memory = memory_at_peak(program)
    layer = (4 * 256 * 256 + 3 * 256 * 512) // 4
    weights = 4 * (3 * layer + 1024 * 256 // 4)  # one table: the head is tied to it
    held = {(h.holder, h.name): h.bytes for h in memory.held}
    named = [n for holder, n in held if holder == "parameters" and "norm" not in n]
    assert sum(held["parameters", name] for name in named) == weights
    assert 2 * weights <= memory.by_holder()["optimizer"] <= 2.05 * weights
    assert memory.peak >= sum(memory.by_holder()[h] for h in ("parameters", "optimizer"))


def test_a_forecast_of_a_stored_program():
    found = forecast(stored("051"), experiment(), parse_slice("v5e-4"), MESH)
    # Model FLOPs leave recomputation out, so MFU is below what is executed over peak.
    executed = found.executed_flops / found.seconds["estimate"] / V5E.flops_bf16
    assert 0 < found.mfu["estimate"] < executed < 1
    assert found.tokens_per_second == pytest.approx(16 * 256 / 4 / found.seconds["estimate"])
    assert found.to_json()["holders"]["parameters"] > 0


# ---------------------------------------------------------------- programs written by hand

HEAD = "HloModule m, is_scheduled=true\n\n"
RING = "channel_id=1, replica_groups={{0,1,2,3}}"
FOUR = Setting(V5E, {"data": 1, "fsdp": 4, "seq": 1, "tensor": 1}, (2, 2), wrap=False)
MiB = 2**20
GATHER = 64 * MiB * 3 / 4 / (V5E.ici_bandwidth * LINK_SHARE * 2 / 2)  # two axes, one way round
COPY = 2 * 256 * MiB / V5E.hbm_bandwidth


def scheduled(*lines: str) -> str:
    return HEAD + "ENTRY %main (a: f32[]) -> f32[] {\n" + "".join(f"  {x}\n" for x in lines) + "}\n"


SMALL, LARGE = "f32[4194304]{0}", "f32[16777216]{0}"
PARAMETER = f"%p = {SMALL} parameter(0)"
WORK = "%w = f32[67108864]{0} negate(%b)"
BIG = "%b = f32[67108864]{0} parameter(1)"
START = f"%s = ({SMALL}, {LARGE}) all-gather-start(%p), {RING}, dimensions={{0}}"
DONE = f"ROOT %d = {LARGE} all-gather-done(%s)"


@pytest.mark.parametrize(
    ("lines", "seconds", "exposed"),
    [
        ((PARAMETER, BIG, f"ROOT %g = {LARGE} all-gather(%p), {RING}", WORK), GATHER + COPY, 1.0),
        ((PARAMETER, BIG, START, WORK, DONE), max(GATHER, COPY), None),
        ((PARAMETER, BIG, START, DONE, WORK), GATHER + COPY, 1.0),
        ((PARAMETER, BIG, WORK, START, DONE), GATHER + COPY, 1.0),
    ],
)
def test_a_collective_hides_only_behind_what_runs_meanwhile(lines, seconds, exposed):
    timing = time_step(parse(scheduled(*lines)), FOUR)
    assert timing.seconds["estimate"] == pytest.approx(seconds)
    waited, hidden = timing.shares()["all-gather over fsdp"]
    expected = max(0.0, GATHER - COPY) if exposed is None else exposed * GATHER
    assert (waited, waited + hidden) == pytest.approx((expected, GATHER))


def test_a_slice_of_a_stack_counts_as_a_slice():
    text = HEAD + (
        "%one (x: f32[64,1048576], i: s32[]) -> f32[1,1048576] {\n"
        "  %x = f32[64,1048576]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  %z = s32[] constant(0)\n"
        "  %v = f32[64,1048576]{1,0} bitcast(%x)\n"
        "  ROOT %s = f32[1,1048576]{1,0} dynamic-slice(%v, %i, %z)\n}\n\n"
        "ENTRY %main (p: f32[64,1048576], i: s32[]) -> f32[1,1048576] {\n"
        "  %p = f32[64,1048576]{1,0} parameter(0)\n  %j = s32[] parameter(1)\n"
        "  ROOT %f = f32[1,1048576]{1,0} fusion(%p, %j), kind=kLoop, calls=%one\n}\n"
    )
    assert time_step(parse(text), FOUR).rows[0].bytes == pytest.approx(8 * MiB, rel=1e-5)


def test_only_collectives_between_slices_are_left_out():
    """Eight devices in two slices: a gather inside each takes its time, one across says so."""
    two = Setting(V5E, {"data": 2, "fsdp": 4, "seq": 1, "tensor": 1}, (2, 2), wrap=False, slices=2)
    inside, across = (
        time_step(parse(scheduled(PARAMETER, f"ROOT %g = {LARGE} all-gather(%p), {groups}")), two)
        for groups in (
            "channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}",
            "channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}",
        )
    )
    assert inside.seconds["estimate"] == pytest.approx(GATHER) and not inside.notes
    assert across.seconds["estimate"] == 0
    assert across.notes == ["all-gather over data crosses slices: its time is not in the estimate"]


def test_work_adds_up_flops_and_bytes(timing):
    """What `torus plan --json` prints by kind is the sum of the rows of that kind."""
    work = timing.work()
    assert work["matmul"][0] == sum(r.flops for r in timing.rows if r.kind == "matmul") > 1e9
    assert sum(flops for flops, _ in work.values()) == timing.flops
    assert sum(moved for _, moved in work.values()) == sum(r.bytes for r in timing.rows) > 1e6


NESTED = HEAD + (
    "%inner (x: f32[64,1048576], i: s32[]) -> f32[1,1048576] {\n"
    "  %x = f32[64,1048576]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
    "  %z = s32[] constant(0)\n"
    "  ROOT %s = f32[1,1048576]{1,0} dynamic-slice(%x, %i, %z)\n}\n\n"
    "%outer (y: f32[64,1048576], j: s32[]) -> (f32[1,1048576], f32[64,1048576]) {\n"
    "  %y = f32[64,1048576]{1,0} parameter(0)\n  %j = s32[] parameter(1)\n"
    "  %n = f32[1,1048576]{1,0} fusion(%y, %j), kind=kLoop, calls=%inner\n"
    "  ROOT %t = (f32[1,1048576]{1,0}, f32[64,1048576]{1,0}) tuple(%n, %y)\n}\n\n"
    "ENTRY %main (p: f32[64,1048576], k: s32[]) -> (f32[1,1048576], f32[64,1048576]) {\n"
    "  %p = f32[64,1048576]{1,0} parameter(0)\n  %k = s32[] parameter(1)\n"
    "  ROOT %f = (f32[1,1048576]{1,0}, f32[64,1048576]{1,0}) fusion(%p, %k), kind=kLoop, "
    "calls=%outer\n}\n"
)


def test_a_fusion_reads_what_the_fusion_inside_it_slices():
    """4 MiB read and 4 MiB written: the stack is handed on untouched, not read whole (256 MiB)."""
    assert time_step(parse(NESTED), FOUR).rows[0].bytes == pytest.approx(8 * MiB, rel=1e-5)


def test_what_lives_at_once_is_held_at_once():
    """Two of three arrays live together; the one that is dead by then is not counted."""
    lines = (
        "%p = f32[524288]{0} parameter(0), metadata={op_name=\"state.params['w']\"}",
        "%a = f32[2097152]{0} broadcast(%p)",
        "%b = f32[1048576]{0} slice(%a)",
        "%c = f32[262144]{0} slice(%b)",
        "ROOT %r = f32[] reduce(%c)",
    )
    memory = memory_at_peak(parse(scheduled(*lines)))
    assert memory.peak == (2 + 8 + 4) * MiB
    assert memory.by_holder() == {"temporaries": 12 * MiB, "parameters": 2 * MiB}


def test_kernels_cost_what_they_must_do():
    operands = [("s32", (3,)), ("bf16", (32, 2048, 128)), ("bf16", (8, 2048, 128))]
    flops, seconds = kernel_seconds("torus_attention_forward", operands, (), V5E)
    assert flops == 4 * 32 * 2048 * 1024 * 128
    assert seconds == pytest.approx(flops / 197e12 / 0.82)
    backward, _ = kernel_seconds("torus_attention_backward", operands, (), V5E)
    assert backward == 2.5 * flops
    grouped = [("s32", (12,)), ("bf16", (8, 8192, 128)), ("bf16", (8, 2048, 128))]
    assert kernel_seconds("torus_attention_backward", grouped, (), V5E)[0] == backward
    # A table of 8 blocks of 1,024 x 1,024 of 8,192 queries: the window's layer, not the global one.
    operands = [("s32", (15,)), ("bf16", (4, 8192, 128))]
    flops, _ = kernel_seconds("torus_attention_forward", operands, (960.0, 4096.0), V5E)
    assert flops == 4 * 4 * 8192 * 960 * 128
