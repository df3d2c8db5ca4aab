"""Names of TPU slices; with libtpu, the devices it describes for them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sharding import topology
from sharding.errors import UsageError
from sharding.hardware import CHIPS
from sharding.topology import FAMILIES, GPUS, HOST, Slice, parse_slice, program_bytes

ROOT = Path(__file__).resolve().parents[2]


# Memory that the compiler lets a program use, in GiB, as its own refusals state it.
COMPILER_GIB = {"v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_program_may_use_nearly_all_of_the_memory(name):
    """A table whose figure is too small refuses what fits; one too large plans what does not."""
    usable = program_bytes(name)
    assert usable == COMPILER_GIB[name] * 2**30
    assert 0.95 * CHIPS[name].hbm_bytes < usable < 1.01 * CHIPS[name].hbm_bytes


@pytest.mark.parametrize(
    ("name", "chip", "shape", "chips", "devices"),
    [
        ("v5e-1", "v5e", (1, 1), 1, 1),
        ("v5e-256", "v5e", (16, 16), 256, 256),
        ("v5litepod-16", "v5e", (4, 4), 16, 16),
        ("V6E-16", "v6e", (4, 4), 16, 16),
        ("v4-8", "v4", (2, 2, 1), 4, 4),
        ("v5p-128", "v5p", (4, 4, 4), 64, 64),
        ("v5p:4x4x12", "v5p", (4, 4, 12), 192, 192),
        ("tpu7x-128", "tpu7x", (4, 4, 4), 64, 128),
        ("v7x-8", "tpu7x", (2, 2, 1), 4, 8),
        ("4xv5e-256", "v5e", (16, 16), 1024, 1024),
        ("8xH200", "h200", (8,), 8, 8),
        ("1xb200", "b200", (1,), 1, 1),
        ("4x8xh100", "h100", (8,), 32, 32),
        ("8xA100", "a100-80", (8,), 8, 8),
        ("2x4xA100-40GB", "a100-40", (4,), 8, 8),
    ],
)
def test_names(name, chip, shape, chips, devices):
    target = parse_slice(name)
    assert (target.chip, target.shape) == (chip, shape)
    assert (target.chips, target.devices) == (chips, devices)


def test_every_standard_slice_has_a_name_that_reads_back():
    for chip, family in FAMILIES.items():
        # A datasheet rounds: 95 GB of v5p are 96 GiB, of which programs get 95.7.
        assert family.compiler_bytes < 1.01 * CHIPS[chip].hbm_bytes
        names = set()
        for shape in family.shapes:
            for count in (1, 2):
                target = Slice(chip, shape, count)
                assert parse_slice(target.name) == target
                names.add(target.name)
        assert len(names) == 2 * len(family.shapes)
    odd = Slice("v5p", (4, 4, 12))
    assert parse_slice(odd.name) == odd


def test_every_gpu_has_a_name_that_reads_back():
    for gpu in GPUS:
        for count in range(1, HOST + 1):
            for hosts in (1, 2, 16):
                assert parse_slice(Slice(gpu, (count,), hosts).name) == Slice(gpu, (count,), hosts)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("v5e-64", (False, False, False)),
        ("v5e-128", (False, True, False)),
        ("v5e-256", (True, True, False)),
        ("v6e-256", (True, True, False)),
        ("v5p-64", (False, False, False)),  # 2x4x4 is not made of whole cubes
        ("v5p-128", (True, True, True)),
        ("tpu7x:4x8x12", (True, True, True)),
    ],
)
def test_wraparound(name, wrap):
    assert parse_slice(name).wrap == wrap


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("v5f-256", r"v4, v5e, v5p, v6e, tpu7x.*did you mean `v5p`"),
        ("8xh300", r"a chip of v4.*one of a100-40, a100-80, h100, h200, b200.*mean `h200`"),
        ("8xa100-60", "one of a100-40, a100-80.*mean `a100`"),
        ("16xH100", r"no GPUs '16xH100': a host has 1 to 8, as 8xH100; two are 2x8xH100"),
        ("H100", "a host has 1 to 8"),
        ("0x8xh200", "a host has 1 to 8"),
        ("2x0xh200", "a host has 1 to 8"),
        ("8xh200:2x4", "a host has 1 to 8"),
        ("2x4xv5e-16", "no TPU slice '2x4xv5e-16'"),
        ("", "a chip of v4"),
        ("v5e-200", r"did you mean `v5e-256`\? The number counts chips: v5e-1, v5e-4"),
        ("v5e-0", "did you mean `v5e-1`"),
        ("v5p-100", r"did you mean `v5p-128`\? The number counts TensorCores"),
        ("v5e", "v5e comes as v5e-1"),
        ("0xv5e-4", "v5e comes as v5e-1"),
        ("v5e:4x4x4", "has 2 torus dimensions, as v5e:4x4"),
        ("v5p:4x4", "has 3 torus dimensions"),
        ("v5e:0x4", "torus dimensions"),
    ],
)
def test_mistakes(name, match):
    with pytest.raises(UsageError, match=match):
        parse_slice(name)


def test_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[aot\]'"):
        topology.require_libtpu()


@pytest.mark.tpu_compile
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_describes_every_standard_slice():
    """In a process of its own: a test process must not hold libtpu's lock."""
    names = [Slice(chip, shape).name for chip, f in FAMILIES.items() for shape in f.shapes]
    names += ["2xv5e-16", "v5p:4x4x12", "v5e:3x5"]
    program = """
import json, os, sys
from sharding.topology import *
os.environ.update(compiler_environment())
answers = {}
for name in json.loads(sys.argv[1]):
    try:
        devices = slice_devices(parse_slice(name))
        answers[name] = [len(devices), devices[0].device_kind]
    except UsageError as error:
        answers[name] = str(error)
print(json.dumps(answers))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(names)],
        capture_output=True, text=True, timeout=120, check=True, cwd=ROOT,
    )  # fmt: skip
    answers = json.loads(done.stdout)
    assert "libtpu cannot describe v5e:3x5" in answers.pop("v5e:3x5")
    for name, (count, kind) in answers.items():
        target = parse_slice(name)
        assert count == target.devices, name
        assert kind in CHIPS[target.chip].kinds, name
