"""A process that mutates checkpoints of every format and reads them, within bounds.

    python -m tests.checkpoint.convert.fuzz FOLDER FIRST COUNT

Case number n is the same in every run. It ends with status 1 and the case's number when reading
raises what is not one of our errors, takes longer than SECONDS, or needs MEMORY more than the
process had; `FOLDER/case` names the case at work for whoever finds the process dead. No JAX.
"""

import io
import json
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

from checkpoint.convert.families import FAMILIES
from checkpoint.convert.megatron import read_args
from checkpoint.convert.sources import open_source
from checkpoint.convert.torch_dcp import DcpWriter
from checkpoint.convert.torchfiles import write_torch
from models.presets import PRESETS
from sharding.errors import UsageError
from tests.checkpoint.convert.folders import write_folder

HERE = Path(__file__).parent
SECONDS, MEMORY, READ = 10, 2**30, 2**24
ORBAX = [("orbax_zarr", "zarr", False), ("orbax_zarr3", "zarr3", False),
         ("orbax_ocdbt", "zarr3", True)]  # fmt: skip
CODECS = {"zarr": {"compressor": {"id": "zstd", "level": 1}},
          "zarr3": {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}},
                               {"name": "zstd", "configuration": {"level": 3}}]}}  # fmt: skip
NUMBERS = [-1, 0, 1, 2, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64]
VALUES = [*NUMBERS, None, True, 1.5, 1e308, float("nan"), "", "..", "../../etc/passwd", "a" * 5000,
          "\0", [], {}, [[]] * 9, {"a": {"b": [1]}}]  # fmt: skip


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
    config = FAMILIES["gemma2"].write(PRESETS["gemma2-2b"]())
    del arrays["d"]
    write_folder(folder / "hf", config, arrays)
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
    return found | {
        "torch": ("torch", folder / "x.pt"), "dcp": ("dcp", folder / "dcp"),
        "hf": ("hf", folder / "hf"), "config": ("config", folder / "hf/config.json"),
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


# ---------------------------------------------------------------- mutations


def mutated(data: bytes, random: random.Random) -> bytes:
    """Returns a file with something changed: its values, its pickle, or its bytes."""
    if data[:1] == b"{" and random.random() < 0.7:
        try:
            return json.dumps(_other(json.loads(data), random)).encode()
        except ValueError:
            return _bytes(data, random)
    if data[:4] == b"PK\3\4" and random.random() < 0.7:
        return _archive(data, random)
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


def _archive(data: bytes, random: random.Random) -> bytes:
    """Returns an archive of torch, its checksums sound, with one entry changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        pickle = next(name for name in names if name.endswith("data.pkl"))
        chosen = pickle if random.random() < 0.9 else random.choice(names)
        for name in names:
            entry = old.read(name)
            new.writestr(name, _bytes(entry, random) if name == chosen else entry)
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
        from checkpoint.convert.huggingface import read_config

        config = read_config(place.parent)
        FAMILIES["gemma2"].read(config)
        return
    found = open_source(kind, place)
    if found.described is not None:
        read_args(found.described)
    try:
        for name, (dtype, shape) in found.facts.items():
            rows = shape[0] if shape else 1
            row = max(1, int(np.prod(shape[1:], dtype=object)) * dtype.itemsize)
            found.read(name, (), 0, min(rows, max(1, READ // row)))
    finally:
        found.close()


def run_case(number: int, places: dict[str, tuple[str, Path]]) -> str:
    """Mutates one file, reads its checkpoint, puts the file back; returns how it ended."""
    chance = random.Random(number)
    name = chance.choice(sorted(places))
    kind, place = places[name]
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    if kind == "zero":
        files = [p for p in files if "universal" not in str(p)]
    path = chance.choice([p for p in files if p.suffix != ".npz"])
    sound = path.read_bytes()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        path.write_bytes(mutated(sound, chance))
        read_all(kind, place)
        return f"{name}: read"
    except UsageError:
        return f"{name}: refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        path.write_bytes(sound)


def _late(*_) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    places = bases(folder / "bases")
    for kind, place in places.values():  # every one of them is sound, and libraries are warm
        read_all(kind, place)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, _late)
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
