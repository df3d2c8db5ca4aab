"""Files that are damaged or built to do harm: refused with status 4, with nothing written."""

import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.convert import huggingface
from checkpoint.convert.safetensors import read_header
from sharding.errors import UnsafeInputError
from tests.checkpoint.convert.folders import random_folder
from trainer.commands.main import main


@pytest.fixture
def folder(tmp_path):
    return random_folder(tmp_path / "hf", "llama3.2-1b")


def header_of(path: Path) -> dict:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def with_header(path: Path, header, *, length=None) -> None:
    """Replaces the header and keeps the data."""
    data = path.read_bytes()
    (old,) = struct.unpack("<Q", data[:8])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text + data[8 + old :])


def edited(**changes):
    """Returns a change of the entry of one tensor."""

    def change(path: Path) -> None:
        header = header_of(path)
        header["model.norm.weight"] |= changes
        with_header(path, header)

    return change


def overlapping(path: Path) -> None:
    header = header_of(path)
    (a, b) = [n for n in header if n.endswith("input_layernorm.weight")]
    header[a]["data_offsets"] = header[b]["data_offsets"]
    with_header(path, header)


FILES = {
    "empty": lambda p: p.write_bytes(b""),
    "wrong magic": lambda p: p.write_bytes(b"PK\3\4" + p.read_bytes()),
    "a pickle": lambda p: p.write_bytes(b"\x80\x02}q\x00." + bytes(100)),
    "header of 2**63 bytes": lambda p: with_header(p, header_of(p), length=2**63),
    "header of 4 GB": lambda p: with_header(p, header_of(p), length=2**32),
    "header of nothing": lambda p: with_header(p, b"", length=0),
    "header is a list": lambda p: with_header(p, b"[]"),
    "header is no JSON": lambda p: with_header(p, b"{]" * 40),
    "header is deep": lambda p: with_header(p, b'{"a":' + b"[" * 200_000 + b"}"),
    "header has a name twice": lambda p: with_header(p, b'{"a":1,"a":2}'),
    "header is not UTF-8": lambda p: with_header(p, b"\xff" * 64),
    "entry is a number": lambda p: with_header(p, {"model.norm.weight": 1}),
    "header of 100 MB": lambda p: with_header(p, b'{"a":' + b" " * (100 * 10**6)),
    "header of ten million objects": lambda p: with_header(p, b'{"a":[' + b"{}," * 10**7 + b"0]}"),
    "a name of 5,000 letters": lambda p: with_header(
        p, {"a" * 5000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    ),
    "a name that is half of a letter": lambda p: with_header(
        p, b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    ),
    "huge shape": edited(shape=[2**62, 2**62]),
    "negative shape": edited(shape=[-6]),
    "boolean shape": edited(shape=[True]),
    "shape that is a number of 5,000 digits": lambda p: with_header(
        p, b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'
    ),
    "shape of 1,000 axes": edited(shape=[1] * 1000),
    "unknown dtype": edited(dtype="F5"),
    "offsets beyond the file": edited(data_offsets=[0, 2**50]),
    "offsets backwards": edited(data_offsets=[24, 0]),
    "one offset": edited(data_offsets=[0]),
    "an extra key": edited(more=1),
    "overlap": overlapping,
    "truncated data": lambda p: os.truncate(p, p.stat().st_size - 1),
    "truncated header": lambda p: os.truncate(p, 40),
    "trailing bytes": lambda p: p.write_bytes(p.read_bytes() + b"x"),
}


def refused(folder, capsys) -> str:
    """Asserts that conversion ends with status 4 and one line, at once and without a trace."""
    parent = folder.parent
    before = sorted(p.name for p in parent.iterdir())
    start = time.monotonic()
    assert main(["convert", str(folder), f"torus:{parent}/start"]) == 4
    assert time.monotonic() - start < 5
    assert sorted(p.name for p in parent.iterdir()) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 1000
    return error


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(name, folder, capsys):
    FILES[name](folder / "model.safetensors")
    assert "model.safetensors" in refused(folder, capsys)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "x\0y"]
)
def test_an_index_that_leads_out_of_the_folder(name, folder, capsys):
    (folder.parent / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "outside of itself" in refused(folder, capsys)


@pytest.mark.parametrize("index", [b"[]", b"{}", b'{"weight_map": 1}', b'{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(index, folder, capsys):
    (folder / huggingface.INDEX).write_bytes(index)
    assert "index" in refused(folder, capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder(name, folder, capsys):
    target = folder.parent / "secret"
    if (folder / name).exists():
        (folder / name).rename(target)
    else:
        target.write_text("{}")
    (folder / name).symlink_to(target)
    assert "link out of its folder" in refused(folder, capsys)


def odd_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def odd_loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path)


def odd_nothing(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, 6 * 10**9)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("make", [odd_pipe, odd_loop, odd_nothing])
def test_what_is_no_file_in_a_folder(make, name, folder, capsys):
    if make is odd_loop and name == "tokenizer.json":
        pytest.skip("what does not exist for the system is not copied")
    make(folder / name)
    assert name in refused(folder, capsys)


def test_tensors_of_other_dtypes_are_no_damage(folder, capsys):
    edited(dtype="U32")(folder / "model.safetensors")
    assert main(["convert", str(folder), f"torus:{folder.parent}/start"]) == 3
    assert "`model.norm.weight` is uint32; only" in capsys.readouterr().err
    edited(dtype="F4")(folder / "model.safetensors")
    assert main(["convert", str(folder), f"torus:{folder.parent}/start"]) == 3
    assert "has dtype F4; only F64" in capsys.readouterr().err


def test_the_links_of_the_hub_cache_are_followed(folder):
    root = folder.parent / "models--x"
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for path in folder.iterdir():
        path.rename(root / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert main(["convert", str(snapshot), f"torus:{folder.parent}/start"]) == 0


@pytest.mark.parametrize("config", [b"[]", b"{", b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_a_config_that_is_no_object(config, folder, capsys):
    (folder / "config.json").write_bytes(config)
    assert "config.json" in refused(folder, capsys)


def test_a_file_that_shrinks_while_it_is_read(folder):
    from checkpoint.convert.safetensors import Tensors

    stored = read_header(folder / "model.safetensors")[0]
    tensors = Tensors(stored)
    last = max(stored, key=lambda name: stored[name].offset)
    os.truncate(folder / "model.safetensors", stored[last].offset + 1)
    with pytest.raises(UnsafeInputError, match=f"ends inside `{last}`"):
        tensors.read(last, (), 0, stored[last].shape[0])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["F32", "BF16", "dtype", "shape", "data_offsets"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


@settings(
    max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(header=st.dictionaries(st.text(max_size=5), VALUES, max_size=4), data=st.binary(max_size=64),
       length=st.none() | st.integers(0, 2**64 - 1))  # fmt: skip
def test_any_header_is_read_or_refused(header, data, length, tmp_path):
    path = tmp_path / "fuzz.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    try:
        tensors, _ = read_header(path)
    except UnsafeInputError:
        return
    assert sum(t.nbytes for t in tensors.values()) == len(data)


@settings(
    max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_any_flipped_byte_of_a_header_is_harmless(place, byte, folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    data[place % (8 + length)] = byte
    other = folder / "flipped.safetensors"
    other.write_bytes(data)
    try:
        tensors, _ = read_header(other)
    except UnsafeInputError:
        return
    end = max(t.offset + t.nbytes for t in tensors.values())
    assert end == len(data)


def test_the_reference_library_agrees(folder):
    library = pytest.importorskip("safetensors.numpy")
    found = library.load_file(folder / "model.safetensors")
    stored = read_header(folder / "model.safetensors")[0]
    assert {n: a.shape for n, a in found.items()} == {n: t.shape for n, t in stored.items()}
    assert all(np.dtype(a.dtype) == stored[n].dtype for n, a in found.items())
