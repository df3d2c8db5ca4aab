"""Stored plans: each follows from today's code, and what does not is noticed. Compiles nothing."""

import copy
import dataclasses
import json

import pytest

from sharding import hardware
from sharding.topology import parse_slice
from tests.benchmarks.plans import PAGE, SLICES, table
from tests.configs.test_golden import REFERENCES
from trainer.commands import plan as command
from trainer.plan import cost, stored
from trainer.plan.stored import changes, stale

PLANS = stored.stored()
ONE = PLANS[min(PLANS, key=lambda key: PLANS[key]["parameters"])]


@pytest.mark.parametrize("key", list(PLANS), ids=" ".join)
def test_a_stored_plan_follows_from_the_code(key):
    """After an intended change: `make plans`."""
    assert stale(PLANS[key]) == []
    assert key[1] in SLICES[key[0]]
    path = stored.path_of(*key)
    assert path.stat().st_size < 6000 and json.loads(path.read_text()) == PLANS[key]


def test_every_shipped_config_has_two_slices():
    assert set(SLICES) == set(REFERENCES)
    for first, second in SLICES.values():
        assert parse_slice(first) != parse_slice(second)


def test_the_page_shows_the_files():
    assert table() in PAGE.read_text(), "run make plans"
    assert table().count("\n") == 1 + sum(map(len, SLICES.values()))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("digest", "0", "the config is another one"),
        ("remat", "residual", "remat: residual → "),
        ("barriers", True, "barriers: True → False"),
        ("options", {"xla_x": "1"}, "options: "),
        ("parameters", 7, "parameters: 7 → "),
        ("mesh", {"data": 2, "fsdp": 2, "seq": 1, "tensor": 1}, "mesh: "),
        ("tokens_per_second", 1.0, "tokens per second: 1 → "),
    ],
)
def test_what_no_longer_follows_is_named(field, value, match):
    plan = copy.deepcopy(ONE)
    plan[field] = value
    assert any(match in line for line in stale(plan)), stale(plan)


@pytest.mark.parametrize(
    ("rate", "factor", "label"),
    [
        ("hbm_bandwidth", 2, "elementwise"),
        ("flops_bf16", 0.1, "matmul"),
        ("ici_bandwidth", 0.1, "over"),
    ],
)
def test_another_rate_is_noticed(rate, factor, label, monkeypatch):
    chip = hardware.CHIPS[parse_slice(ONE["slice"]).chip]
    other = dataclasses.replace(chip, **{rate: factor * getattr(chip, rate)})
    monkeypatch.setitem(hardware.CHIPS, chip.name, other)
    assert any(label in line for line in stale(ONE))


def test_links_that_reach_less_are_noticed(monkeypatch):
    monkeypatch.setattr(cost, "LINK_SHARE", 0.3)
    assert any(" over " in line for line in stale(ONE))


def compiled(plan):
    """A plan as the compiler would answer it, of a summary."""
    names = ("seconds", "shares", "work", "mfu", "tokens_per_second", "executed_flops", "holders")
    answer = copy.deepcopy(plan)
    return {**answer, "forecast": {name: answer[name] for name in names}}


def test_a_new_compilation_is_compared():
    assert changes(ONE, compiled(ONE)) == []
    label = max((k for k in ONE["work"] if " over " in k), key=lambda k: sum(ONE["shares"][k]))
    for edit, match in (
        (lambda p: p.update(needed=int(1.03 * p["needed"])), "needed: "),
        (lambda p: p["forecast"]["seconds"].update(estimate=1e3), "estimate: "),
        (lambda p: p["forecast"].update(executed_flops=1.02 * ONE["executed_flops"]), "executed_"),
        (lambda p: p["forecast"]["work"].update({label: (0, 9e12)}), f"bytes of {label}: "),
        (lambda p: p.update(remat="residual"), "remat: "),
        (lambda p: p.update(forecast=None), "fits: another answer"),
    ):
        plan = compiled(ONE)
        edit(plan)
        assert any(match in line for line in changes(ONE, plan)), match
    slightly = compiled(ONE)
    slightly["needed"] = int(1.01 * slightly["needed"])
    assert changes(ONE, slightly) == []


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_checks(monkeypatch, capsys):
    monkeypatch.setattr(command, "require_libtpu", lambda: None)
    assert command.main(["--check"]) == 0
    assert f"{len(PLANS)} stored plans" in capsys.readouterr().out
    argv = [f"--config={ONE['config']}", f"--on={ONE['slice']}", "--check"]
    monkeypatch.setattr(command, "_compile", lambda *_: (0, compiled(ONE), ""))
    assert command.main(argv) == 0 and "as stored" in capsys.readouterr().out
    slower = compiled(ONE)
    slower["forecast"]["seconds"]["estimate"] *= 2
    monkeypatch.setattr(command, "_compile", lambda *_: (0, slower, ""))
    assert command.main(argv) == 1 and "estimate: " in capsys.readouterr().out
    with pytest.raises(command.UsageError, match=r"no plan of quickstart on v5e-256 is stored"):
        command.main(["--config=quickstart", "--on=v5e-256", "--check"])
