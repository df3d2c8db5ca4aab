"""Small files from elsewhere: read whole, or refused at once with the reason."""

import json
import os
import time

import pytest

from checkpoint import files
from checkpoint.convert.folders import inside
from sharding.errors import MismatchError, UnsafeInputError
from trainer.data.manifest import read_manifest
from trainer.metrics import all_records
from trainer.report import load_run
from trainer.run import read_experiment


def pipe(path):
    os.mkfifo(path)


def link(target):
    return lambda path: path.symlink_to(target)


def nothing(path):
    path.touch()
    os.truncate(path, 6 * 10**9)


ODD = {
    "pipe": (pipe, "is not a regular file"),
    "folder": (lambda path: path.mkdir(), "is not a regular file"),
    "device": (link("/dev/zero"), "is not a regular file"),
    "loop": (lambda path: path.symlink_to(path), "a link to itself"),
    "6 GB of nothing": (nothing, "is larger than"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_small_file(name, tmp_path):
    make, message = ODD[name]
    path = tmp_path / "x.json"
    make(path)
    start = time.monotonic()
    for read in (files.read_bytes, files.read_text, files.read_json):
        with pytest.raises(UnsafeInputError, match=message):
            read(path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[]", "is not a JSON object"),
        (b'{"a": 1, "a": 2}', "a name is there twice"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "deeper than 64 levels"),
        (b'{"a":' * 10**6, "is not JSON"),
        (b'{"a":' + b"[" * 10**5, "is not JSON"),
        (b'{"a":[' + b"[]," * (files.VALUES // 2) + b"0]}", "at most 4,194,304 values"),
        (b'{"a":' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_json_that_is_refused(data, message):
    with pytest.raises(UnsafeInputError, match=f"file .*{message}"):
        files.parse_json(data, "file")


def test_json_that_is_read(tmp_path):
    deep = b'{"a":' * 63 + b"1" + b"}" * 63
    assert files.parse_json(deep, "x") == json.loads(deep)
    path = tmp_path / "x"
    path.write_text('{"a": "\\ud83d\\ude00 \u00e9"}')
    assert files.read_json(path) == {"a": "\U0001f600 \u00e9"}
    with pytest.raises(UnsafeInputError, match="larger than 5 bytes"):
        files.read_json(path, 5)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "absent")


@pytest.mark.parametrize("name", ["a" * 256, "é" * 128, "a\ud800", "\ud83d", "../a", "a\0", ".."])
def test_a_name_that_no_file_has(name, tmp_path):
    with pytest.raises(UnsafeInputError, match="outside of itself") as caught:
        inside(tmp_path, name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
    with pytest.raises(MismatchError, match="has no a"):
        inside(tmp_path, "a" * 255)


def test_lines_that_are_too_long_are_skipped(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"a\nb" * 2 + b"\n" + b"x" * (3 * files.LINE) + b"\nc\n\nd")
    assert list(files.read_lines(path)) == [b"a", b"ba", b"b", b"c", b"", b"d"]


def run_with(tmp_path, name, make):
    run = tmp_path / "run"
    run.mkdir()
    make(run / name)
    return run


@pytest.mark.parametrize("name", ["pipe", pytest.param("6 GB of nothing", marks=pytest.mark.soak)])
def test_odd_files_in_a_run_and_in_a_dataset(name, tmp_path):
    make, message = ODD[name]
    run = run_with(tmp_path, "experiment.json", make)
    for read in (read_experiment, load_run):
        with pytest.raises(ValueError, match=message):
            read(run)
    make(run / "manifest.json")
    with pytest.raises(ValueError, match=message):
        read_manifest(run)
    make(run / "metrics.jsonl")
    if name == "pipe":
        with pytest.raises(UnsafeInputError, match=message):
            all_records(run)
    else:
        assert all_records(run) == []


def test_deep_and_torn_lines_of_metrics_are_left_out(tmp_path):
    line = json.dumps({"kind": "train", "step": 1, "time": 1.0}).encode()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([b"[" * 10**5, line, b"\xff", b'{"a":']))
    assert [record["step"] for record in all_records(tmp_path)] == [1]
