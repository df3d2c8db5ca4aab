"""Pickles and files of torch.save: read as data or refused, with nothing run."""

import io
import math
import os
import pickle
import re
import struct
import time
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.convert import pickles, torchfiles
from checkpoint.convert.pickles import Global, Inert, Persistent, dumps, loads
from checkpoint.convert.sources import read_state_dict
from checkpoint.convert.torchfiles import KNOWN, contiguous, read_torch, write_torch
from sharding.errors import UnsafeInputError

REASON = "no file that torch wrote was read: pip install -e '.[parity]'"
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text(max_size=4) | st.integers(-5, 5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(value=PLAIN)
def test_what_is_written_is_read(value):
    assert loads(dumps(value), "x", frozenset()) == value
    assert pickle.loads(dumps(value)) == value  # and Python agrees


@settings(max_examples=200, deadline=None)
@given(value=PLAIN, protocol=st.integers(2, 4))
def test_what_python_writes_is_read(value, protocol):
    assert loads(pickle.dumps(value, protocol), "x", frozenset()) == value


def test_records_name_what_would_be_called():
    value = {"a": Inert("m.f", (1, Global("m.g"))), "b": Persistent(("storage", 1))}
    value["a"].state = {"x": 2}
    found = loads(dumps(value), "x", frozenset({"m.f", "m.g"}))
    made = found["a"]
    assert (made.name, made.args, made.get("x"), made.get("y", 3)) == (
        "m.f", (1, Global("m.g")), 2, 3)  # fmt: skip
    assert found["b"] == Persistent(("storage", 1))


def test_a_value_that_is_not_plain_is_not_written():
    with pytest.raises(TypeError, match="set is not pickled here"):
        dumps({1, 2})


# ---------------------------------------------------------------- hostile pickles


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def rebuilt(inner: bytes) -> bytes:
    """Returns a pickle that gives what `inner` makes to an allowed function."""
    return b"\x80\x02ctorch._utils\n_rebuild_parameter\n(" + inner + b"\x88NtR."


def evil(marker: str) -> dict[str, bytes]:
    touch = f"touch {marker}"
    command = struct.pack("<I", len(touch)) + touch.encode()
    system = b"cposix\nsystem\n(X" + command + b"tR"
    return {
        "os.system, protocol 2": pickle.dumps(Calls(os.system, touch), 2),
        "os.system, protocol 4": pickle.dumps(Calls(os.system, touch), 4),
        "os.system, protocol 0": pickle.dumps(Calls(os.system, touch), 0),
        "eval": pickle.dumps(Calls(eval, f"open({marker!r}, 'w')"), 2),
        "getattr": pickle.dumps(Calls(getattr, 1, "real"), 4),
        "open": pickle.dumps(Calls(open, marker, "w"), 4),
        "inside of an allowed call": rebuilt(system),
        "deep inside of allowed calls": rebuilt(rebuilt(rebuilt(system)[2:-1])[2:-1]),
        "old instance": b"\x80\x02(X" + command + b"iposix\nsystem\n.",
        "old object": b"\x80\x02(cposix\nsystem\nX" + command + b"o.",
        "extension": b"\x80\x02\x82\x01.",
        "dotted name": b"\x80\x04\x8c\x05torch\x8c\x10storage.os.system\x93.",
        "dotted module": b"\x80\x02ctorch.os\nsystem\n.",
        "call of a string": b"\x80\x02X\x01\x00\x00\x00aX\x01\x00\x00\x00b\x85R.",
        "call without arguments": b"\x80\x02ctorch\nSize\nNR.",
        "class as a factory": pickle.dumps(Calls(type, "X", (), {}), 2),
        "attributes for a list": b"\x80\x02]}b.",
        "bytes of 8 EiB": b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b"x.",
        "text of 4 GB": b"\x80\x02X\xff\xff\xff\xffx.",
        "number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
        "memo that is not there": b"\x80\x02h\x07.",
        "nothing": b"",
        "no end": b"\x80\x02K\x01",
        "empty stack": b"\x80\x02.",
        "a mark left": b"\x80\x02(K\x01.",
        "below a mark": b"\x80\x02K\x01(0N.",
        "odd dict": b"\x80\x02}(K\x01u.",
        "items of a list": b"\x80\x02](K\x01K\x02u.",
        "reference": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "storage of a name": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nSize\nK\x00K\x00K\x00tQ.",
        "unknown protocol junk": b"\xff\xfe\xfd",
    }  # fmt: skip


def archive(data: bytes, files: dict[str, bytes] | None = None, **options) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as file:
        entries = {"a/data.pkl": data, "a/byteorder": b"little"} | (files or {})
        for name, content in entries.items():
            file.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize("name", evil(""))
def test_a_hostile_pickle(name, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(archive(evil(str(tmp_path / "ran"))[name]))
    start = time.monotonic()
    with pytest.raises(UnsafeInputError, match=r"x.pt"):
        read_torch(path)
    assert time.monotonic() - start < 5
    assert not (tmp_path / "ran").exists()


def test_the_refusal_names_what_the_file_names(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(archive(pickle.dumps(Calls(os.system, "true"), 2)))
    with pytest.raises(UnsafeInputError, match=r"names `posix.system`.*nothing of it was run"):
        read_torch(path)


def memoised(size: int, call: bytes, count: int) -> bytes:
    """Returns a pickle that calls something `count` times with one large value."""
    large = b"B" + struct.pack("<I", size) + bytes(size) + b"q\0"
    return b"\x80\x02(" + large + (call + b"h\0\x85R") * count + b"t."


@pytest.mark.parametrize("name", ["ctorch\nSize\n", "cbuiltins\nset\n",
                                  "ccollections\nOrderedDict\n"])  # fmt: skip
def test_one_large_value_is_not_copied_many_times(name):
    start = time.monotonic()
    with pytest.raises(UnsafeInputError, match=r"of what is no|too many axes"):
        loads(memoised(2**20, name.encode(), 400), "x", KNOWN, torchfiles.plain)
    pairs = b"\x80\x02(](" + b"(K\1K\2t" * 10**4 + b"eq\0" + (name.encode() + b"h\0\x85R") * 10**4
    with pytest.raises(UnsafeInputError, match=r"more than 640 MiB|too many axes"):
        loads(pairs + b"t.", "x", KNOWN, torchfiles.plain)
    assert time.monotonic() - start < 20


def test_a_pickle_takes_a_bounded_memory(monkeypatch):
    monkeypatch.setattr(pickles, "MEMORY", 2**20)
    for pickled in (b"}" * 10**5, b"Nq\0" * 10**5, b"K\1" * 10**5):
        with pytest.raises(UnsafeInputError, match="its values take more than 1 MiB"):
            loads(b"\x80\x02" + pickled + b".", "x", frozenset())


def test_numbers_that_are_made_to_have_one_hash_are_no_keys():
    same = b"".join(b"\x8a\x10" + (k * (2**61 - 1)).to_bytes(16, "little") + b"N"
                    for k in range(1, 9))  # fmt: skip
    with pytest.raises(UnsafeInputError, match="a int is a key"):
        loads(b"\x80\x02}(" + same + b"u.", "x", frozenset())


DEEP = b")" + b"\x85" * 10**6


@pytest.mark.parametrize("inside", [b"(X\7\0\0\0storageN" + DEEP + b"NK\1tQ", DEEP],
                         ids=["storage", "tensor"])  # fmt: skip
def test_tuples_a_million_deep_in_a_message(inside, tmp_path):
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + inside + b"K\0))\x89NtR"
    for pickled in (call, DEEP, b"}X\1\0\0\0a" + DEEP + b"s"):
        path = tmp_path / "x.pt"
        path.write_bytes(archive(b"\x80\x02" + pickled + b"."))
        with pytest.raises(UnsafeInputError) as caught:
            read_state_dict(path)
        assert len(str(caught.value)) < 500


def test_structures_that_explode_elsewhere():
    deep = b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b"."
    loads(deep, "x", frozenset())  # no recursion
    wide = loads(b"\x80\x02r\xff\xff\xff\x7f.".replace(b"r", b"Nr"), "x", frozenset())
    assert wide is None  # the memo is no array
    shared = b"\x80\x02}N" + b"2\x86" * 60 + b"Ns."  # holds itself 2^60 times
    with pytest.raises(UnsafeInputError, match="opcode DUP"):
        loads(shared, "x", frozenset())
    shared = b"\x80\x02}" + b"N" + b"q\x00h\x00\x86" * 60 + b"Ns."
    with pytest.raises(UnsafeInputError, match="a tuple is a key"):
        loads(shared, "x", frozenset())
    with pytest.raises(UnsafeInputError, match="the limit is"):
        loads(bytes(pickles.LIMIT + 1), "x", frozenset())


# ---------------------------------------------------------------- hostile archives


def tensor(shape=(2, 3), stride=(3, 1), first=0, count=6, kind="torch.FloatStorage", key="0"):
    storage = Persistent(("storage", Global(kind), key, "cpu", count))
    arguments = (storage, first, shape, stride, False, Inert("collections.OrderedDict"))
    return dumps({"w": Inert("torch._utils._rebuild_tensor_v2", arguments)})


def with_data(pickled: bytes, size: int = 24, **options) -> bytes:
    return archive(pickled, {"a/data/0": bytes(size)}, **options)


def overlapping() -> bytes:
    """Returns an archive whose two tensors are one and the same bytes."""
    data = bytearray(archive(tensor(), {"a/data/0": bytes(24), "a/data/1": bytes(24)}))
    last = data.rfind(b"PK\1\2")
    first = data.rfind(b"PK\1\2", 0, last)
    data[last + 42 : last + 46] = data[first + 42 : first + 46]
    return bytes(data)


def declared(offset: int, value: int) -> bytes:
    """Returns an archive with a 4-byte field of the last directory entry changed."""
    data = bytearray(with_data(tensor()))
    place = data.rfind(b"PK\1\2") + offset
    data[place : place + 4] = struct.pack("<I", value)
    return bytes(data)


ARCHIVES = {
    "empty": b"",
    "wrong magic": b"\x93NUMPY" + bytes(300),
    "a bare pickle": pickle.dumps({"w": 1}, 2),
    "a tar": b"data".ljust(257, b"\0") + b"ustar" + bytes(800),
    "no entries": b"PK\5\6" + bytes(18),
    "no pickle": archive(b"", {}).replace(b"data.pkl", b"data.xyz"),
    "cut": with_data(tensor())[:-30],
    "compressed": with_data(tensor(), compression=zipfile.ZIP_DEFLATED),
    "zip bomb": archive(tensor(), {"a/data/0": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED),
    "bzip2": with_data(tensor(), compression=zipfile.ZIP_BZIP2),
    "big endian": archive(tensor(), {"a/byteorder": b"big", "a/data/0": bytes(24)}),
    "a name outside": archive(tensor(), {"a/../../data/0": bytes(24)}),
    "a name outside at once": archive(tensor(), {"../data/0": bytes(24)}),
    "an absolute name": archive(tensor(), {"/etc/passwd": bytes(24)}),
    "a backslash": archive(tensor(), {"a/..\\data/0": bytes(24)}),
    "two roots": archive(tensor(), {"b/data/0": bytes(24)}),
    "overlap": overlapping(),
    "a name twice": archive(
        tensor(), {"a/data/0": bytes(24), "a/data/1": bytes(24)}).replace(b"data/1", b"data/0"),
    "size of 4 GB": declared(24, 0xFFFFFFF0),
    "both sizes of 4 GB": declared(20, 0xFFFFFFF0),
    "data before the file": declared(42, 0xFFFFFFF0),
    "no storage": with_data(tensor(key="1")),
    "a storage outside": with_data(tensor(key="../byteorder", count=1)),
    "storage of another size": with_data(tensor(count=7)),
    "storage of another dtype": with_data(tensor(kind="torch.DoubleStorage")),
    "storage of 2**62": with_data(tensor(count=2**62)),
    "shape outside": with_data(tensor((3, 3))),
    "stride outside": with_data(tensor((2, 3), (4, 1))),
    "offset outside": with_data(tensor(first=1)),
    "negative offset": with_data(tensor(first=-1)),
    "negative stride": with_data(tensor((2, 3), (3, -1), first=2)),
    "repeated elements": with_data(tensor((2**40,), (0,))),
    "huge shape": with_data(tensor((2**61, 2**61), (1, 1))),
    "boolean shape": with_data(tensor((True, 3))),
    "text as shape": with_data(tensor("ab", "cd")),
    "1,000 axes": with_data(tensor((1,) * 1000, (1,) * 1000)),
    "no strides": with_data(tensor((2, 3), ())),
}  # fmt: skip

REASONS = {
    "big endian": "big-endian", "a name twice": "there twice", "overlap": "overlaps another",
    "zip bomb": "compressed", "a name outside": "not inside", "an absolute name": "not inside",
    "storage of another dtype": "has 24 bytes", "stride outside": "lies in 6 elements",
    "repeated elements": "lies in 6 elements",
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_archive(name, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(ARCHIVES[name])
    with pytest.raises(UnsafeInputError, match=r"x.pt") as refused:
        read_torch(path)
    assert re.search(REASONS.get(name, ""), str(refused.value))
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_sparse_file_with_a_huge_directory(tmp_path):
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        file.truncate(2**36)
        file.seek(2**36)
        file.write(b"PK\6\6" + struct.pack("<Q", 44) + struct.pack("<HHII", 45, 45, 0, 0)
                   + struct.pack("<QQQQ", 1, 1, 2**35, 2**35))  # fmt: skip
        file.write(b"PK\6\7" + struct.pack("<IQI", 0, 2**36, 1))
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 2**32 - 1, 2**32 - 1, 0))
    with pytest.raises(UnsafeInputError, match=r"x.pt is not a file of torch.save"):
        read_torch(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(with_data(tensor()))
    found = read_torch(path)["w"]
    os.truncate(path, found.offset + 20)
    with pytest.raises(UnsafeInputError, match="has become shorter"):
        found.read()


@settings(
    max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_any_flipped_byte_is_read_or_refused(place, byte, tmp_path):
    data = bytearray(with_data(tensor()))
    data[place % len(data)] = byte
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    try:
        found = read_torch(path)
    except UnsafeInputError:
        return
    for value in found.values() if isinstance(found, dict) else ():
        if isinstance(value, torchfiles.Strided):
            assert value.read().nbytes <= 24


@settings(max_examples=500, deadline=2000)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_a_pickle_or_refused(data):
    try:
        loads(b"\x80\x02" + data + b".", "x", KNOWN)
    except UnsafeInputError:
        return


# ---------------------------------------------------------------- tensors


@settings(max_examples=50, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(0, 4), max_size=4))
def test_arrays_come_back_rows_at_a_time(data, shape, tmp_path_factory):
    path = tmp_path_factory.mktemp("x") / "x.pt"
    dtype = data.draw(st.sampled_from(list(torchfiles.NAMES)))
    size = math.prod(shape) * dtype.itemsize
    bits = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = bits.view(dtype).reshape(shape) if size else np.empty(shape, dtype)
    with path.open("wb") as file:
        file.write(b"before")
        write_torch(file, {"w": array, "n": [array]})
        end = file.tell()
        file.write(b"after")
    found = read_torch(path, offset=6, length=end - 6)
    assert found["w"].stride == contiguous(tuple(shape))
    for tensor_found in (found["w"], found["n"][0]):
        back = tensor_found.read()
        assert (back.dtype, back.shape) == (dtype, tuple(shape))
        assert back.tobytes() == array.tobytes()
    if shape and shape[0] > 1:
        assert found["w"].read(1, 2).tobytes() == array[1:2].tobytes()


def test_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch", reason=REASON)
    weights = torch.arange(24.0).reshape(4, 6)
    values = {
        "plain": weights, "transposed": weights.t(), "part": weights[1:3, 2:5],
        "half": torch.randn(3).bfloat16(), "scalar": torch.tensor(3), "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(weights),
    }  # fmt: skip
    other = {
        "size": torch.Size([1, 2]), "dtype": torch.float32, "set": {1}, "big": 2**40,
        "module": torch.nn.Linear(3, 2).state_dict(), "device": torch.device("cpu"),
    }  # fmt: skip
    torch.save({**values, **other}, tmp_path / "x.pt")
    found = read_torch(tmp_path / "x.pt")
    for name, value in values.items():
        back = found[name].read()
        assert back.shape == tuple(value.shape), name
        assert np.array_equal(back.astype(np.float32), value.detach().float().numpy()), name
    assert found["transposed"].read(2, 4).tolist() == weights.t()[2:4].tolist()
    assert (found["size"], found["dtype"], found["set"], found["big"]) == (
        (1, 2), Global("torch.float32"), [1], 2**40)  # fmt: skip
    assert found["module"]["weight"].shape == (2, 3)


def test_what_torch_reads(tmp_path):
    torch = pytest.importorskip("torch", reason=REASON)
    import ml_dtypes

    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3),
              "b": np.ones(3, ml_dtypes.bfloat16), "s": np.array(2.5, np.float32)}  # fmt: skip
    with (tmp_path / "x.pt").open("wb") as file:
        write_torch(file, arrays | {"n": [1, "a", (None, True)]})
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["n"] == [1, "a", (None, True)]
    assert found["w"].tolist() == arrays["w"].tolist()
    assert found["b"].dtype == torch.bfloat16 and found["s"].item() == 2.5


def test_an_old_file_of_torch_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason=REASON)
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeInputError, match=r"not a file of torch.save"):
        read_torch(tmp_path / "x.pt")
