"""The pipeline of `torus prepare` in one process: what goes in comes out, and what is kept out."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import UsageError
from trainer.commands import prepare as command
from trainer.data import prepare as prepare_module
from trainer.data.clean import BANDS, Duplicates, Rejected, Rules, band_keys, clean
from trainer.data.config import CollateConfig, DataConfig
from trainer.data.dataset import open_dataset
from trainer.data.manifest import Manifest, read_manifest
from trainer.data.prepare import REJECTED, Settings, prepare
from trainer.data.shards import TokenShards, verify
from trainer.data.tokenizer import load_tokenizer, open_tokenizer, train_bpe

TEXTS = [f"document {number}: " + "αβγ words " * (number % 7) + "\n" for number in range(100)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts))
    return path


def run(source: Path | str, out: Path, **changes: object) -> Manifest:
    return prepare(Settings(input=(str(source),), out=out, **{"held_out": 0.0, **changes}))


def documents(folder: Path, split: str = "train") -> list[str]:
    shards = TokenShards(folder, split)
    tokenizer = load_tokenizer(shards.manifest.tokenizer, folder)
    return [tokenizer.decode(shards.document(number)) for number in range(len(shards))]


def rejected(folder: Path) -> dict[str, int]:
    return read_manifest(folder).preparation["rejected"]


def samples(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t")),
        max_size=12,
    ).filter(any),
    unit_bytes=st.integers(1, 200),
    shard_tokens=st.integers(1, 50),
)
def test_documents_come_back(tmp_path_factory, texts, unit_bytes, shard_tokens):
    folder = tmp_path_factory.mktemp("round")
    source = write_jsonl(folder / "in.jsonl", texts)
    run(
        source, folder / "out", min_chars=0, max_repeated=1, dedup="none", unit_bytes=unit_bytes,
        shard_tokens=shard_tokens,
    )  # fmt: skip
    # A mark at the beginning of a text is not part of it.
    assert documents(folder / "out") == [text.removeprefix("\ufeff") for text in texts]
    verify(folder / "out")


def saved_dataset(folder: Path, texts: list[str]) -> Path:
    """Writes what `datasets.Dataset.save_to_disk` writes, as far as it is read."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (texts[:70], texts[70:]), strict=True):
        table = pa.table({"text": part, "id": list(range(len(part)))})
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=9)
    (folder / "dataset_info.json").write_text("{}")
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    return folder


def array_record(path: Path, texts: list[str]) -> Path:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for text in texts:
        writer.write(text.encode())
    writer.close()
    return path


def test_every_format_gives_the_same_documents(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    lines = write_jsonl(tmp_path / "plain.jsonl", TEXTS).read_bytes()
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
    packed = zstandard.compress(lines[:1000]) + zstandard.compress(lines[1000:])  # two frames
    (tmp_path / "packed.jsonl.zst").write_bytes(packed)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "rows.parquet", row_group_size=11)
    words = pa.table({"text": pa.array(TEXTS).dictionary_encode()})
    pq.write_table(words, tmp_path / "words.parquet")
    array_record(tmp_path / "a.arrayrecord", TEXTS)
    saved_dataset(tmp_path / "saved", TEXTS)
    for number, text in enumerate(TEXTS):
        (tmp_path / "files" / f"{number // 10}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / f"{number // 10}" / f"{number:03}.md").write_text(text)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    fingerprints = {}
    for name in (
        "plain.jsonl", "packed.jsonl.gz", "packed.jsonl.zst", "rows.parquet", "words.parquet",
        "a.arrayrecord", "saved", "files", "files/**/*.md", "-:text",
    ):  # fmt: skip
        source = name if name.startswith("-") else tmp_path / name
        out = tmp_path / f"out-{len(fingerprints)}"
        manifest = run(source, out, unit_bytes=700)
        fingerprints[name] = manifest.fingerprint()
        assert sum(entry["docs"] for entry in manifest.preparation["inputs"]) == len(TEXTS)
    assert documents(out) == TEXTS
    assert len(set(fingerprints.values())) == 1, fingerprints


def test_a_prepared_folder_trains(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    run(source, tmp_path / "out", held_out=0.2)
    dataset = open_dataset(DataConfig(path=str(tmp_path / "out"), seq_len=64))
    rows = dataset.rows(np.arange(4))
    assert rows["tokens"].shape == (4, 64)
    first = rows["tokens"][0][rows["segment_ids"][0] == 1]
    assert dataset.tokenizer.decode(first).startswith("document ")
    open_dataset(DataConfig(path=str(tmp_path / "out"), seq_len=64), "val")


def test_conversations_carry_loss_on_the_answers_only(tmp_path):
    made = train_bpe(iter(TEXTS), 300)
    template = "{% for m in messages %}<|eos|>{{ m.role }}:{{ m.content }}<|pad|>{% endfor %}"
    config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": template}
    (tmp_path / "tokenizer.json").write_bytes(made.files()["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    source = tmp_path / "chats.jsonl"
    with open(source, "w") as stream:
        for number in range(30):
            question = {"role": "user", "content": f"question {number}"}
            answer = {"role": "assistant", "content": f"answer {number}"}
            stream.write(json.dumps({"messages": [question, answer]}) + "\n")
    run(f"{source}:messages", tmp_path / "out", tokenizer=str(tmp_path))
    tokenizer = open_tokenizer(str(tmp_path))
    begin = tokenizer.encode_chat("<|eos|>assistant:").tolist()
    ends = tokenizer.encode_chat("<|pad|>").tolist()
    collate = CollateConfig("instruction", begin=tuple(begin), end=tuple(ends))
    dataset = open_dataset(DataConfig(str(tmp_path / "out"), seq_len=64, collate=collate))
    batch = dataset.rows(np.arange(dataset.rows_per_epoch))
    answers = tokenizer.decode(
        batch["targets"][batch["targets"] >= 0][batch["segment_ids"][batch["targets"] >= 0] > 0]
    )
    assert sorted(answers.split("answer ")[1:], key=int) == [str(n) for n in range(30)]
    assert "question" not in answers and "user" not in answers
    with pytest.raises(UsageError, match=r"conversation needs a tokenizer\.json"):
        run(f"{source}:messages", tmp_path / "bytes")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_refused_conversation_is_one_rejection(tmp_path, workers):
    """Named with file and line; half a character in JSON is one, too."""
    made = train_bpe(iter(TEXTS), 300)
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{{ m.role }}:{{ m.content }}{% endfor %}{{ strftime_now('%s%f') }}"
    )
    config = {"bos_token": "<|bos|>", "chat_template": template}
    (tmp_path / "tokenizer.json").write_bytes(made.files()["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    source = tmp_path / "chats.jsonl"
    with open(source, "w") as stream:
        for number in range(300):
            content = "\ud800" if number == 200 else f"answer {number}"
            message = {"role": "tool" if number == 17 else "assistant", "content": content}
            stream.write(json.dumps({"text": [message]}) + "\n")
    settings = {"tokenizer": str(tmp_path), "workers": workers, "unit_bytes": 4096}
    manifest = run(source, tmp_path / "out", **settings)
    assert manifest.preparation["rejected"] == {"chat_refused": 1, "invalid_utf8": 1}
    first, second = map(json.loads, (tmp_path / "out" / REJECTED).read_text().splitlines())
    assert first == {
        "reason": "chat_refused", "place": f"{source}:18",
        "detail": "the chat template refuses it: no tools",
    }  # fmt: skip
    assert second["place"] == f"{source}:201"
    assert len({text[-12:] for text in documents(tmp_path / "out")}) == 1  # all the same time
    with pytest.raises(UsageError, match=r"chats\.jsonl:18: chat_refused: .* no tools"):
        run(source, tmp_path / "strict", **settings, on_error="fail")


def test_a_learned_tokenizer_is_the_same_every_time(tmp_path):
    text = Path(json.__file__).parent
    first = run(f"{text}/*.py", tmp_path / "a", train_bpe=600)
    second = run(f"{text}/*.py", tmp_path / "b", train_bpe=600, max_bad=0.5)
    assert first.tokenizer.vocab_size == 600
    assert first.fingerprint() == second.fingerprint()
    sources = [path.read_text() for path in sorted(text.glob("*.py"))]
    assert documents(tmp_path / "a") == sources
    # The folder opens without what it was made from.
    assert open_dataset(DataConfig(path=str(tmp_path / "a"))).tokenizer.spec == first.tokenizer


def test_the_sample_for_a_tokenizer_is_bounded(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", [f"{n} " * 50 for n in range(1000)])
    monkeypatch.setattr(prepare_module, "BPE_SAMPLE", 20_000)
    settings = Settings(input=(str(source),), out=tmp_path / "out", unit_bytes=1000, held_out=0.5)
    inputs, _ = prepare_module.find_inputs(settings.input)
    texts = list(prepare_module._sample(inputs, settings))
    assert 5_000 < sum(map(len, texts)) < 22_000
    assert int(texts[-1].split()[0]) > 700, "the sample does not reach the end of the input"
    held_out = {text for text in texts if (prepare_module.digest(text.encode()) < 2**63)}
    assert not held_out


def test_large_text_files_become_several_documents(tmp_path):
    lines = [f"line {number} of a long text\n" for number in range(300)]
    (tmp_path / "long.txt").write_text("".join(lines))
    run(tmp_path / "long.txt", tmp_path / "out", unit_bytes=1000)
    found = documents(tmp_path / "out")
    assert 5 < len(found) < 12
    assert all(text.endswith("\n") for text in found)
    assert "".join(found) == "".join(lines)


def test_a_text_without_line_ends_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.readers._LONGEST_LINE", 10)
    text = "äöü€𝄞" * 100
    (tmp_path / "long.txt").write_text(text)
    for unit_bytes in range(50, 60):
        out = tmp_path / f"out{unit_bytes}"
        run(tmp_path / "long.txt", out, unit_bytes=unit_bytes, dedup="none", on_error="fail")
        assert len(documents(out)) > 5
        assert "".join(documents(out)) == text


def test_rejections_are_counted_by_reason_with_samples(tmp_path):
    lines = [json.dumps({"text": text}).encode() for text in TEXTS * 20]
    lines[3] = b'{"text": "broken'
    lines[5] = b'{"title": "no text"}'
    lines[7] = b'{"text": 7}'
    lines[11] = b'["text"]'
    lines[13] = b'{"text": "\xff\xfe"}'
    lines[14] = b'{"text": "lone \\ud800 half"}'
    lines[17] = b'{"text": "  "}'
    lines[19] = json.dumps({"text": "x\x00\x01" * 9}).encode()
    lines[23] = json.dumps({"text": "the same line again\n" * 5}).encode()
    lines[29] = json.dumps({"text": "long " * 300}).encode()
    lines[31] = b""
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    for unit_bytes in (1 << 20, 500):
        out = tmp_path / f"out{unit_bytes}"
        manifest = run(tmp_path / "in.jsonl", out, max_chars=1000, unit_bytes=unit_bytes)
        assert rejected(out) == {
            "control_characters": 1, "exact_duplicate": 1889, "invalid_json": 1, "invalid_utf8": 2,
            "no_field": 1, "not_an_object": 1, "not_text": 1, "repeated_lines": 1, "too_long": 1,
            "too_short": 1,
        }  # fmt: skip
        assert manifest.preparation["docs"] == 100
        places = {s["reason"]: s["place"] for s in reversed(samples(out))}
        assert places["invalid_json"] == f"{tmp_path}/in.jsonl:4"
        assert places["too_long"] == f"{tmp_path}/in.jsonl:30"
        assert places["exact_duplicate"] == f"{tmp_path}/in.jsonl:101"
        found = {s["reason"]: s["detail"] for s in samples(out)}
        assert found["no_field"] == "no field `text`, there is title"
        assert sum(s["reason"] == "exact_duplicate" for s in samples(out)) == 20


def test_rows_without_text_are_named(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [*TEXTS[:90], None, *TEXTS[90:], TEXTS[0]]
    pq.write_table(pa.table({"text": rows}), tmp_path / "rows.parquet")
    run(tmp_path / "rows.parquet", tmp_path / "out", max_bad=0.02)
    assert [(s["reason"], s["place"]) for s in samples(tmp_path / "out")] == [
        ("not_text", f"{tmp_path}/rows.parquet:91"),
        ("exact_duplicate", f"{tmp_path}/rows.parquet:102"),
    ]


def test_links_and_pipes_in_a_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a text")
    (tmp_path / "in" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "missing.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "in" / "b.txt").symlink_to(write_jsonl(tmp_path / "linked", ["x"]))
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    manifest = run(tmp_path / "in", tmp_path / "out")
    names = [Path(entry["path"]).name for entry in manifest.preparation["inputs"]]
    assert names == ["a.txt", "b.txt"]


def test_clean_changes_only_what_it_says():
    rules = Rules(max_control=1)
    assert clean(b"\xef\xbb\xbfa\r\nb\rc\td\x00\x0c\x7f", rules)[0] == "a\nb\nc\td"
    text = "  naïve\u2028 text\u00a0\u0085 \ufeff \n\n"
    assert clean(text.encode(), rules) == (text, text.encode())
    with pytest.raises(Rejected, match="invalid_utf8"):
        clean("naïve".encode("latin-1"), rules)


@pytest.mark.parametrize("unit_bytes", [9000, 1 << 20])
def test_near_duplicates_are_found_and_others_are_not(tmp_path, unit_bytes):
    pytest.importorskip("datasketch")
    draw = np.random.default_rng(0)
    words = [f"word{number}" for number in range(5000)]
    texts = []
    for _ in range(60):
        own = draw.choice(words, 400).tolist()
        texts.append(" ".join(own))
        own[200:203] = ["edited", "passage", "here"]  # Jaccard similarity of shingles: 0.97
        texts.append(" ".join(own).upper())
        texts.append(" ".join(own[:200] + draw.choice(words, 200).tolist()))  # 0.33
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    run(source, tmp_path / "out", dedup="near", unit_bytes=unit_bytes)
    kept = documents(tmp_path / "out")
    assert not [text for text in kept if text.isupper()]
    assert all(text in kept for text in texts[::3]), "a first occurrence was dropped"
    assert 60 <= rejected(tmp_path / "out")["near_duplicate"] <= 62
    assert samples(tmp_path / "out")[0]["place"] == f"{source}:2"


def test_band_keys_of_text_without_spaces():
    pytest.importorskip("datasketch")
    text = "".join(chr(0x4E00 + number * 37 % 5000) for number in range(600))
    near = band_keys(text) == band_keys(text[:300] + "一" + text[300:])
    assert near.any()
    assert not (band_keys(text) == band_keys(text[::-1])).any()
    assert len(band_keys("")) == BANDS


@given(st.lists(st.lists(st.integers(0, 30), max_size=9), max_size=9))
def test_duplicates_are_those_of_a_set(batches):
    seen, duplicates = set(), Duplicates(1 << 20)
    for batch in batches:
        first = duplicates.first(np.asarray(batch, np.uint64).reshape(-1, 1))
        expected = [key not in seen and key not in batch[:at] for at, key in enumerate(batch)]
        assert first.tolist() == expected
        seen.update(batch)


def test_duplicates_forget_the_oldest():
    duplicates = Duplicates(100)
    for begin in range(0, 1000, 10):
        assert duplicates.first(np.arange(begin, begin + 10, dtype=np.uint64)[:, None]).all()
        assert sum(map(len, (*duplicates._old, *duplicates._new))) <= 100
    assert not duplicates.first(np.arange(951, 1000, dtype=np.uint64)[:, None]).any()
    assert duplicates.first(np.arange(10, dtype=np.uint64)[:, None]).all()


def test_the_held_out_split_does_not_move_when_data_grows(tmp_path):
    texts = [f"text number {number}" for number in range(2000)]
    run(write_jsonl(tmp_path / "a.jsonl", texts[500:1000]), tmp_path / "a", held_out=0.1)
    run(write_jsonl(tmp_path / "b.jsonl", texts), tmp_path / "b", held_out=0.1)
    small, large = set(documents(tmp_path / "a", "val")), set(documents(tmp_path / "b", "val"))
    assert 25 < len(small) < 80
    assert small == large & set(texts[500:1000])


def test_a_manifest_of_before_is_read(tmp_path):
    run(write_jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    fingerprint = read_manifest(tmp_path / "out").fingerprint()
    del content["preparation"]
    path.write_text(json.dumps(content))
    assert read_manifest(tmp_path / "out").fingerprint() == fingerprint


def test_preparations_given_up_are_removed_at_the_end(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(UsageError, match="no document is left"):
        run(source, tmp_path / "out", min_chars=1000)
    assert list(tmp_path.glob(".out.*.preparing/*.npz")), "nothing to go on with"
    run(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_tolerating_more_bad_documents_does_not_start_again(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    source.write_text(source.read_text() + "{\n" * 50)
    with pytest.raises(UsageError, match=r"50 of 150 documents are bad, --max-bad allows 1\.00%"):
        run(source, tmp_path / "out")
    monkeypatch.setattr(prepare_module, "_make_part", None)
    manifest = run(source, tmp_path / "out", max_bad=0.5)
    assert manifest.preparation["rejected"] == {"invalid_json": 50}
    assert samples(tmp_path / "out")[0]["place"] == f"{source}:101"


def refused(tmp_path: Path, argv: list[str], match: str) -> None:
    """Checks that the command refuses and leaves nothing that was not there."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=match):
        command.main(argv)
    after = [path for path in sorted(tmp_path.iterdir()) if not list(path.glob("*.npz"))]
    assert after == before


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["in.jsnl"], r"input {}/in\.jsnl: nothing matches; did you mean `in\.jsonl`\?"),
        (["nowhere/*.md"], r"input {}/nowhere/\*\.md: nothing matches"),
        (["picture.pgn"], r"picture\.pgn: `\.pgn` is unknown.*; known: \.txt, \.md"),
        (["pictures"], r"pictures: holds 1 \.pgn; known"),
        (["rows.parquet"], r"rows\.parquet: no column `text`, there is id, title"),
        (["rows.parquet:titel"], r"there is id, title; did you mean `title`\?"),
        (["rows.parquet:id"], r"rows\.parquet: column `id` is int64, not text"),
        (["broken.parquet"], r"broken\.parquet: cannot be read: .*"),
        (["broken.jsonl.gz"], r"broken\.jsonl\.gz: cannot be read: "),
        (["broken.jsonl.zst"], r"broken\.jsonl\.zst: cannot be read: "),
        (["splits"], r"splits: holds the splits test, train: name one, as in \S+/splits/SPLIT"),
        (["in.jsonl", "--tokenizer", "nowhere.json"], r"tokenizer 'nowhere\.json': No such file"),
        (["in.jsonl", "--tokenizer", "{}/in.jsonl"], r"tokenizer \S+in\.jsonl.* cannot be read"),
        (["in.jsonl", "--dedup", "neer"], r"invalid choice: 'neer'"),
        (["in.jsonl", "--held-out", "1.5"], r"--held-out 1\.5: from 0 to 0\.999"),
        (["in.jsonl", "--workers", "0"], r"--workers 0: from 1 to 4096"),
        (["in.jsonl", "--worker", "2"], r"does not take `--worker`; did you mean `--workers`"),
        (["in.jsonl", "--train-bpe", "100"], r"a BPE vocabulary of 100: at least 259"),
        (["in.jsonl", "--train-bpe", "8kk"],
         r"--train-bpe: '8kk' is not a whole number like 4096, 32k \(32,000\), 100M or 2G"),
        (["in.jsonl", "--min-chars", "infk"], r"--min-chars: 'infk' is not a whole number"),
        (["in.jsonl", "--out", "{}/taken"], r"taken: the folder is not empty"),
        (["in.jsonl:body", "--on-error", "fail"],
         r"input \S+in\.jsonl:1: no_field: no field `body`, there is id, text"),
        (["in.jsonl:txt"],
         r"100 of 100 documents are bad, --max-bad allows 1\.00%: \S+in\.jsonl:1: no_field: "
         r"no field `txt`, there is id, text; did you mean `text`\?; \S+:2:"),
        (["in.jsonl", "--min-chars", "1k"], r"no document is left: 100 too_short"),
        (["late.jsonl", "--on-error", "fail", "--unit-bytes", "99"],
         r"late\.jsonl:42: invalid_json"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, argv, match):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("zstandard")
    write_jsonl(tmp_path / "in.jsonl", TEXTS)
    lines = (tmp_path / "in.jsonl").read_text().splitlines()
    (tmp_path / "late.jsonl").write_text("\n".join([*lines[:41], "{", *lines[41:]]))
    for folder in ("pictures", "splits/train", "splits/test", "taken"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("picture.pgn", "pictures/a.pgn", "splits/dataset_dict.json", "taken/file"):
        (tmp_path / name).write_text("{}")
    pq.write_table(pa.table({"id": [1], "title": ["a"]}), tmp_path / "rows.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    packed = gzip.compress(lines[0].encode() * 99)
    (tmp_path / "broken.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "broken.jsonl.zst").write_bytes(b"no zstd")
    first, *rest = (part.replace("{}", str(tmp_path)) for part in argv)
    given = ["--input", f"{tmp_path}/{first}", "--out", f"{tmp_path}/out", "--workers", "1", *rest]
    refused(tmp_path, given, match.replace("{}", re.escape(str(tmp_path))))


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, monkeypatch):
    class Wrong(prepare_module.open_tokenizer("bytes").__class__):
        def encode(self, text):
            return super().encode(text) + 300 * text.count("number 7")

    monkeypatch.setattr(prepare_module, "_tokenizer", lambda _: Wrong())
    source = write_jsonl(tmp_path / "in.jsonl", [f"number {number}" for number in range(9)])
    match = r"in\.jsonl:8: token_overflow: id 417, the vocabulary has 259"
    with pytest.raises(UsageError, match=match):
        run(source, tmp_path / "out")


def test_a_finished_preparation_killed_before_it_cleaned_up(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    manifest = run(source, tmp_path / "out")
    work = tmp_path / f".out.{manifest.preparation['key']}.preparing"
    work.mkdir()
    assert run(source, tmp_path / "out") == manifest
    assert not work.exists()
    with pytest.raises(UsageError, match="not empty"):
        run(source, tmp_path / "out")


def test_two_processes_do_not_prepare_one_folder(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)

    def meet(*_):
        with pytest.raises(UsageError, match="another process is preparing it"):
            run(source, tmp_path / "out")

    prepare(Settings(input=(str(source),), out=tmp_path / "out", held_out=0.0), meet)


def test_prepare_does_not_import_jax(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", TEXTS)
    code = (
        "import sys; from trainer.commands.main import main; "
        f"status = main(['prepare', '--input', '{tmp_path}/in.jsonl', '--out', '{tmp_path}/out', "
        "'--workers', '1']); assert 'jax' not in sys.modules; sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "100 documents" in result.stdout
    assert "train on it with" in result.stdout


@pytest.mark.parametrize(("share", "few"), [("0.5", ""), ("0.03", "[1-9]"), ("0", "0")])
def test_few_held_out_documents_are_told(tmp_path, capsys, share, few):
    write_jsonl(tmp_path / "in.jsonl", TEXTS)
    given = ["--input", f"{tmp_path}/in.jsonl", "--out", f"{tmp_path}/out", "--workers", "1"]
    command.main([*given, "--held-out", share])
    out = capsys.readouterr().out
    assert bool(re.search(rf"\n  {few} documents are few to evaluate on", out)) == bool(few)
    last = f"train on it with --config.data.path={tmp_path}/out --config.model.vocab=259"
    assert out.splitlines()[-1] == last + " --config.eval.every=0" * (few == "0")
