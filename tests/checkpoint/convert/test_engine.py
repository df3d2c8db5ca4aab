"""The engine holds no more than it may, makes tensors in parts, and hashes what passes."""

import dataclasses
import json
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.config import CheckpointConfig
from checkpoint.convert import engine
from checkpoint.convert.mapping import build, to_ours, to_theirs
from checkpoint.convert.native import CheckedReads, NativeTensors
from checkpoint.manager import CheckpointManager
from checkpoint.steps import CheckpointError
from tests.checkpoint.convert.folders import (
    random_folder,
    random_tensors,
    read_folder,
    same,
    tiny,
    write_folder,
)
from trainer.commands.main import main


class Memory:
    def __init__(self, arrays):
        self.arrays = arrays

    def read(self, name, lead, start, stop):
        return self.arrays[name][lead][start:stop].copy()


def ours_of(family, model, theirs):
    found = {}
    sizes = family.sizes(model)
    for row in family.rows_for(model):
        for o in row.ours:
            found[o.name] = np.zeros(o.shape(sizes.ours), np.float32)
        for element in to_ours(row, sizes):
            part = build(element, Memory(theirs), np.dtype(np.float32))
            found[element.name][element.lead] = part
    return found


@pytest.mark.parametrize("preset", ["llama3.2-1b", "gpt2-124m", "gemma2-2b"])
@given(rows=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_parts_make_the_whole(preset, rows):
    family, model = tiny(preset)
    model = dataclasses.replace(model, vocab=37)  # ours is padded: the last parts hold only zeros
    theirs = random_tensors(family, model)
    ours, sizes = ours_of(family, model, theirs), family.sizes(model)
    split = 0
    for row in family.rows_for(model):
        for elements, source in ((to_ours(row, sizes), theirs), (to_theirs(row, sizes), ours)):
            for element in elements:
                parts = list(element.split(rows))
                made = [build(part, Memory(source), np.dtype(np.float32)) for part in parts]
                whole = build(element, Memory(source), np.dtype(np.float32))
                assert np.concatenate(made).tobytes() == whole.tobytes()
                assert [p.start for p in parts] == list(range(0, element.shape[0], rows))[
                    : len(parts)
                ]
                split += len(parts) > 1
    assert split or rows >= 37


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    limit=st.integers(30, 60),
    stored=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_jobs_stay_within_the_limit(sizes, limit, stored):
    lock, held, most = threading.Lock(), 0, 0

    def work(size):
        def run():
            nonlocal held, most
            with lock:
                held += size
                most = max(most, held)
            return let_go if stored else let_go()

        def let_go():
            nonlocal held
            with lock:
                held -= size

        return run

    crew = engine.InFlight(limit)
    crew.run((size, work(size)) for size in sizes)
    assert held == 0 and max(sizes) <= most <= crew.peak <= limit


@pytest.mark.parametrize("stored", [False, True])
def test_a_failing_job_ends_the_others(stored):
    begun = []

    def work(number):
        def run():
            begun.append(number)
            return store if stored else store()

        def store():
            if number == 3:
                raise OSError("No space left on device")

        return run

    with pytest.raises(OSError, match="No space left"):
        engine.InFlight(1).run((1, work(number)) for number in range(1000))
    assert 4 <= len(begun) < 1000


def test_max_memory(tmp_path, capsys):
    family, model = tiny("qwen3-8b")
    model = dataclasses.replace(model, vocab=20_000, width=256)
    tensors = random_tensors(family, model)
    folder = write_folder(tmp_path / "hf", family.write(model), tensors)
    command = ["convert", str(folder), f"torus:{tmp_path}/start", "--max-memory"]
    assert main([*command, "10"]) == 2
    assert "--max-memory 10: the largest tensor needs 12 MiB" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert main([*command, "15", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["in_flight"] <= 15 * 2**20
    assert main(["convert", f"{tmp_path}/start", f"{tmp_path}/out", "--max-memory", "15"]) == 0
    assert "MiB in flight" in capsys.readouterr().out
    assert same(read_folder(tmp_path / "out"), tensors)


@pytest.fixture
def saved(tmp_path):
    """A step as a run saves it: no checksum in the storage, only fingerprints."""
    state = {"params": {"w": jnp.arange(3 * 40 * 7, dtype=jnp.float32).reshape(3, 40, 7)}}
    with CheckpointManager(tmp_path, CheckpointConfig(chunk_mib=1)) as manager:
        manager.save(1, state, {}, force=True)
    return tmp_path, np.asarray(state["params"]["w"])


@pytest.mark.parametrize("ranges", [[(0, 40)], [(0, 10), (20, 33)], [(5, 20), (0, 5)]], ids=str)
def test_checked_reads_read_the_rest_and_agree(saved, ranges):
    folder, w = saved
    reads = CheckedReads(NativeTensors(folder, 1))
    for layer in range(3):
        for start, stop in [*ranges, ranges[0]]:  # what is asked for twice counts once
            part = reads.read("w", (layer,), start, stop)
            np.testing.assert_array_equal(part, w[layer, start:stop])
    reads.finish()


@pytest.mark.parametrize("ranges", [[(0, 40)], [(0, 3)], [(0, 10), (5, 40)]], ids=str)
def test_checked_reads_refuse_flipped_bits(saved, ranges):
    folder, _ = saved
    data = max((p for p in (folder / "1/state").rglob("d/*")), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    reads = CheckedReads(NativeTensors(folder, 1))
    for layer in range(3):
        for start, stop in ranges:
            reads.read("w", (layer,), start, stop)
    with pytest.raises(CheckpointError, match=r"1 of 1 arrays are not the bits .*: params/w"):
        reads.finish()


def test_a_damaged_run_is_not_converted(tmp_path, capsys):
    folder = random_folder(tmp_path / "hf", "olmo2-7b")
    assert main(["convert", str(folder), f"torus:{tmp_path}/start"]) == 0
    record = tmp_path / "start/checkpoints/0/integrity/data.json"
    from checkpoint.manifest import read_step, write_record

    arrays = read_step(tmp_path / "start/checkpoints", 0)[2]
    name = next(name for name in arrays if name.endswith("mlp/up"))
    write_record(tmp_path / "start/checkpoints", 0, arrays | {name: "0" * 16})
    assert record.exists()
    assert main(["convert", f"{tmp_path}/start", f"hf:{tmp_path}/out"]) == 1
    assert name in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "start"]
