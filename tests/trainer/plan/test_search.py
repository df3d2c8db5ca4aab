"""The search: what it considers, in what order, how it ends, and what it prints. No compiler."""

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.llama3_8b import get_config as llama3_8b
from configs.quickstart import get_config as quickstart
from sharding.errors import UsageError
from sharding.topology import FAMILIES, parse_slice
from trainer.commands import plan as command
from trainer.config import check_sizes, parse_flags
from trainer.plan import process, search
from trainer.plan.forecast import setting_of
from trainer.plan.process import Compilation
from trainer.plan.search import Found, frontier, meshes, overrides, shortlist, space

# ml_collections loads config files with a method that Python 3.11 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
V5E = parse_slice("v5e-16")
GIB = 2**30


def gpt(rows=32):
    exp = quickstart()
    exp.model.heads = exp.model.kv_heads = 4
    exp.model.remat, exp.model.dtype, exp.train.batch_size = "auto", "bfloat16", rows
    return exp


@pytest.fixture(scope="module")
def pod():
    return space(llama3_8b(), parse_slice("v5e-256"))


@pytest.mark.parametrize("name", ["v5e-8", "v5p:4x4x12", "2xv5e-16", "tpu7x-16", "v4-8"])
def test_meshes_are_all_that_the_devices_make(name):
    target = parse_slice(name)
    found = list(meshes(target))
    assert len({tuple(m.values()) for m in found}) == len(found)
    assert all(math.prod(m.values()) == target.devices for m in found)
    assert all(m["data"] % target.count == 0 for m in found)  # only replicas cross slices
    # Ways to share out each prime's power over four axes: (k + 3 choose 3).
    inside, ways = target.devices // target.count, 1
    for prime in (2, 3):
        power = 0
        while inside % prime == 0:
            inside, power = inside // prime, power + 1
        ways *= math.comb(power + 3, 3)
    assert len(found) == ways


def test_candidates_are_configs_that_the_check_accepts(pod):
    assert len(pod.fit) > 1000 and pod.indivisible > 0
    for candidate in pod.fit[::97]:
        check_sizes(candidate.experiment, candidate.mesh)
        assert candidate.experiment.mesh.sizes(256) == candidate.mesh
        assert candidate.needed <= search.SLACK * FAMILIES["v5e"].compiler_bytes
    assert [c.seconds for c in pod.fit] == sorted(c.seconds for c in pod.fit)
    assert pod.too_large[0].needed <= pod.too_large[-1].needed
    assert {c.experiment.model.seq_strategy for c in pod.fit if c.mesh["seq"] == 4} >= {
        "gather", "ulysses", "ring", "bidirectional", "hybrid",
    }  # fmt: skip


def test_what_the_config_says_is_not_varied():
    exp = gpt()
    exp.model.remat, exp.model.seq_strategy = "attention", "ring"
    found = space(exp, V5E)
    assert {c.experiment.model.remat for c in found.fit} == {"attention"}
    assert {c.experiment.model.seq_strategy for c in found.fit} == {"ring"}


def test_the_options_make_the_candidate_again(pod):
    base = ["--config=llama3_8b"]
    for candidate in list(shortlist(pod.fit))[:12]:
        line = overrides(llama3_8b(), candidate.experiment)
        again, _ = parse_flags([*base, *line.split()])
        assert again == candidate.experiment


def test_a_mesh_is_compiled_a_few_times_at_most(pod):
    chosen = list(shortlist(pod.fit))
    counts = {}
    for candidate in chosen:
        mesh = tuple(candidate.mesh.values())
        counts[mesh] = counts.get(mesh, 0) + 1
    assert max(counts.values()) == search.PER_MESH and chosen[0] is pod.fit[0]
    assert len(counts) == len({tuple(c.mesh.values()) for c in pod.fit})


def test_nothing_divides():
    with pytest.raises(UsageError, match=r"no mesh of v5e-16 suits quickstart: .*batch_size = 1 "):
        exp = gpt(rows=1)
        exp.data.seq_len = 255
        exp.model.heads = exp.model.kv_heads = 1
        space(exp, V5E)


# ---------------------------------------------------------------- the formula


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.sampled_from([1, 2, 4]))
def test_more_work_takes_longer_and_more_is_kept_for_less(data, tensor, seq, accumulation):
    exp = llama3_8b()
    sizes = dict(zip(("data", "seq", "tensor"), (2**data, 2**seq, 2**tensor), strict=True))
    sizes["fsdp"] = 256 // math.prod(sizes.values())
    sizes = {axis: sizes[axis] for axis in ("data", "fsdp", "seq", "tensor")}
    exp.train.batch_size, exp.train.accumulation = 2048, accumulation
    exp.model.remat = "full"
    setting = setting_of(exp, parse_slice("v5e-256"), sizes)

    def total(**changes):
        model = dataclasses.replace(exp.model, **changes)
        parts = search.step_seconds(dataclasses.replace(exp, model=model), setting)
        assert min(parts.values()) >= 0
        return sum(parts.values())

    full = total()
    assert total(layers=64) > 1.5 * full and total(mlp=2 * exp.model.mlp) > full
    levels = [total(remat=remat) for remat in search._remats(llama3_8b())]
    assert levels == sorted(levels, reverse=True) and levels[0] == full


# Seconds of the compiled step of llama3_8b on v5e-256: docs/benchmarks.md, "The search".
COMPILED = (
    # data, fsdp, seq, tensor, microbatches, strategy, remat
    ((1, 256, 1, 1), 2, "auto", "rotated_qk,v,attention,residual", 6.634),
    ((1, 256, 1, 1), 2, "auto", "rotated_qk,v,attention", 6.639),
    ((1, 256, 1, 1), 1, "auto", "full", 6.856),
    ((4, 64, 1, 1), 1, "auto", "full", 6.891),
    ((2, 64, 1, 2), 2, "auto", "rotated_qk,v,attention,residual", 6.975),
    ((1, 64, 4, 1), 1, "ulysses", "full", 7.228),
    ((8, 16, 1, 2), 2, "auto", "full", 7.292),
    ((1, 128, 2, 1), 1, "ring", "full", 7.305),
)


@pytest.mark.parametrize("row", COMPILED, ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_formula_is_near_the_compiled_step(row):
    sizes, accumulation, strategy, remat, compiled = row
    exp = llama3_8b()
    exp.train.accumulation = accumulation
    exp.model.seq_strategy, exp.model.remat = strategy, remat
    exp.perf, exp.model.reduce_dtype = "fast", "bfloat16"  # as it was compiled
    mesh = dict(zip(("data", "fsdp", "seq", "tensor"), sizes, strict=True))
    found = sum(search.step_seconds(exp, setting_of(exp, parse_slice("v5e-256"), mesh)).values())
    assert found == pytest.approx(compiled, rel=0.025)


def test_sums_in_float32_move_twice_the_bytes():
    exp, target = llama3_8b(), parse_slice("v5e-256")
    setting = setting_of(exp, target, exp.mesh.sizes(target.devices))

    def gradients(reduce_dtype):
        model = dataclasses.replace(exp.model, reduce_dtype=reduce_dtype, remat="full")
        parts = search.step_seconds(dataclasses.replace(exp, model=model), setting)
        return parts["gradients"]

    assert gradients("float32") == pytest.approx(2 * gradients("bfloat16"))


# ---------------------------------------------------------------- the loop around the compiler


class Fake:
    """A compiler that answers after some polls; speed and memory follow from the mesh."""

    started: list = []  # noqa: RUF012
    behaviour = staticmethod(lambda experiment: {})

    def __init__(self, experiment, target):
        self.experiment, self.target, self.polls, self.stopped = experiment, target, 2, False
        Fake.started.append(self)

    __enter__ = lambda self: self  # noqa: E731

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.stopped = True

    def running(self):
        self.polls -= 1
        return self.polls > 0

    def result(self):
        sizes = self.experiment.mesh.sizes(self.target.devices)
        plan = {
            "fits": True, "needed": GIB * sizes["data"], "capacity": 15.75 * GIB,
            "remat": self.experiment.model.remat, "forecast": {
                "tokens_per_second": 1000.0 + sizes["fsdp"] - 50 * sizes["tensor"],
                "seconds": {"estimate": 1.0},
            },
        }  # fmt: skip
        plan |= self.behaviour(self.experiment)
        return (0, plan, "") if "status" not in plan else (plan["status"], None, plan["log"])


@pytest.fixture
def fake(monkeypatch):
    Fake.started, Fake.behaviour = [], staticmethod(lambda experiment: {})
    monkeypatch.setattr(search, "Compilation", Fake)
    monkeypatch.setattr(search.time, "sleep", lambda seconds: None)
    return Fake


def test_a_search_ends_when_enough_fit(fake):
    found = search.search(gpt(), V5E, keep=5, budget=60, jobs=3)
    assert len(found.compiled) == 5 and not found.stopped
    assert len(fake.started) == 5 and all(c.stopped for c in fake.started)
    speeds = [plan["forecast"]["tokens_per_second"] for _, plan in found.ranked()]
    assert speeds == sorted(speeds, reverse=True)


def test_what_does_not_fit_or_fails_is_not_counted(fake):
    answers = iter([{"fits": False, "needed": 17 * GIB}, {"status": -6, "log": "a\nCheck failed"}])
    fake.behaviour = staticmethod(lambda experiment: next(answers, {}))
    found = search.search(gpt(), V5E, keep=3, budget=60, jobs=1)
    assert len(found.ranked()) == 3 and len(found.compiled) == 4
    assert [reason for _, reason in found.failed] == ["Check failed"]


def test_a_compiler_that_always_fails_is_not_asked_again_and_again(fake):
    fake.behaviour = staticmethod(lambda experiment: {"status": 1, "log": "no libtpu"})
    found = search.search(gpt(), V5E, keep=8, budget=60, jobs=2)
    assert len(found.failed) >= search.FAILURES and found.stopped == "the compiler fails"
    assert len(fake.started) <= search.FAILURES + 2 and all(c.stopped for c in fake.started)


def test_the_budget_stops_what_runs(fake, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(search.time, "monotonic", lambda: next(clock))
    found = search.search(gpt(), V5E, keep=50, budget=25, jobs=2)
    assert found.stopped == "the budget is spent" and all(c.stopped for c in fake.started)
    assert len(found.ranked()) < 50


def test_an_interrupt_keeps_what_is_known(fake):
    def interrupt(text, done):
        if done == 2:
            raise KeyboardInterrupt

    found = search.search(gpt(), V5E, keep=9, budget=60, jobs=1, show=interrupt)
    assert found.stopped == "interrupted" and len(found.ranked()) == 2
    assert all(c.stopped for c in fake.started)


def test_nothing_fits_takes_no_compiler(fake):
    exp = llama3_8b()
    found = search.search(exp, parse_slice("v5e-4"), keep=8, budget=60)
    assert not fake.started and not found.ranked() and found.space.too_large


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_the_frontier_by_definition(needed):
    ranked = [(None, {"needed": n}) for n in needed]
    expected = {i for i, n in enumerate(needed) if all(n < m for m in needed[:i])}
    assert frontier(ranked) == expected


# ---------------------------------------------------------------- the command


def test_the_table(fake, monkeypatch, capsys):
    monkeypatch.setattr(command, "require_libtpu", lambda: None)
    arguments = ["--config=llama3_8b", "--on=v5e-64", "--search", "--keep=4", "--pareto"]
    assert command.main(arguments) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert re.match(r"llama3-8b on v5e-64: [\d,]+ candidates, .* 4 compiled$", lines[0])
    assert lines[2].startswith("*") and "1.00 s" in lines[2] and "fsdp" in lines[2]
    assert lines[-1].startswith("  --config.") and "no TPU ran" in lines[-2]
    assert "4 of 4: 0 compiling; best 1," in captured.err
    assert command.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["ranked"]
    assert len(rows) == 4 and rows[0]["options"] == lines[-1].strip() and rows[0]["frontier"]


def test_a_search_that_is_interrupted_or_finds_nothing(fake, monkeypatch, capsys):
    monkeypatch.setattr(command, "require_libtpu", lambda: None)
    assert command.main(["--config=llama3_8b", "--on=v5e-4", "--search"]) == 1
    assert "nothing fits: the smallest needs" in capsys.readouterr().out
    fake.behaviour = staticmethod(lambda experiment: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command.main(["--config=llama3_8b", "--on=v5e-64", "--search"]) == 130
    assert "interrupted: there may be better ones" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "match"),
    [
        (["--search", "--budget=10"], r"--budget=10: a number and s, m or h"),
        (["--search", "--keep=0"], r"--keep=0: a whole number"),
        (["--search", "--jobs=x"], r"--jobs=x: a whole number"),
        (["--budget=10m"], r"--budget is of a search: add --search"),
        (["--pareto"], r"--pareto is of a search: add --search"),
        (["--calibrate=RUN", "--search"], r"--calibrate plans one run: not with --search"),
    ],
)
def test_mistakes(flag, match):
    with pytest.raises(UsageError, match=match):
        command.main(["--config=llama3_8b", "--on=v5e-256", *flag])


# ---------------------------------------------------------------- answers are kept


def test_an_answer_is_kept_by_experiment_slice_and_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path))
    monkeypatch.setattr(process.importlib.metadata, "version", lambda name: "1")
    answer = "import sys; sys.stdin.read(); print('noise'); print('{\"fits\": true}')"
    real = process.subprocess.Popen
    monkeypatch.setattr(
        process.subprocess, "Popen", lambda args, **more: real([args[0], "-c", answer], **more)
    )

    def starts(experiment, target=V5E, save=""):
        with Compilation(experiment, target, save) as compilation:
            started = compilation._process is not None
            assert compilation.result()[:2] == (0, {"fits": True})
            return started

    assert starts(gpt()) and not starts(gpt())
    assert starts(gpt(), save="x") and starts(gpt(rows=64)) and starts(gpt(), parse_slice("v5e-8"))
    other = gpt()
    other.log.every = 7  # no part of the step
    assert not starts(other)
    monkeypatch.setattr(process.importlib.metadata, "version", lambda name: "2")
    assert starts(gpt())


def test_a_compiler_that_is_stopped_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path))
    monkeypatch.setattr(process.importlib.metadata, "version", lambda name: "1")
    real = process.subprocess.Popen
    monkeypatch.setattr(
        process.subprocess, "Popen",
        lambda args, **more: real([args[0], "-c", "import time; time.sleep(60)"], **more),
    )  # fmt: skip
    with Compilation(gpt(), V5E) as compilation:
        assert compilation.running()
    assert not compilation.running() and not list(tmp_path.rglob("*.json"))


def test_found_to_json_is_plain(fake):
    found = search.search(gpt(), V5E, keep=2, budget=60, jobs=1)
    assert isinstance(found, Found) and json.dumps(found.to_json(gpt()))
