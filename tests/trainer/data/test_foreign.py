"""Token files of other stacks, written here from their published layouts."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import UsageError
from trainer.data.foreign import (
    Source,
    export_arrayrecord,
    import_documents,
    open_arrayrecord,
    open_megatron,
    open_nanogpt,
)
from trainer.data.manifest import read_manifest
from trainer.data.shards import TokenShards, verify
from trainer.data.tokenizer import ByteTokenizer, TokenizerSpec

CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "uint16": 8}
DOCUMENTS = [[104, 105, 257], [], [0], list(range(200)), [256, 7, 257]]


def write_megatron(
    stem: Path, documents: list[list[list[int]]], dtype: str = "uint16", **header
) -> Path:
    """Writes documents of sequences as Megatron-LM lays them out; `header` overrides fields."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.asarray([len(sequence) for sequence in sequences], "<i4")
    size = np.dtype(dtype).itemsize
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * size
    bounds = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    fields = {"magic": b"MMIDIDX\0\0", "version": 1, "code": CODES[dtype], "cut": None} | header
    head = fields["magic"] + struct.pack(
        "<QBQQ", fields["version"], fields["code"], len(lengths), len(bounds)
    )
    index = head + lengths.tobytes() + pointers.astype("<i8").tobytes() + bounds.tobytes()
    stem.with_name(f"{stem.name}.idx").write_bytes(index[: fields["cut"]])
    flat = [token for sequence in sequences for token in sequence]
    stem.with_name(f"{stem.name}.bin").write_bytes(np.asarray(flat, dtype).tobytes())
    return stem


def imported(folder: Path, source: Source) -> list[list[int]]:
    import_documents([("train", source)], folder, ByteTokenizer(), lambda count: None)
    verify(folder)
    shards = TokenShards(folder, "train")
    assert source.count == len(shards)
    return [shards.document(number).tolist() for number in range(len(shards))]


def with_bos(documents: list[list[int]]) -> list[list[int]]:
    return [[256, *each] if each and each[0] != 256 else each for each in documents]


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint16"])
def test_megatron_documents_come_back(tmp_path, dtype):
    stem = write_megatron(tmp_path / "text_document", [[d] for d in DOCUMENTS], dtype)
    for path in (stem, stem.with_suffix(".bin"), stem.with_suffix(".idx")):
        assert open_megatron(path).dtype == np.dtype(dtype)
    assert imported(tmp_path / "set", open_megatron(stem)) == with_bos(DOCUMENTS)
    assert TokenShards(tmp_path / "set", "train").text_bytes == 2 + 1 + 200 + 1


def test_megatron_sentences_are_joined(tmp_path):
    stem = write_megatron(tmp_path / "x", [[[1], [2, 3]], [], [[4]]], "uint8")
    assert imported(tmp_path / "set", open_megatron(stem)) == with_bos([[1, 2, 3], [], [4]])


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ({"magic": b"TNTIDX\0\0\0"}, r"x\.idx: begins with b'TNTIDX.*, a Megatron index with b'MM"),
        ({"version": 2}, r"x\.idx: Megatron index of version 2, this reads 1"),
        ({"code": 6}, r"x\.idx: tokens of dtype code 6, this reads 1 \(uint8\), .* 8 \(uint16\)"),
        ({"code": 4}, r"x\.bin: 6 bytes are no whole number of int32 tokens"),
        ({"cut": 20}, r"x\.idx: 20 bytes are no Megatron index"),
        ({"cut": -1}, r"x\.idx: has \d+ bytes, its header says \d+"),
        ({"code": 1}, r"x\.idx: its sequences do not follow one another in x\.bin"),
    ],
)
def test_bad_megatron_files_are_refused(tmp_path, header, text):
    stem = write_megatron(tmp_path / "x", [[[1, 2]], [[3]]], **header)
    with pytest.raises(UsageError, match=text):
        open_megatron(stem)


def test_megatron_files_that_do_not_belong_together_are_refused(tmp_path):
    stem = write_megatron(tmp_path / "x", [[[1, 2]], [[3]]])
    data = stem.with_suffix(".bin")
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(UsageError, match=r"x\.bin: holds 2 tokens, x\.idx says 3"):
        open_megatron(stem)
    data.write_bytes(data.read_bytes() + b"\0\0")
    index = stem.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:-8] + struct.pack("<q", 9))
    with pytest.raises(UsageError, match=r"x\.idx: its documents are not monotone from 0 to 2"):
        open_megatron(stem)
    data.unlink()
    with pytest.raises(UsageError, match=r"x\.bin: No such file"):
        open_megatron(stem)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 8))
def test_nanogpt_is_cut_after_every_eot(tmp_path_factory, tokens, block):
    path = tmp_path_factory.mktemp("nano") / "train.bin"
    path.write_bytes(np.asarray(tokens, "<u2").tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.data.foreign._BLOCK", block)
        source = open_nanogpt(path, "uint16", 9)
        found = [document.tolist() for document in source.read()]
    assert [token for document in found for token in document] == tokens
    assert len(found) == source.count
    assert all(9 not in document[:-1] and document for document in found)
    assert all(document[-1] == 9 for document in found[:-1])


def test_nanogpt_import(tmp_path):
    flat = [104, 105, 257, 256, 33, 257, 1]
    (tmp_path / "train.bin").write_bytes(np.asarray(flat, "<u2").tobytes())
    documents = imported(tmp_path / "set", open_nanogpt(tmp_path / "train.bin", "uint16", 257))
    assert documents == [[256, 104, 105, 257], [256, 33, 257], [256, 1]]
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(UsageError, match=r"odd\.bin: 3 bytes are no whole number of uint16"):
        open_nanogpt(tmp_path / "odd.bin", "uint16", 257)


def test_wrong_tokens_name_file_and_document_and_leave_nothing(tmp_path):
    stem = write_megatron(tmp_path / "x", [[[1]], [[2, 259]]])
    negative = write_megatron(tmp_path / "y", [[[-5]]], "int32")
    for path, text in (
        (stem, r"x\.bin: document 1 holds token 259, the tokenizer has 259: another one wrote it"),
        (negative, r"y\.bin: document 0 holds token -5, the tokenizer has 259"),
    ):
        with pytest.raises(UsageError, match=text):
            imported(tmp_path / "set", open_megatron(path))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".bin", ".bin", ".idx", ".idx"]


def test_uint16_cannot_hold_a_larger_vocabulary(tmp_path):
    class Wide(ByteTokenizer):
        def __init__(self) -> None:
            self.spec = TokenizerSpec("bytes", 65_537, 256, 257, 258, "")

    stem = write_megatron(tmp_path / "x", [[[1]]])
    with pytest.raises(UsageError, match=r"x\.bin: tokens of uint16 cannot be of .* 65,537 ids"):
        import_documents([("train", open_megatron(stem))], tmp_path / "set", Wide(), print)


def test_arrayrecord_round_trip_is_bit_exact(make_dataset: Callable[..., Path], tmp_path):
    folder = make_dataset()
    advanced = []
    export_arrayrecord(folder, tmp_path / "records", advanced.append)
    manifest = read_manifest(folder)
    assert sum(advanced) == sum(shard.docs for shard in manifest.shards)
    sources = [
        (split, open_arrayrecord(path, "uint16"))
        for split in manifest.splits
        for path in sorted((tmp_path / "records").glob(f"{split}-*.array_record"))
    ]
    import_documents(sources, tmp_path / "again", ByteTokenizer(), lambda count: None)
    for split in manifest.splits:
        old, new = TokenShards(folder, split), TokenShards(tmp_path / "again", split)
        np.testing.assert_array_equal(new.lengths, old.lengths)
        for number in range(len(old)):
            np.testing.assert_array_equal(new.document(number), old.document(number))
        assert new.text_bytes == old.text_bytes
    with pytest.raises(UsageError, match=r"records exists; choose another"):
        export_arrayrecord(folder, tmp_path / "records", print)


def test_a_broken_export_leaves_nothing(make_dataset, tmp_path):
    folder = make_dataset()

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export_arrayrecord(folder, tmp_path / "records", interrupt)
    assert sorted(tmp_path.iterdir()) == before


def test_bad_arrayrecords_are_refused(tmp_path):
    def write(name: str, options: str, *records: bytes) -> Path:
        writer = ArrayRecordWriter(str(tmp_path / name), options)
        for record in records:
            writer.write(record)
        writer.close()
        return tmp_path / name

    with pytest.raises(UsageError, match=r"a: written with group_size:8; write it with group_si"):
        open_arrayrecord(write("a", "group_size:8", b"ab"), "uint16")
    source = open_arrayrecord(write("b", "group_size:1", b"ab", b"abc"), "uint16")
    with pytest.raises(UsageError, match=r"b: record 1 has 3 bytes, no whole number of uint16"):
        list(source.read())
    (tmp_path / "c").write_bytes(b"not a record file")
    with pytest.raises(UsageError, match=r"c: not an ArrayRecord file"):
        open_arrayrecord(tmp_path / "c", "uint16")
    with pytest.raises(UsageError, match=r"d: no such file"):
        open_arrayrecord(tmp_path / "d", "uint16")
