"""GPUs by formula: memory and time add up, more of anything never harms, and what is refused."""

import dataclasses
import itertools
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.llama3_8b import get_config
from models.presets import PRESETS
from sharding.config import AXES
from sharding.errors import UsageError
from sharding.hardware import CHIPS
from sharding.topology import GPUS, parse_slice, program_bytes
from tests.benchmarks.gpus import ROWS, estimate
from trainer.commands import plan as command
from trainer.config import Experiment, parse_flags
from trainer.plan.analytic import GPU_MATMUL_SHARE, bandwidth, step_seconds
from trainer.plan.cost import LINK_SHARE
from trainer.plan.forecast import setting_of
from trainer.plan.formula import _notes, formula_plan
from trainer.plan.recipe import compile_options
from trainer.plan.search import space

# ml_collections loads config files with a method that Python 3.11 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
LABEL = "by formula; nothing was compiled or run"
FITS = ["--config=llama3_8b", "--on=8xH200", "--config.train.accumulation=32"]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Neither libtpu nor a compilation is asked for, and JAX's share of the memory is its own."""
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(command, "require_libtpu", lambda: pytest.fail("asked for libtpu"))
    monkeypatch.setattr(command, "Compilation", lambda *_: pytest.fail("compiled"))


def experiment(rows=512, accumulation=1, **mesh) -> Experiment:
    exp = get_config()
    exp.train.batch_size, exp.train.accumulation = rows, accumulation
    exp.mesh = dataclasses.replace(exp.mesh, **mesh)
    return exp


powers = st.integers(0, 3).map(lambda power: 2**power)


# ---------------------------------------------------------------- links


def test_every_gpu_has_figures_and_shares():
    assert set(GPU_MATMUL_SHARE) == set(GPUS) and all(CHIPS[gpu].ici_bandwidth for gpu in GPUS)


@settings(max_examples=60, deadline=None)
@given(powers, powers, powers, powers, st.integers(0, 3), st.sets(st.sampled_from(AXES)))
def test_bandwidth_against_devices_laid_out_one_by_one(data, fsdp, seq, tensor, power, axes):
    sizes = dict(zip(AXES, (data, fsdp, seq, tensor), strict=True))
    total, host = math.prod(sizes.values()), min(2**power, math.prod(sizes.values()))
    target = dataclasses.replace(parse_slice(f"{total // host}x{host}xH100"), network=30e9)
    places = list(itertools.product(*(range(size) for size in sizes.values())))
    group = [  # of the first device: those that differ from it in these axes alone
        number
        for number, place in enumerate(places)
        if all(at == 0 or axis in axes for axis, at in zip(AXES, place, strict=True))
    ]
    inside = sum(number // host == 0 for number in group)
    expected = 450e9 if inside == len(group) else min(450e9, inside * 30e9)
    found = bandwidth(setting_of(experiment(), target, sizes), *axes)
    assert found == pytest.approx(LINK_SHARE * expected)


@settings(max_examples=60, deadline=None)
@given(
    powers, powers, powers, st.sampled_from([1, 2, 4]),
    st.sampled_from(["gather", "ring", "ulysses", "bidirectional"]),
    st.floats(1, 20), st.booleans(),
)  # fmt: skip
def test_a_faster_link_never_makes_the_step_slower(data, fsdp, seq, tensor, strategy, times, both):
    """With the strategy named: `auto` takes the simplest of those that are nearly the best."""
    sizes = dict(zip(AXES, (data, fsdp, seq, tensor), strict=True))
    exp = experiment(rows=64)
    exp.model = dataclasses.replace(exp.model, remat="full", seq_strategy=strategy)
    total = math.prod(sizes.values())
    host = min(8, total)
    setting = setting_of(exp, parse_slice(f"{total // host}x{host}xH200"), sizes)
    faster = dataclasses.replace(setting, network=times * setting.network)
    if both:
        links = times * setting.chip.ici_bandwidth
        chip = dataclasses.replace(setting.chip, ici_bandwidth=links)
        faster = dataclasses.replace(faster, chip=chip)
    slow, fast = step_seconds(exp, setting), step_seconds(exp, faster)
    assert all(fast[part] <= slow[part] for part in slow)
    assert fast["matmul"] == slow["matmul"] and fast["attention"] == slow["attention"]


# ---------------------------------------------------------------- memory


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["llama3-8b", "llama3.2-1b", "gemma2-2b"]), st.sampled_from(GPUS),
    st.integers(0, 4), st.sampled_from(["auto", "full", "none"]),
    st.floats(0.2, 1), st.floats(0.2, 1),
)  # fmt: skip
def test_more_memory_never_turns_fits_into_does_not_fit(preset, gpu, power, remat, one, other):
    exp = experiment(rows=32, accumulation=4)
    exp.model = dataclasses.replace(PRESETS[preset](), remat=remat)
    exp.data.seq_len = 256 * 2**power
    plans = []
    for share in sorted((one, other)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XLA_CLIENT_MEM_FRACTION", f"{share:.6f}")
            plans.append(formula_plan(exp, parse_slice(f"8x{gpu}")))
    less, more = plans
    assert more["fits"] or not less["fits"]
    assert less["capacity"] <= more["capacity"] <= CHIPS[gpu].hbm_bytes
    assert remat == "auto" or less["needed"] == more["needed"]
    assert all((plan["forecast"] is not None) == plan["fits"] for plan in plans)


def test_a_byte_too_much_does_not_fit(monkeypatch):
    exp, target = experiment(accumulation=32), parse_slice("8xH200")
    exp.model = dataclasses.replace(exp.model, remat="full")
    share = formula_plan(exp, target)["needed"] / 141e9
    for factor, fits in ((1 + 1e-9, True), (1 - 1e-9, False)):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", f"{share * factor:.15f}")
        plan = formula_plan(exp, target)
        assert plan["fits"] == fits == (plan["forecast"] is not None)


def test_parts_add_up_and_what_is_kept_follows_the_recipe():
    plan = formula_plan(experiment(accumulation=32), parse_slice("8xH200"))
    assert sum(plan["memory"].values()) == plan["needed"] <= plan["capacity"] == 0.75 * 141e9
    forecast, parameters = plan["forecast"], plan["parameters"]
    assert sum(forecast["shares"].values()) == pytest.approx(forecast["seconds"]["estimate"])
    # float32 parameters, two moments and gradients over 8 GPUs; norms are not in the formula.
    held = [plan["memory"][name] for name in ("parameters", "optimizer", "gradients")]
    assert held == pytest.approx([n * parameters / 8 for n in (4, 8, 4)], rel=1e-3)
    speed = plan["tokens_per_step"] / forecast["seconds"]["estimate"] / 8
    assert forecast["tokens_per_second"] == pytest.approx(speed)
    assert plan["remat"] == "rotated_qk,v,attention,residual,gate,up" and plan["options"] == {}
    small = formula_plan(experiment(accumulation=32), parse_slice("8xA100-40"))
    assert small["remat"] == "full" and not small["barriers"]
    sizes = {"data": 1, "fsdp": 8, "seq": 1, "tensor": 1}
    assert all(compile_options(experiment(), gpu, sizes) == {} for gpu in GPUS)


@pytest.mark.parametrize("share", ["1.2", "0", "90%", "0.0"])
def test_a_share_of_the_memory_that_is_none(share, monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", share)
    with pytest.raises(UsageError, match=f"XLA_CLIENT_MEM_FRACTION={share}: a share"):
        program_bytes("h200")
    assert program_bytes("v5e") == 15.75 * 2**30


# ---------------------------------------------------------------- published runs


def test_the_note_says_what_the_published_runs_say():
    ratios = sorted(published / estimate(*run) for *run, published, _ in ROWS)
    said = re.findall(r"each took ([\d.]+) to ([\d.]+) times", _notes(parse_slice("8xH100"))[-1])
    assert [f"{ratios[0]:.1f}", f"{ratios[-1]:.1f}"] == list(said[0])


# ---------------------------------------------------------------- the command


def test_a_plan_that_fits(capsys):
    assert command.main([*FITS, "--price=3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"llama3-8b on 8xH200 (8 GPUs, hosts: 1), {LABEL}\n")
    assert text.endswith(f"fits: 33% of a GPU's memory is left\n{LABEL}\n")
    assert f"memory per GPU, GiB, {LABEL}" in text and f"a step, {LABEL}" in text
    assert re.search(r"days for 3,576,000 configured steps .* at 3 a GPU-hour\n", text)
    assert re.search(
        r"[\d.]+ s; [\d,]+ tokens/s per GPU, [\d,]+ in all; MFU \d\d\.\d%; ms:\n", text
    )
    for part in ("matmul", "attention", "elementwise", "gradients over fsdp"):
        assert re.search(rf"\d\.\d  {part}\n", text), part
    assert "compiled in" not in text and "compiler's" not in text


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_to_try(capsys, monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.4")
    assert command.main([*FITS, "--config.model.remat=none"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"does not fit: needs 13\.\d\d GiB more than the 52\.53 GiB per GPU", text)
    assert "  try --config.model.remat=full\n" in text
    assert "  try XLA_CLIENT_MEM_FRACTION=0.9 in the environment" in text
    assert "tokens/s" not in text and text.endswith(f"{LABEL}\n")


def test_what_to_try_fits_or_is_more_devices(capsys):
    asked = ["--config=llama3_8b", "--on=8xH200"]
    assert command.main(asked) == 1
    (option,) = re.findall(r"  try (--config.train.accumulation=\d+)\n", capsys.readouterr().out)
    assert command.main([*asked, option]) == 0
    half = int(option.partition("=")[2]) // 2
    assert command.main([*asked, f"--config.train.accumulation={half}"]) == 1
    capsys.readouterr()
    assert command.main(["--config=llama3_70b", "--on=8xH200"]) == 1
    (line,) = re.findall(r"  try (.*)\n", capsys.readouterr().out)
    assert line.endswith("parameters, gradients and optimizer alone take 131.42 GiB of each")


def test_json_says_that_nothing_was_compiled(capsys):
    assert command.main([*FITS, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["compiled"] is False and plan["fits"] and plan["slice"] == "8xH200"
    assert command.main([*FITS[:2], "--search", "--keep=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compiled"] is False and len(found["ranked"]) == 2
    assert all(row["plan"]["compiled"] is False for row in found["ranked"])


def test_a_search_ranks_by_formula_and_its_options_make_the_plan(capsys):
    arguments = ["--config=llama3_8b", "--on=2x8xH100"]
    assert command.main([*arguments, "--search", "--pareto", "--keep=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert LABEL in lines[0] and lines[1].startswith("   tokens/s/GPU") and LABEL in lines[-2]
    assert lines[2].startswith("*") and len(lines) == 2 + 5 + 2
    exp, _ = parse_flags([*arguments[:1], *lines[-1].split()])
    again = formula_plan(exp, parse_slice("2x8xH100"))
    assert again["fits"] and f"{again['forecast']['tokens_per_second']:,.0f}" in lines[2]
    speeds = [float(line[1:].split()[0].replace(",", "")) for line in lines[2:7]]
    assert speeds == sorted(speeds, reverse=True)


def test_a_candidate_is_the_plan_of_its_options():
    target = parse_slice("2x4xA100")
    found = space(experiment(rows=64), target)
    assert {c.mesh["fsdp"] for c in found.fit} >= {8} and found.too_large  # across hosts too
    assert all(c.needed <= program_bytes(target.chip) for c in found.fit)
    for candidate in found.fit[::40]:
        plan = formula_plan(candidate.experiment, target)
        assert plan["forecast"]["seconds"]["estimate"] == pytest.approx(candidate.seconds)
        assert plan["needed"] == pytest.approx(candidate.needed) and plan["mesh"] == candidate.mesh


def test_nothing_fits(capsys):
    assert command.main(["--config=llama3_70b", "--on=1xA100-40", "--search"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"nothing fits: the smallest needs [\d.]+ GiB .*more GPUs", text)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--explain=page.html"], "--explain needs a compiler: 8xH200 is planned by formula alone"),
        (["--program=text"], "--program needs a compiler"),
        (["--check"], "--check needs a compiler"),
        (["--search", "--budget=5m"], "--budget needs a compiler"),
        (["--search", "--jobs=2"], "--jobs needs a compiler"),
        (["--pareto"], "--pareto is of a search"),
        (
            ["--config.perf=auto,xla_x=1"],
            r"config.perf = 'auto,xla_x=1': on GPUs choose auto, fast or off",
        ),
        (["--network=0"], "--network=0: a number above 0, the Gb/s of one GPU"),
        (["--network=fast"], "--network=fast: a number above 0"),
        (["--on=v5e-8", "--network=200"], "--network=200 is of GPUs, not of v5e-8"),
        (["--on=8xH300"], "no TPU slice '8xH300'.*did you mean `h200`"),
        (["--config.mesh.tensor=3"], "mesh axis tensor = 3"),
        (
            ["--config.train.batch_size=12"],
            "batch_size = 12 does not divide over data . fsdp = 1 . 8",
        ),
    ],
)
def test_mistakes(flags, match):
    with pytest.raises(UsageError, match=match) as raised:
        command.main([*FITS[:2], *flags])
    assert raised.value.status == 2 and "\n" not in str(raised.value)


def test_a_run_is_not_calibrated_on_gpus(monkeypatch):
    monkeypatch.setattr(command, "read_experiment", lambda run: experiment())
    monkeypatch.setattr(command, "measured_step", lambda run: 1.0)
    with pytest.raises(UsageError, match="--calibrate needs a compiler"):
        command.main(["--calibrate=run", "--on=8xH200"])


def test_a_slower_network_between_hosts_is_felt(capsys):
    arguments = ["--config=llama3_8b", "--on=4x8xH100", "--config.train.accumulation=16", "--json"]

    def seconds(*flags):
        assert command.main([*arguments, *flags]) == 0
        return json.loads(capsys.readouterr().out)["forecast"]["shares"]["gradients over fsdp"]

    half = seconds("--network=200")
    assert half == pytest.approx(2 * seconds()) == pytest.approx(2 * seconds("--network=400"))
