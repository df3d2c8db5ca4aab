"""A process that mutates whatever Torus reads from elsewhere, and reads it, within bounds.

    python -m tests.checkpoint.convert.fuzz FOLDER FIRST COUNT

Checkpoints of every format, the config.json of every family, runs with their steps, datasets and
tokenizers have their values, headers, pickles or bytes changed, or a file of theirs replaced by a
pipe, a link, a device or gigabytes of nothing. Case number n is the same in every run. The process
ends with status 1 and the case's number when reading raises what is not one of our errors, runs
what a file names, takes longer than SECONDS, or needs MEMORY more than the process had;
`FOLDER/case` names the case at work for whoever finds the process dead. No JAX.
"""

import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tarfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts

from checkpoint import manifest as steps
from checkpoint.convert import huggingface
from checkpoint.convert.families import FAMILIES, find_family
from checkpoint.convert.megatron import read_args
from checkpoint.convert.sources import open_source
from checkpoint.convert.torch_dcp import DcpWriter
from checkpoint.convert.torchfiles import KNOWN, write_torch
from checkpoint.steps import CheckpointError
from sharding.errors import UsageError
from tests.checkpoint.convert.folders import drawn, write_folder
from trainer.config import Experiment, to_json
from trainer.data.manifest import Manifest, Shard, read_manifest
from trainer.data.tokenizer import TokenizerSpec, open_tokenizer, train_bpe
from trainer.goodput import read_incidents
from trainer.metrics import read_metrics
from trainer.recovery.health import Rewinds
from trainer.report import load_run
from trainer.run import read_experiment

HERE = Path(__file__).parent
SECONDS, MEMORY, READ = 10, 2**30, 2**24  # seconds of the CPU; 6 times that of the clock
ORBAX = [("orbax_zarr", "zarr", False), ("orbax_zarr3", "zarr3", False),
         ("orbax_ocdbt", "zarr3", True)]  # fmt: skip
CODECS = {"zarr": {"compressor": {"id": "zstd", "level": 1}},
          "zarr3": {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}},
                               {"name": "zstd", "configuration": {"level": 3}}]}}  # fmt: skip
NUMBERS = [-1, 0, 1, 2, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64]
VALUES = [*NUMBERS, None, True, 1.5, 1e308, float("nan"), "", "..", "../../etc/passwd", "a" * 5000,
          "\0", "\ud800", "\x1b[2J\n", [], {}, [[]] * 9, {"a": {"b": [1]}}]  # fmt: skip
EXECUTION = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen",
             "socket.connect", "pickle.find_class")  # fmt: skip


# ---------------------------------------------------------------- what is mutated


def bases(folder: Path) -> dict[str, tuple[str, Path]]:
    """Writes a sound checkpoint of every format; returns name → (format, place)."""
    rng = np.random.default_rng(0)
    arrays = {
        "model.a.weight": rng.normal(size=(5, 4)).astype(np.float32), "b": np.arange(6),
        "c": rng.normal(size=3).astype(ml_dtypes.bfloat16), "d": np.array(2, np.int32),
    }  # fmt: skip
    for theirs in ("deepspeed_runs", "megatron_runs"):
        with tarfile.open(HERE / f"{theirs}.tar.xz") as file:
            file.extractall(folder, filter="data")
    with (folder / "x.pt").open("wb") as file:
        write_torch(file, {"model": arrays, "step": 3, "list": [arrays["b"], (1, "x")]})
    (folder / "dcp").mkdir()
    writer = DcpWriter(folder / "dcp", 3)
    for part in writer.parts.values():
        part.put("a.weight", (), arrays["model.a.weight"])
    writer.finish()
    del arrays["d"]
    write_folder(folder / "hf", {}, arrays)
    write_folder(folder / "hf_index", {}, arrays)
    index = {"weight_map": dict.fromkeys(arrays, "model.safetensors")}
    (folder / "hf_index" / huggingface.INDEX).write_text(json.dumps(index))
    (folder / "torch_index").mkdir()
    index = {"weight_map": {"model." + name: "x.bin" for name in arrays}}
    (folder / "torch_index/pytorch_model.bin.index.json").write_text(json.dumps(index))
    with (folder / "torch_index/x.bin").open("wb") as file:
        write_torch(file, {"model": arrays})
    configs = {}
    for name in set(FAMILIES) - {"mixtral"}:
        place = write_folder(folder / f"config_{name}", drawn(name, 0)[1], {})
        configs[f"config_{name}"] = "config", place / "config.json"
    _write_run(folder / "run")
    _write_data(folder / "data", folder / "tokenizer")
    (folder / "tree.msgpack").write_bytes(_packed({"params": arrays, "step": 3}))
    stream = b"".join(b"\x92\x92\xa6params\xa1" + name[:1].encode() + _bin(_packed(array))
                      for name, array in arrays.items())  # fmt: skip
    (folder / "stream").write_bytes(stream)
    for name, driver, packed in ORBAX:
        _write_orbax(folder / name, driver, arrays, packed=packed)
    found = {name: ("zero", folder / name) for name in ("zero1_world2", "zero3_world3")}
    found["ucp"] = "ucp", folder / "zero1_world2"
    found |= {f"megatron_{x}": ("megatron", folder / "llama" / x) for x in ("dist", "legacy")}
    found |= {name: ("orbax", folder / name) for name, _, _ in ORBAX}
    return found | configs | {
        "torch": ("torch", folder / "x.pt"), "dcp": ("dcp", folder / "dcp"),
        "hf": ("hf", folder / "hf"), "hf_index": ("hf", folder / "hf_index"),
        "torch_index": ("torch", folder / "torch_index"), "pickle": ("pickle", folder / "x.pt"),
        "run": ("run", folder / "run"), "data": ("data", folder / "data"),
        "tokenizer": ("tokenizer", folder / "tokenizer"),
        "msgpack": ("msgpack", folder / "tree.msgpack"),
        "stream": ("msgpack", folder / "stream"),
    }  # fmt: skip


def _bin(data: bytes) -> bytes:
    return b"\xc6" + struct.pack(">I", len(data)) + data


def _packed(value) -> bytes:
    """Returns values as Flax packs them."""
    if isinstance(value, dict):
        head = bytes([0x80 | len(value)])
        return head + b"".join(_packed(k) + _packed(v) for k, v in value.items())
    if isinstance(value, str):
        return b"\xd9" + bytes([len(value)]) + value.encode()
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    shape = bytes([0x90 | value.ndim]) + b"".join(map(_packed, value.shape))
    inner = b"\x93" + shape + _packed(value.dtype.name) + _bin(value.tobytes())
    return b"\xc9" + struct.pack(">Ib", len(inner), 1) + inner


def _write_orbax(folder: Path, driver: str, arrays: dict, *, packed: bool) -> None:
    """Writes arrays as Orbax lays them out, by tensorstore alone."""
    tree = {}
    for name, array in arrays.items():
        store = {"driver": "file", "path": f"{folder}/{name}/"}
        if packed:
            store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
        spec = {"driver": driver, "kvstore": store, "metadata": CODECS[driver]}
        ts.open(spec, create=True, dtype=array.dtype, shape=array.shape).result()[...] = array
        entry = {"key_metadata": [{"key": name}], "value_metadata": {"value_type": "jax.Array"}}
        tree[f"('{name}',)"] = entry
    facts = {"tree_metadata": tree, "use_zarr3": driver == "zarr3",
             "store_array_data_equal_to_fill_value": True}  # fmt: skip
    (folder / "_METADATA").write_text(json.dumps(facts))


def _write_run(folder: Path) -> None:
    """Writes a run with the JSON files of one step, and no arrays."""
    arrays = {"params.a": {"shape": [2], "dtype": "float32"}}
    facts = {
        "manifest": {"format": steps.FORMAT, "saved": "now", "arrays": arrays},
        "meta": {"step": 1, "source": {"format": "hf", "family": "llama", "config": {}}},
    }
    for name, content in facts.items():
        place = folder / "checkpoints/1" / name
        place.mkdir(parents=True)
        (place / "data.json").write_text(json.dumps(content))
    steps.write_record(folder / "checkpoints", 1, {"params.a": "00"})
    (folder / "experiment.json").write_text(to_json(Experiment(name="a")))
    (folder / "rewinds.json").write_text('{"count": 1, "spent": 0, "to": 0, "row": 0}')
    line = {"kind": "train", "step": 1, "time": 1.0, "loss": 2.0}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
    (folder / "incidents.jsonl").write_text('{"kind": "hang", "time": 1.0}\n')


def _write_data(folder: Path, tokenizer: Path) -> None:
    """Writes the manifest of a dataset, and a tokenizer."""
    trained = train_bpe(iter(["a text of a few words, and a few more"]), 300)
    tokenizer.mkdir()
    for name, content in trained.files().items():
        (tokenizer / name).write_bytes(content)
    spec = TokenizerSpec("bytes", 259, 256, 257, 258, "0" * 64)
    shard = Shard("train-0.bin", "train", 1, 2, 3, 4, "0" * 64, "0" * 64, 5)
    folder.mkdir()
    Manifest(spec, (shard,), complete=True).write(folder)


# ---------------------------------------------------------------- mutations


def replaced(path: Path, random: random.Random) -> None:
    """Puts something that is no sound file in a file's place; `restored` takes it away."""
    path.unlink()
    match random.randrange(9):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(path.name)
        case 2:
            path.symlink_to(random.choice(["/dev/zero", "/dev/null", "/dev/stdin", "/etc/passwd"]))
        case 3:
            path.mkdir()
        case 4:
            path.touch()
            os.truncate(path, random.choice([2**32, 6 * 10**9]))
        case 5:
            deep = random.choice([b'{"a":', b"["])
            path.write_bytes(deep * random.choice([100, 2000, 10**6]))
        case 6:
            path.write_bytes(b'{"a":[' + random.choice([b"{},", b"[],", b'"",']) * 2**22 + b"0]}")
        case 7:
            path.write_bytes(random.choice([b"\xff\xfe", b"\x80", b"\0" * 2**16, b""]))
        case _:
            size = random.choice([2**26, 100 * 2**20])
            path.write_bytes(struct.pack("<Q", size) + b'{"a":')
            os.truncate(path, size + 8)


def restored(path: Path, sound: bytes) -> None:
    """Puts a sound file back."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(sound)


def hostile_pickle(random: random.Random) -> bytes:
    """Returns a small pickle that would build much, call something, or end in the middle."""
    names = [*sorted(KNOWN), "os.system", "builtins.eval", "builtins.exec", "runpy.run_path"]
    size = random.choice([10, 10**4, 16 * 2**20])
    out = [b"\x80\x02", b"B" + struct.pack("<I", size) + bytes(size) + b"r\0\0\0\0"]
    out += [b"(lr\1\0\0\0", b"]q\2" + b"(" + b"K\1" * random.choice([1, 10**5]) + b"e"]
    for _ in range(random.choice([3, 30, 400])):
        module, _, name = random.choice(names).rpartition(".")
        call = f"c{module}\n{name}\n".encode()
        out.append(random.choice([
            b"h\2h\2\x86q\2", b"h\0", call + b"h\0\x85R", call + b"h\2\x85R", call + b"h\2R",
            call + b")R", call + b"h\2h\2h\2\x87R", b"\x85" * random.choice([1, 1000]), b"}",
            b"}h\2h\2s", b"(h\2h\0h\2t", b"h\2Q", b"h\2b", b"0", b"\x8a\xff" + b"\x7f" * 255,
            call + b"h\0\x85\x81", b"]" * random.choice([1, 10**5]), b"h\2h\2a", b"N\x86q\2",
        ]))  # fmt: skip
    if random.random() < 0.2:
        out.append(b")" + b"\x85" * 10**6)
    return b"".join(out) + b"." * random.randrange(2)


def mutated(data: bytes, random: random.Random) -> bytes:
    """Returns a file with something changed: its values, its pickle, or its bytes."""
    if data[:1] == b"{" and random.random() < 0.7:
        try:
            return json.dumps(_other(json.loads(data), random)).encode()
        except ValueError:
            return _bytes(data, random)
    if data[:4] == b"PK\3\4" and random.random() < 0.7:
        return _archive(data, random)
    if data[8:9] == b"{" and random.random() < 0.7:  # safetensors
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.dumps(_other(json.loads(data[8:end]), random)).encode()
        return struct.pack("<Q", len(header)) + header + data[end:]
    return _bytes(data, random)


def _other(value, random: random.Random):
    """Returns a value of JSON with one inside of it replaced, dropped or renamed."""
    if random.random() < 0.1 or not isinstance(value, dict | list) or not value:
        return random.choice(VALUES)
    changed = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    key = random.choice(list(changed))
    if random.random() < 0.1:
        changed.pop(key)
    elif random.random() < 0.1:
        changed[random.choice(["", "..", "a/b", key])] = changed.pop(key)
    else:
        changed[key] = _other(changed[key], random)
    return changed if isinstance(value, dict) else list(changed.values())


def _archive(data: bytes, random: random.Random, pickled: bytes = b"") -> bytes:
    """Returns an archive of torch, its checksums sound, with one entry changed or its pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        pickle = next(name for name in names if name.endswith("data.pkl"))
        chosen = pickle if pickled or random.random() < 0.9 else random.choice(names)
        for name in names:
            entry = old.read(name)
            other = (pickled or _bytes(entry, random)) if name == chosen else entry
            new.writestr(name, other)
    return out.getvalue()


def _bytes(data: bytes, random: random.Random) -> bytes:
    changed = bytearray(data)
    near = min(len(data), random.choice([16, 256, 4096, len(data)]))  # headers more than data
    for _ in range(random.choice([1, 1, 1, 2, 8])):
        at = random.randrange(near + 1)
        match random.randrange(7):
            case 0:
                changed[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                changed[at : at + 1] = random.choice([b"\0", b"\x7f", b"\x80", b"\xff"])
            case 2:
                code = random.choice(["<I", ">I", "<Q", ">Q"])
                number = random.choice(NUMBERS) % 2 ** (8 * struct.calcsize(code))
                changed[at : at + struct.calcsize(code)] = struct.pack(code, number)
            case 3:
                del changed[at : at + random.choice([1, 4, 64])]
            case 4:
                changed[at:at] = random.randbytes(random.choice([1, 4, 64]))
            case 5:
                changed[at:at] = changed[at : at + random.choice([8, 64])] * random.choice([1, 99])
            case 6:
                del changed[at:]
    return bytes(changed)


# ---------------------------------------------------------------- cases


def read_all(kind: str, place: Path) -> None:
    """Opens a checkpoint and reads rows of every tensor, READ bytes of each at most."""
    if kind == "config":
        config = huggingface.read_config(place.parent)
        family = find_family(config.get("model_type"))
        assert family.read(family.write(model := family.read(config))) == model
        return
    if kind == "run":
        run = place / "checkpoints"
        readers = [lambda: steps.read_step(run, 1), lambda: steps.read_manifest(run, 1),
                   lambda: steps.source_of(steps.read_meta(run, 1)), lambda: read_metrics(place),
                   lambda: read_experiment(place), lambda: read_incidents(place),
                   lambda: Rewinds.read(place), lambda: load_run(place)]  # fmt: skip
        _each(readers)
        return
    if kind in ("data", "tokenizer"):
        read_manifest(place) if kind == "data" else open_tokenizer(str(place))
        return
    found = open_source("torch" if kind == "pickle" else kind, place)
    if found.described is not None:
        read_args(found.described)
    try:
        for name, (dtype, shape) in found.facts.items():
            rows = shape[0] if shape else 1
            row = max(1, int(np.prod(shape[1:], dtype=object)) * dtype.itemsize)
            found.read(name, (), 0, min(rows, max(1, READ // row)))
    finally:
        found.close()


def _each(readers: list) -> None:
    """Calls every one, the others after one that refuses; raises the last refusal."""
    refused = None
    for read in readers:
        try:
            read()
        except (UsageError, CheckpointError) as error:
            refused = error
    if refused:
        raise refused


def run_case(number: int, places: dict[str, tuple[str, Path]]) -> str:
    """Mutates one file, reads its checkpoint, puts the file back; returns how it ended."""
    chance = random.Random(number)
    kind = chance.choice(sorted({kind for kind, _ in places.values()}))
    name = chance.choice(sorted(name for name in places if places[name][0] == kind))
    place = places[name][1]
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    if kind == "zero":
        files = [p for p in files if "universal" not in str(p)]
    path = chance.choice([p for p in files if p.suffix != ".npz"])
    sound = path.read_bytes()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)  # other processes may have the CPUs
    try:
        if kind == "pickle":
            path.write_bytes(_archive(sound, chance, hostile_pickle(chance)))
        elif chance.random() < 0.15:
            replaced(path, chance)
        else:
            path.write_bytes(mutated(sound, chance))
        read_all(kind, place)
        return f"{name}: read"
    except (UsageError, CheckpointError) as error:
        assert len(str(error)) < 5000, f"a message of {len(str(error)):,} letters"
        return f"{name}: refused"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        restored(path, sound)


def _no_execution(event: str, arguments: tuple) -> None:
    if event in EXECUTION:
        raise AssertionError(f"{event} with {arguments}")


def _late(*_) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    places = bases(folder / "bases")
    for kind, place in places.values():  # every one of them is sound, and libraries are warm
        read_all(kind, place)
    status = Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) << 10 for line in status.splitlines() if "VmData" in line)
    # Of what can be written to: a file that is mapped to be read is no memory.
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
    for late in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(late, _late)
    sys.addaudithook(_no_execution)
    ends: Counter[str] = Counter()
    slowest = 0.0
    for number in range(first, first + count):
        (folder / "case").write_text(str(number))
        start = time.monotonic()
        try:
            ends[run_case(number, places)] += 1
        except BaseException:
            traceback.print_exc()
            print(f"case {number}", file=sys.stderr)
            return 1
        slowest = max(slowest, time.monotonic() - start)
    print(json.dumps({"ends": dict(sorted(ends.items())), "slowest": round(slowest, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
