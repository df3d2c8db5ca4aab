"""`torus plan`: refusals without the compiler, its answers read right, and two real compiles."""

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.quickstart import get_config
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.topology import compiler_environment, parse_slice
from trainer.commands import plan as command
from trainer.config import ROOT
from trainer.plan import calibration
from trainer.plan.compile import (
    abstract_batch,
    bytes_per_device,
    missing_option,
    parse_refusal,
)
from trainer.plan.screen import format_plan
from trainer.state import abstract_state, make_layout
from trainer.step import make_train_step

# ml_collections loads config files with a method that Python 3.11 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
GIB = 2**30
TINY = ["--config=quickstart", "--on=v5e-4", "--config.model.layers=1", "--config.model.width=128",
        "--config.model.heads=2", "--config.model.kv_heads=2", "--config.data.seq_len=128",
        "--config.model.mlp=256"]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "need", "have"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (1.16T) exceeds available HBM (95.74G).",
            1.16 * 1024 * GIB, 95.74 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (25.52G) exceeds available HBM (15.75G). HLO "
            "module: jit_train_step.\nSee https://openxla.org/xla/errors/error_1000",
            25.52 * GIB, 15.75 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16000.5M of 15.75G "
            "hbm. Exceeded hbm capacity by 1.2G.",
            16000.5 * 2**20, 15.75 * GIB,
        ),
    ],
)  # fmt: skip
def test_refusals_of_the_compiler(message, need, have):
    assert parse_refusal(message) == pytest.approx((need, have))


def test_other_failures_are_not_refusals():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.0M of 16.0M vmem"
    assert parse_refusal(message) is None
    assert parse_refusal("INTERNAL: Mosaic failed to compile TPU kernel") is None


def test_an_option_that_libtpu_does_not_know():
    message = "INVALID_ARGUMENT: No such compile option: 'xla_tpu_new_thing'"
    assert missing_option(message) == "xla_tpu_new_thing"
    assert missing_option("RESOURCE_EXHAUSTED: Ran out of memory") is None


def test_bytes_per_device():
    mesh = make_mesh(get_config().mesh)

    def place(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    tree = {
        "a": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=place("fsdp", None)),
        "b": jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=place()),
    }
    assert bytes_per_device(tree) == 16 // 8 * 4 * 4 + 3 * 2


def test_the_step_is_traced_without_asking_for_devices(monkeypatch):
    experiment = get_config()
    mesh = make_mesh(experiment.mesh)
    layout = make_layout(experiment, mesh)
    state, batch = abstract_state(experiment, layout), abstract_batch(experiment, mesh)
    # Optimizer moments are twice the parameters, on the same shards; the rest is scalars.
    assert bytes_per_device(state.opt_state) == 2 * bytes_per_device(state.params) + 4

    def refuse(*args, **kwargs):
        raise AssertionError("asked for devices")

    for name in ("devices", "local_devices", "device_count", "device_put", "default_backend"):
        monkeypatch.setattr(jax, name, refuse)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(make_train_step(experiment, layout), donate_argnums=0).trace(state, batch)
    shardings = jax.tree.map(lambda a: a.sharding.spec, traced.out_info[0].params)
    assert shardings == jax.tree.map(lambda a: a.sharding.spec, state.params)


# ---------------------------------------------------------------- refused without the compiler


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--config=quickstart"], "--on=SLICE is missing"),
        (["--config=quickstart", "--on=v5e-5"], "did you mean `v5e-4`"),
        (["--config=quickstart", "--on=v5e-16"], "batch_size = 8 does not divide over data . fsdp"),
        (["--config=quickstart", "--on=v5e-4", "--config.mesh.tensor=3"], "mesh axis tensor = 3"),
        (["--config=quickstart", "--of=v5e-4"], "unknown flag --of"),
        (["--on=v5e-4"], "--config=FILE is missing"),
        (["--config=quickstart", "--on=v5e-4", "--price=cheap"], "--price=cheap: a number"),
        (["--config=quickstart", "--on=v5e-4", "--config.perf=fats"], "choose auto, fast, off"),
        (["--calibrate=nowhere", "--on=v5e-4"], "nowhere is not a run"),
    ],
)
def test_mistakes_start_no_compiler(arguments, match, monkeypatch):
    monkeypatch.setattr(command, "_compile", lambda *_: pytest.fail("the compiler was started"))
    with pytest.raises(UsageError, match=match):
        command.main(arguments)


def test_missing_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[aot\]'"):
        command.main(["--config=quickstart", "--on=v5e-4"])


# ---------------------------------------------------------------- answers


def _plan(**changes):
    return {
        "config": "quickstart", "slice": "v5e-4", "chips": 4, "devices": 4,
        "mesh": {"data": 1, "fsdp": 4, "seq": 1, "tensor": 1}, "parameters": 3_214_336,
        "remat": "none", "barriers": False, "options": {}, "forecast": None,
        "tokens_per_step": 2048, "parameter_bytes": GIB, "optimizer_bytes": 2 * GIB,
        "capacity": 16 * GIB, "needed": 12 * GIB, "argument_bytes": 3 * GIB,
        "temporary_bytes": 9 * GIB, "host_bytes": 0, "trace_seconds": 1.0,
        "compile_seconds": 70.0, "versions": {"jax": "0.10.2", "libtpu": "0.0.42"}, "fits": True,
        **changes,
    }  # fmt: skip


def test_a_plan_that_fits(monkeypatch, capsys):
    monkeypatch.setattr(command, "require_libtpu", lambda: None)
    monkeypatch.setattr(command, "_compile", lambda *_: (0, _plan(), ""))
    assert command.main(["--config=quickstart", "--on=v5e-4"]) == 0
    text = capsys.readouterr().out
    assert "quickstart on v5e-4 (4 chips, 2x2)" in text
    assert re.search(r"mesh +fsdp 4; zero 3, remat none", text)
    assert re.search(r"temporaries +9\.00\n +peak +12\.00\n +capacity +16\.00\nfits: 25%", text)
    assert "on the host" not in text
    assert text.endswith("compiled in 1m11s by jax 0.10.2, libtpu 0.0.42\n")


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_to_try():
    plan = _plan(needed=int(20.5 * GIB), fits=False, argument_bytes=None, temporary_bytes=None)
    experiment = get_config()
    experiment.mesh.zero = 1
    text = format_plan(plan, experiment, parse_slice("v5e-4"))
    assert "does not fit: needs 4.50 GiB more than the 16.00 GiB per chip" in text
    assert text.endswith("refused in 1m11s by jax 0.10.2, libtpu 0.0.42")
    for option in ("mesh.zero=3", "model.remat=full", "train.accumulation=2"):
        assert f"  try --config.{option}" in text
    experiment.mesh.zero, experiment.train.batch_size, plan["remat"] = 3, 4, "full"
    assert "try a larger slice" in format_plan(plan, experiment, parse_slice("v5e-4"))


def test_the_verdict_counts_an_evaluation_in_the_run():
    plan = _plan(evaluation_bytes=18 * GIB, fits=False)
    text = format_plan(plan, get_config(), parse_slice("v5e-4"))
    assert re.search(r"needed +12\.00\n +evaluation +18\.00\n", text)
    assert "does not fit: evaluation needs 2.00 GiB more than the 16.00 GiB per chip" in text


def test_a_compiler_that_crashes(monkeypatch, capsys):
    monkeypatch.setattr(command, "require_libtpu", lambda: None)
    monkeypatch.setattr(command, "_compile", lambda *_: (-6, None, "Check failed\n"))
    assert command.main(["--config=quickstart", "--on=v5e-4"]) == 3
    captured = capsys.readouterr()
    assert captured.out == "" and "Check failed\ntorus: error: compiling failed" in captured.err


def test_another_process_holds_libtpu(monkeypatch):
    log = 'Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm /tmp/lock"'
    monkeypatch.setattr(command, "require_libtpu", lambda: None)
    monkeypatch.setattr(command, "_compile", lambda *_: (1, None, log))
    with pytest.raises(UsageError, match="another process holds libtpu"):
        command.main(["--config=quickstart", "--on=v5e-4"])


FORECAST = {
    "seconds": {"roofline": 0.7, "estimate": 0.9, "cycles": 1.0},
    "shares": {"matmul": (0.6, 0.0), "all-reduce over fsdp": (0.1, 0.2), "copy": (0.0, 0.0001)},
    "mfu": {"roofline": 0.7, "estimate": 0.5, "cycles": 0.45}, "tokens_per_second": 500.0,
    "executed_flops": 1e12, "walked_peak": 12 * GIB, "holders": {"activations": 8 * GIB},
    "held": [{"holder": "activations", "name": "4 x models/layers.py:1 mlp", "bytes": 7 * GIB}],
    "findings": [{"rule": "synchronous", "what": "all-reduce over fsdp", "seconds": 0.1,
                  "bytes": 1e9, "source": "models/loss.py:7 _chunk", "cure": "overlap it"}],
    "notes": ["a loop of unknown length counted once: while"],
}  # fmt: skip


def test_the_screen_of_a_forecast():
    experiment = get_config()
    untested = "xla_tpu_enable_sparse_core_collective_offload_all_reduce"
    plan = _plan(forecast=FORECAST, options={"xla_a": "true", untested: "true"})
    text = format_plan(plan, experiment, parse_slice("v5e-4"), price=2.0, calibration=(1.1, 3))
    assert "0.90" not in text and "900.0 ms, between 700.0 ms (roofline) and 1.00 s" in text
    assert "MFU 50.0%, between 70.0% and 45.0%; 500 tokens/s per chip, 2,000 in all" in text
    assert re.search(r"100\.0 +200\.0  all-reduce over fsdp", text) and "  copy" not in text
    assert "990.0 ms by 3 of your runs on this chip, which took 1.10 times" in text
    # 20 x 3,214,336 tokens of 2,048 a step at 0.9 s: 7.85 hours of 4 chips at 2 an hour.
    assert re.search(r"7\.8 hours for 20 tokens a parameter \(0\.1 billion tokens\), 63 at 2", text)
    assert "7.00  4 x models/layers.py:1 mlp" in text and "compiler    xla_a=true (" in text
    assert f"compiler    {untested}=true, untested on hardware" in text
    assert "at models/loss.py:7 _chunk; overlap it" in text and "not counted: a loop" in text


def test_own_runs_are_kept_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    run.mkdir()
    times = [5000.0] + 9 * [990.0]  # the first step compiled
    records = [
        {"kind": "train", "step": step, "time": 0.0, "step_ms": ms} for step, ms in enumerate(times)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    measured = calibration.measured_step(str(run))
    assert measured == pytest.approx(0.99) and calibration.factor("v5e") is None
    for _ in range(2):
        calibration.add_run(str(run), "v5e", _plan(forecast=FORECAST), measured)
    assert calibration.factor("v5e") == (pytest.approx(1.1), 1)
    assert calibration.factor("v5p") is None
    with pytest.raises(UsageError, match="has recorded no step"):
        calibration.measured_step(str(tmp_path))


def test_published_runs_are_whole():
    """Each row's seconds follow from its published figure, and every estimate stands beside it."""
    for row in calibration.published():
        assert row["source"] and row["date"] and row["convention"], row["name"]
        seconds = (
            row["tokens_per_step"] / row["chips"] / row["published_tokens_per_second_per_chip"]
        )
        assert row["published_seconds"] == pytest.approx(seconds, rel=5e-3), row["name"]
        assert row["estimate"]["roofline"] <= row["estimate"]["estimate"], row["name"]
        assert row["tuned"] is False and row["fits"] is True, row["name"]


# ---------------------------------------------------------------- with libtpu


@needs_libtpu
@pytest.mark.tpu_compile
def test_a_real_compilation_for_a_slice_that_is_not_there(capsys, tmp_path):
    page, program = tmp_path / "plan.html", tmp_path / "program.gz"
    assert command.main([*TINY, "--json", f"--explain={page}", "--program", str(program)]) == 0
    assert "<h2>Roofline</h2>" in page.read_text()
    assert gzip.decompress(program.read_bytes()).startswith(b"HloModule")
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["mesh"]["fsdp"] == 4 and plan["devices"] == 4
    state = plan["parameter_bytes"] + plan["optimizer_bytes"]
    # The compiler pads small arrays to tiles; it must not hold a second copy of the state.
    assert state < plan["argument_bytes"] < 1.5 * state + 2**16
    assert plan["argument_bytes"] < plan["needed"] < plan["capacity"]
    assert state < plan["evaluation_bytes"] < plan["needed"]


@needs_libtpu
@pytest.mark.tpu_compile
def test_a_real_refusal(capsys):
    assert command.main([*TINY, "--json", "--config.train.batch_size=4000000"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert not plan["fits"] and plan["capacity"] == int(15.75 * GIB)
    assert plan["needed"] > plan["capacity"] and plan["temporary_bytes"] is None


@needs_libtpu
@pytest.mark.tpu_compile
def test_an_option_reaches_the_compiler_and_an_unknown_one_is_one_line():
    with pytest.raises(UsageError, match=r"libtpu .* has no option xla_tpu_no_such_thing: leave"):
        command.main([*TINY, "--config.perf=off,xla_tpu_no_such_thing=true"])


OPTIONS_ARE_KNOWN = """
import jax, jax.numpy as jnp, json, sys
from sharding.mesh import make_mesh
from sharding.config import MeshConfig
from sharding.topology import parse_slice, slice_devices
from trainer.plan.recipe import OPTIONS
for chip, name in (("v5e", "v5e-4"), ("v5p", "v5p-8")):
    mesh = make_mesh(MeshConfig(), slice_devices(parse_slice(name)))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    options = {o.name: o.value for o in OPTIONS if chip in o.chips}
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=whole)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(lambda x: x + 1, compiler_options=options).lower(x).compile()
    print(chip, len(options))
"""


@needs_libtpu
@pytest.mark.tpu_compile
def test_every_option_of_the_recipe_is_known_to_this_libtpu():
    """Options go out of use with new versions: then the table has to follow."""
    environment = {**os.environ, **compiler_environment(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OPTIONS_ARE_KNOWN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["v5e", "4", "v5p", "6"]
