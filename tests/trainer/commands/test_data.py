"""`torus data`: what it shows, counts and finds, and that it converts through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from sharding.errors import UsageError
from trainer.commands import data
from trainer.commands.main import main
from trainer.data.config import CollateConfig, DataConfig
from trainer.data.dataset import open_dataset, open_training
from trainer.data.shards import DatasetWriter, verify
from trainer.data.tokenizer import ByteTokenizer, train_bpe

TEXTS = ["hello world", "naïve [bold]café[/bold]", "hello world", "", "x" * 40]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with DatasetWriter(tmp_path / "set", ByteTokenizer(), shard_tokens=40) as writer:
        for text in TEXTS:
            tokens = ByteTokenizer().encode(text)
            writer.add("train", np.concatenate([[256], tokens]), len(text.encode()))
    return tmp_path / "set"


def test_show_tells_segments_positions_and_padding(folder, capsys):
    shown = []
    for row in range(2):
        assert main(["data", "show", str(folder), "--row", str(row), "--seq-len", "60"]) == 0
        shown.append(capsys.readouterr().out)
    text = "".join(shown)
    assert "row 0 of 2 an epoch, split train, 60 positions, " in shown[0]
    assert text.count("--- segment 1: columns 0 to ") == 2
    assert text.count("hello world\n") == 2 and "naïve [bold]café[/bold]\n" in text
    assert "\x1b" not in text  # no colours without a terminal
    padding = [int(one.split(" positions, ")[1].split()[0]) for one in shown]
    assert sum(padding) == 2 * 60 - sum(len(t.encode()) for t in TEXTS)


def test_show_colours_on_a_terminal(folder, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    data.main(["show", str(folder), "--seq-len", "60"])
    assert "\x1b[36m" in capsys.readouterr().out


def test_stats_count_what_is_there(folder, capsys):
    arguments = ["data", "stats", str(folder), "--seq-len", "60"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lengths = sorted(1 + len(text.encode()) for text in TEXTS)
    assert (found["documents"], found["tokens"]) == (5, sum(lengths))
    assert found["text_bytes"] == sum(lengths) - 5
    assert found["lengths"] == {"p50": 12, "p90": 26, "p99": 26, "max": 41}
    assert found["duplicates"] == 1
    assert found["ids_used"] == 1 + len(set(b"".join(t.encode() for t in TEXTS)))
    assert found["most_frequent"][0] == {"id": 120, "count": 40, "text": "x"}
    assert sum(count for *_, count in found["histogram"]) == 5
    assert found["histogram"][0] == [1, 2, 1]
    assert found["rows_per_epoch"] == 2
    assert found["padding"] == pytest.approx(1 - (sum(lengths) - 5) / 120)
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "documents   5, 1 exact duplicates" in text and "  32 to        63           1  " in text


def test_verify_lists_every_fault(folder, capsys):
    assert main(["data", "verify", str(folder)]) == 0
    assert "3 shards, 184 bytes, 0 faults" in capsys.readouterr().out
    flipped = bytearray((folder / "train-00000.bin").read_bytes())
    flipped[4] ^= 1
    (folder / "train-00000.bin").write_bytes(flipped)
    (folder / "train-00001.bin").unlink()
    index = np.load(folder / "train-00002.idx.npy")
    np.save(folder / "train-00002.idx.npy", index[::-1])
    assert main(["data", "verify", str(folder)]) == 1
    text = capsys.readouterr().out
    assert "FAULT  train-00000.bin has sha256" in text
    assert "FAULT  train-00001.bin cannot be read: No such file" in text
    assert "FAULT  train-00002.idx.npy runs from" in text
    assert main(["data", "verify", str(folder), "--json"]) == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert [fault["file"] for fault in faults] == [
        "train-00000.bin", "train-00001.bin", "train-00002.idx.npy"
    ]  # fmt: skip
    assert faults[1]["reason"].startswith("cannot be read")
    (folder / "manifest.json").unlink()
    assert main(["data", "verify", str(folder)]) == 2
    assert "no manifest.json there" in capsys.readouterr().err


def test_another_tokenizer_is_a_fault(tmp_path):
    tokenizer = train_bpe(iter(TEXTS), 300)
    with DatasetWriter(tmp_path / "set", tokenizer) as writer:
        writer.add("train", np.asarray([tokenizer.spec.bos, 5]), 1)
    verify(tmp_path / "set")
    path = tmp_path / "set/tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UsageError, match=r"manifest\.json names another tokenizer .* sha256 = \w+"):
        verify(tmp_path / "set")


def test_import_and_export_through_the_command_line(folder, tmp_path, capsys):
    assert main(["data", "export", str(folder), "--to", "arrayrecord", "--out",
                 str(tmp_path / "records")]) == 0  # fmt: skip
    assert "3 files" in capsys.readouterr().out
    assert main(["data", "import", f"{tmp_path}/records/train-*", "--from", "arrayrecord",
                 "--tokenizer", "bytes", "--out", str(tmp_path / "again")]) == 0  # fmt: skip
    assert "0 faults" in capsys.readouterr().out
    again, old = verify(tmp_path / "again"), verify(folder)
    assert sum(s.tokens for s in again.shards) == sum(s.tokens for s in old.shards)
    flat = np.asarray([104, 257, 105], "<u2")
    (tmp_path / "flat.bin").write_bytes(flat.tobytes())
    assert main(["data", "import", f"val={tmp_path}/flat.bin", "--from", "nanogpt",
                 "--tokenizer", "bytes", "--out", str(tmp_path / "flat")]) == 0  # fmt: skip
    (shard,) = verify(tmp_path / "flat").shards
    assert (shard.split, shard.docs, shard.tokens) == ("val", 2, 5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["shwo", "x"], r"choose show, stats, verify, import, export, not 'shwo'; did you "),
        ([], "choose show, stats"),
        (["export", "x", "--to", "parquet", "--out", "y"], "--to parquet: choose arrayrecord"),
        (["import", "x", "--from", "nanogtp", "--tokenizer", "bytes", "--out", "y"],
         "--from nanogtp: choose megatron, nanogpt, arrayrecord; did you mean `nanogpt`"),
        (["import", "x", "--from", "nanogpt", "--tokenizer", "bytes", "--out", "y"],
         "x: No such file"),
        (["verify", "s3://bucket/set"], "s3://bucket/set: verify reads a local copy"),
        (["export", "gs://bucket/set", "--to", "arrayrecord", "--out", "y"],
         "gs://bucket/set: export reads a local copy"),
        (["show", "x", "--rwo", "1"], "does not take `--rwo`; did you mean `--row`"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=text):
        data.main(arguments)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A dataset of conversations in bytes: Q begins a question, A an answer, a line end ends it."""
    with DatasetWriter(tmp_path / "chats", ByteTokenizer()) as writer:
        for number in range(9):
            tokens = ByteTokenizer().encode(f"Q{number}?\nA{number}!\n")
            for split in ("train", "val"):
                writer.add(split, np.concatenate([[256], tokens]), len(tokens))
    return tmp_path / "chats"


def test_show_counts_tokens_with_loss(chats, capsys):
    arguments = ["data", "show", str(chats), "--seq-len", "8", "--collate", "instruction"]
    assert main([*arguments, "--begin", "65", "--end", "10"]) == 0
    out, err = capsys.readouterr()
    assert "8 positions, 0 of them padding, 3 with loss" in out and not err
    assert "positions 0 to 7, 3 with loss" in out
    assert main([*arguments, "--begin", "65,65", "--end", "10"]) == 0
    out, err = capsys.readouterr()
    assert ", 0 with loss" in out
    assert "none of 9 documents holds config.data.collate.begin = (65, 65) in a row" in err
    assert main([*arguments, "--begin", "A", "--end", "10"]) == 2
    assert "argument --begin: 'A' is not token ids like 27,91" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["instruction", "prefix"])
def test_masks_that_match_nothing_are_a_warning(chats, folder, kind, caplog):
    def opened(path: Path, begin: int, split: str = "train", **changes) -> str:
        collate = CollateConfig(kind, begin=(begin,), end=(10,))
        settings = DataConfig(str(path), seq_len=8, collate=collate, **changes)
        open_training(settings, 1) if split == "train" else open_dataset(settings, split)
        text = caplog.text
        caplog.clear()
        return text

    message = "none of 9 documents holds config.data.collate.begin = (66,) in a row"
    assert f"chats, split train: {message}: are these ids those" in opened(chats, 66)
    assert f"chats, split val: {message}" in opened(chats, 66, "val")
    assert not opened(chats, 65)
    mixture = ((str(chats), 1.0), (str(folder), 1.0))  # one of them has none
    mixed = opened(chats, 65, mixture=mixture)
    assert "set, split train: none of 5 documents holds" in mixed and "chats" not in mixed


def test_few_held_out_documents_are_a_warning(chats, caplog):
    open_dataset(DataConfig(str(chats), seq_len=8), "val")
    assert "chats, split val: documents to evaluate on: 9, which is few" in caplog.text
