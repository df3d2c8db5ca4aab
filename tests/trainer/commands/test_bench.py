"""`torus bench attention`: its table, its records, and what it refuses."""

import importlib.util
import json

import pytest

from sharding.errors import UsageError
from trainer.commands import bench


@pytest.fixture(autouse=True)
def no_global_state(monkeypatch):
    monkeypatch.setattr("sharding.runtime.start_runtime", lambda: None)


def test_table_of_backends_in_turns(capsys):
    assert bench.main(["attention", "--shape=1x40x4/2x8", "--mask=documents:4", "--rounds=1"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head == "1x40x4/2x8 bfloat16, documents:4"
    assert [line.split()[0] for line in (first, second)] == ["blockwise", "reference"]
    assert first.split()[3:5] == ["1.00", "x"]


def test_records_are_one_json_object_per_line(capsys):
    argv = ["--mask=causal,window:8", "--dtype=float32", "--backends=reference", "--json"]
    assert bench.main(["attention", "--shape=1x40x2x8", "--rounds=2", *argv]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record.pop("mask") for record in records] == ["causal", "window:8"]
    for record in records:
        assert record.pop("seconds") > 0 and record.pop("temp_bytes") > 0
        assert record == dict(shape="1x40x2x8", dtype="float32", backend="reference", ratio=1.0)


def test_a_backend_that_cannot_is_a_line_of_its_own(monkeypatch):
    monkeypatch.setattr("models.attention.dispatch.target", lambda: ("cuda", None))
    records = list(bench.measure("1x40x2x8", "chunk:8", "float32", ["cudnn", "reference"], 1))
    assert records[0] == {
        "backend": "cudnn",
        "refused": "it takes bfloat16 and float16, not float32",
    }
    assert records[1]["ratio"] == 1.0
    assert (
        bench._line(**records[0])
        == "  cudnn      cannot: it takes bfloat16 and float16, not float32"
    )


@pytest.mark.parametrize(
    ("message", "argument"),
    [
        ("write rows x tokens x heads x head size", "--shape=1x512x4"),
        ("KV heads, which must divide the heads", "--shape=1x512x4/3x64"),
        ("each above 0", "--shape=0x512x4x64"),
        ("no `windw`; .*; did you mean `window`", "--mask=windw:4"),
        ("--mask window: write window:256", "--mask=window"),
        ("--mask chunk:0: write chunk:256", "--mask=chunk:0"),
        ("--mask causal:3: write causal$", "--mask=causal:3"),
        ("documents:3: does not divide 1024 tokens", "--mask=documents:3"),
        (
            "--dtype: no `bfloat`; choose from bfloat16, .*; did you mean `bfloat16`",
            "--dtype=bfloat",
        ),
        ("--rounds 0: at least 1", "--rounds=0"),
        ("no `blockwize`; choose from blockwise, ref.*; did you mean", "--backends=blockwize"),
        ("on this device: no `triton`; choose from blockwise, reference", "--backends=triton"),
        ("--on: no `v5`; .*; did you mean `v5p`", "--on=v5"),
        ("does not take `--masks`; did you mean `--mask`", "--masks"),
    ],
)
def test_refusals(message, argument):
    with pytest.raises(UsageError, match=message):
        bench.main(["attention", argument])


@pytest.mark.parametrize(
    ("message", "argument"),
    [
        ("--on: `all` is not estimated, but causal", "--mask=all"),
        ("--on: estimated are the Pallas kernels in bfloat16", "--dtype=float32"),
        ("--on: estimated are the Pallas kernels in bfloat16", "--backends=reference"),
    ],
)
def test_what_an_absent_chip_is_not_asked(message, argument):
    with pytest.raises(UsageError, match=message):
        bench.main(["attention", "--on=v5e", argument])


@pytest.mark.soak  # half a minute of compiling
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_an_absent_chip_is_estimated(capfd):
    argv = ["--on=v5e", "--shape=1x1024x2/1x128", "--mask=documents:4", "--json"]
    assert bench.main(["attention", *argv]) == 0
    record = json.loads(capfd.readouterr().out)
    assert set(record["seconds"]) == {"forward", "backward"}
    assert all(1e-7 < seconds < 1e-3 for seconds in record["seconds"].values())
    assert all(0.05 < share <= 1 for share in record["share_of_peak"].values())


def test_unknown_benchmark():
    with pytest.raises(UsageError, match=r"no `attentoin`; .* did you mean `attention`"):
        bench.main(["attentoin"])
