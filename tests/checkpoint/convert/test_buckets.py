"""`torus convert`, `inspect`, `verify` and `diff` on gs:// (a stand-in) and s3:// (moto)."""

import dataclasses
import json

import pytest

from checkpoint import objects
from checkpoint.convert.safetensors import Tensors
from checkpoint.objects import ObjectPath
from tests.buckets import google
from tests.checkpoint.convert.folders import (
    random_folder,
    random_tensors,
    read_folder,
    same,
    tiny,
    write_folder,
)
from tests.checkpoint.convert.fuzz import _write_orbax
from tests.trainer.data.emulator import Emulator
from trainer.commands.main import main

PRESET = "qwen3-8b"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder, and the run that it becomes."""
    folder = tmp_path_factory.mktemp("model")
    random_folder(folder / "hf", PRESET)
    (folder / "hf/tokenizer.json").write_text("{}")
    assert main(["convert", f"{folder}/hf", f"torus:{folder}/start"]) == 0
    return folder


@pytest.fixture
def gs(monkeypatch, tmp_path):
    with google() as store:
        store.buckets["bucket"] = {}
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        monkeypatch.setenv("TORUS_CACHE", str(tmp_path / "cache"))
        yield store


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3")
    (folder / "served").mkdir()
    server = Emulator(folder / "served", folder / "log")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def url(request, monkeypatch, tmp_path):
    """The address of an empty bucket of either kind."""
    if request.param == "gs":
        request.getfixturevalue("gs")
    else:
        for name, value in request.getfixturevalue("emulator").environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORUS_CACHE", str(tmp_path / "cache"))
    return f"{request.param}://bucket"


def fetch(url, folder):
    source = ObjectPath.parse(url)
    for name in source.below():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def facts(capsys, *arguments):
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("url", ["gs", "s3"], indirect=True)
def test_there_and_back(url, model, tmp_path, capsys):
    """Both ways with source and target in a bucket, and back from there to the disk."""
    assert main(["convert", f"{model}/hf", f"hf:{url}/nothing"]) == 2  # one has to be ours
    assert main(["convert", f"{model}/hf", f"torus:{url}/start"]) == 0
    assert not any((tmp_path / "cache/converting").iterdir())
    there, here = (facts(capsys, "inspect", f"{place}/start") for place in (url, model))
    assert {n for n in here if here[n] != there[n]} <= {"path", "saved", "manifest"}
    assert main(["verify", f"{url}/start"]) == 0
    assert "all as saved" in capsys.readouterr().out
    assert main(["diff", f"{url}/start", f"{model}/start"]) == 0

    assert main(["convert", f"{url}/start", f"hf:{url}/out", "--shard-size", "5e-6"]) == 0
    out = fetch(f"{url}/out", tmp_path / "out")
    assert len(list(out.glob("*.safetensors"))) > 2 and (out / "tokenizer.json").exists()
    assert same(read_folder(out), read_folder(model / "hf"))
    assert main(["diff", f"{url}/out", f"{model}/hf"]) == 0
    assert main(["convert", f"hf:{url}/out", f"{tmp_path}/again"]) == 0
    assert main(["diff", f"{tmp_path}/again", f"{url}/start"]) == 0


def test_what_a_restore_reads_beside_the_values_is_verified_in_a_bucket(gs, model, capsys):
    """The stand-in holds what Orbax alone reads; a name that leads out of the step is refused."""
    step = "start/checkpoints/0/"
    gs.fill("bucket", model)
    (target := gs.buckets["bucket"])[step + "commit_success.txt"] = b""
    assert main(["verify", "gs://bucket/start"]) == 0
    for name, other in (("state/_METADATA", b"{}"), ("_CHECKPOINT_METADATA", None)):
        before = target.pop(step + name)
        if other is not None:
            target[step + name] = other
        assert main(["verify", "gs://bucket/start"]) == 1, (name, other)
        assert "/tmp" not in capsys.readouterr().err
        target[step + name] = before
    target[step + "state/../../../../out"] = b"x"
    assert main(["verify", "gs://bucket/start"]) == 1
    assert "leads out of it" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("url", ["gs", "s3"], indirect=True)
def test_trees_of_orbax(url, packed, tmp_path, capsys):
    arrays = {n: a for n, a in random_tensors(*tiny(PRESET)).items() if "layers.0" in n}
    _write_orbax(tmp_path / "tree", "zarr3", arrays, packed=packed)
    name = f"{url}/tree{packed:d}"
    objects.send(tmp_path / "tree", ObjectPath.parse(name), "_METADATA", lambda _: None)
    assert (
        facts(capsys, "inspect", name)["arrays"]
        == facts(capsys, "inspect", f"orbax:{tmp_path}/tree")["arrays"]
    )
    assert main(["diff", f"orbax:{name}", f"{tmp_path}/tree"]) == 0


def test_no_more_is_read_than_is_needed(gs, tmp_path, capsys):
    family, model = tiny(PRESET)
    model = dataclasses.replace(model, vocab=20_000, width=256)
    folder = write_folder(tmp_path / "hf", family.write(model), random_tensors(family, model))
    gs.fill("bucket", tmp_path)
    name = "hf/model.safetensors"
    size = len(gs.buckets["bucket"][name])
    assert size > 40_000_000
    assert facts(capsys, "inspect", "gs://bucket/hf")["arrays"]
    assert gs.sent[name] < 20_000
    assert main(["convert", "gs://bucket/hf", f"{tmp_path}/start"]) == 0
    assert size < gs.sent[name] < 1.01 * size
    for place in (f"torus:{tmp_path}/start", f"hf:{folder}"):
        assert main(["inspect", place]) == 0


def test_a_store_is_asked_for_much_at_once(gs, model, tmp_path):
    gs.pause = 0.05
    for command in (
        ["convert", f"{model}/hf", "torus:gs://bucket/start"],
        ["convert", "gs://bucket/start", f"hf:{tmp_path}/out"],
        ["verify", "gs://bucket/start"],
    ):
        gs.most = 0
        assert main(command) == 0
        assert gs.most >= 4


def test_an_interrupted_sending_goes_on(gs, model, tmp_path, monkeypatch, capsys):
    command = ["convert", f"{model}/hf", "torus:gs://bucket/start"]
    write, room = ObjectPath.write_bytes, iter(range(5))

    def cut(self, content):
        if next(room, None) is None:
            raise KeyboardInterrupt
        write(self, content)

    monkeypatch.setattr(ObjectPath, "write_bytes", cut)
    assert main(command) == 130
    monkeypatch.setattr(ObjectPath, "write_bytes", write)
    first = set(gs.written)
    assert len(first) == 5 and "start/checkpoints/0/commit_success.txt" not in first
    for again in (["inspect", "gs://bucket/start"], ["convert", "gs://bucket/start", "out"]):
        assert main(again) == 2
        assert "is not all there" in capsys.readouterr().err
    gs.buckets["bucket"]["start/left.over"] = b"by a conversion of something else"
    assert main(command) == 0
    assert "converted before" in capsys.readouterr().out
    assert not first & set(gs.written[5:]) - {"start/.converting"}
    assert gs.written[-1] == "start/checkpoints/0/commit_success.txt"
    assert not {"start/left.over", "start/.converting"} & set(gs.buckets["bucket"])
    assert main(["verify", "gs://bucket/start"]) == 0
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_was_sent_is_read_back(gs, model, monkeypatch, capsys):
    write = ObjectPath.write_bytes
    monkeypatch.setattr(ObjectPath, "write_bytes", lambda p, data: write(p, data[:-1] + b"?"))
    assert main(["convert", f"{model}/start", "hf:gs://bucket/out"]) == 5
    assert "is not what was sent there" in capsys.readouterr().err
    assert main(["inspect", "gs://bucket/out"]) == 2


def test_damage_is_told(gs, model, tmp_path, monkeypatch, capsys):
    gs.fill("bucket", model)
    gs.buckets["bucket"]["start/checkpoints/0/commit_success.txt"] = b""
    stored = gs.buckets["bucket"]
    name = max((n for n in stored if "/d/" in n), key=lambda n: len(stored[n]))
    data = bytearray(stored[name])
    data[len(data) // 2] ^= 1
    stored[name] = bytes(data)
    assert main(["verify", "gs://bucket/start"]) == 1
    assert "are not the bits that were saved" in capsys.readouterr().err

    for change in (lambda d: d[:-1], lambda d: d + b"x", lambda d: d[:7], lambda d: b""):
        stored["cut/config.json"] = stored["hf/config.json"]
        stored["cut/model.safetensors"] = change(stored["hf/model.safetensors"])
        assert main(["inspect", "gs://bucket/cut"]) == 4
        assert "truncated" in capsys.readouterr().err
    read = Tensors.read

    def vanishing(self, *rows):
        stored.pop("hf/model.safetensors", None)
        return read(self, *rows)

    monkeypatch.setattr(Tensors, "read", vanishing)
    assert main(["convert", "gs://bucket/hf", f"torus:{tmp_path}/gone"]) == 4
    assert "or is gone" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()


def test_refusals(gs, model, tmp_path, capsys):
    gs.fill("bucket", model)

    def refused(status, *arguments):
        assert main([*map(str, arguments)]) == status
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1
        return told[0]

    written = list(gs.buckets["bucket"])
    assert "no such bucket, or nothing by" in refused(5, "inspect", "gs://nobody/start")
    assert "choose gs://BUCKET/FOLDER" in refused(2, "inspect", "ftp://host/x")
    assert "in buckets hf, torus, orbax are read" in refused(2, "diff", "dcp:gs://bucket/hf", "x")
    start, hf = model / "start", "gs://bucket/hf"
    assert "dcp is not written to buckets" in refused(2, "convert", start, "dcp:gs://bucket/out")
    assert "exists already" in refused(2, "convert", start, f"hf:{hf}")
    assert "this needs --max-memory 1" in refused(
        2, "convert", start, "gs://bucket/out", "--max-memory", "0.5", "--shard-size", "0.0003"
    )
    gs.refuse = 403
    assert "access refused" in refused(5, "verify", "gs://bucket/start")
    gs.refuse = 401
    assert "are credentials set?" in refused(5, "convert", hf, tmp_path / "out")
    assert list(gs.buckets["bucket"]) == written and not (tmp_path / "out").exists()


def test_no_such_bucket_of_s3(emulator, monkeypatch, capsys):
    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    assert main(["inspect", "s3://nobody/start"]) == 5
    assert "there is no bucket s3://nobody" in capsys.readouterr().err
