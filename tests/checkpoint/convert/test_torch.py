"""State dicts and folders of torch.distributed.checkpoint: what torch writes, and what it reads."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from checkpoint.convert.formats import open_place
from checkpoint.convert.moves import to_ours
from checkpoint.convert.pickles import Inert, dumps, loads
from checkpoint.convert.pieces import Pieces, PieceTensors, check_grid
from checkpoint.convert.sources import INDEX, SINGLE, Source, adam_settings
from checkpoint.convert.torch_dcp import _CLASSES, DATA, read_dcp
from checkpoint.convert.torch_dcp import INDEX as METADATA
from checkpoint.convert.torchfiles import KNOWN, plain, write_torch
from sharding.errors import MismatchError, UnsafeInputError
from tests.checkpoint.convert import theirs
from tests.checkpoint.convert.folders import random_folder, random_tensors, read_folder, same, tiny
from tests.checkpoint.convert.test_pickles import REASON, Calls, archive
from trainer.commands.main import main

PRESET = "llama3.2-1b"


def state_dict_folder(tmp_path, wrap=lambda tensors: tensors, dtype="float32"):
    """Returns a folder with pytorch_model.bin and config.json, and its tensors."""
    family, model = tiny(PRESET)
    tensors = random_tensors(family, model, dtype)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family.write(model)))
    with (folder / SINGLE).open("wb") as file:
        write_torch(file, wrap(tensors))
    return folder, tensors


WRAPPERS = {
    "plain": lambda t: t,
    "module": lambda t: {f"module.{name}": a for name, a in t.items()},
    "model": lambda t: {"model": t, "step": 3},
    "state_dict": lambda t: {"state_dict": {f"_orig_mod.{n}": a for n, a in t.items()},
                             "optimizer": {"state": [{"exp_avg": np.ones(2, np.float32)}]}},
    "bare": lambda t: {name.removeprefix("model."): a for name, a in t.items()},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_state_dict(wrapper, tmp_path, capsys):
    folder, tensors = state_dict_folder(tmp_path, WRAPPERS[wrapper], "bfloat16")
    assert main(["convert", str(folder), f"torus:{tmp_path}/start"]) == 0
    if wrapper == "state_dict":
        assert "left behind: 1 values (optimizer.state.0.exp_avg)" in capsys.readouterr().out
    assert main(["convert", f"{tmp_path}/start", f"hf:{tmp_path}/out"]) == 0
    assert same(read_folder(tmp_path / "out"), tensors)


def test_a_single_file_beside_its_config_or_with_like(tmp_path, capsys):
    folder, _ = state_dict_folder(tmp_path)
    (folder / SINGLE).rename(folder / "model.pt")
    assert main(["convert", f"{folder}/model.pt", f"torus:{tmp_path}/a"]) == 0
    (tmp_path / "far").mkdir()
    (folder / "model.pt").rename(tmp_path / "far/model.pt")
    capsys.readouterr()
    assert main(["convert", f"{tmp_path}/far/model.pt", f"torus:{tmp_path}/b"]) == 2
    assert "has no config.json; name a folder that has one with --like" in capsys.readouterr().err
    command = ["convert", f"{tmp_path}/far/model.pt", f"torus:{tmp_path}/b"]
    assert main([*command, "--like", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]
    assert main(["diff", f"{tmp_path}/a", f"{tmp_path}/b"]) == 0


def sharded(folder, tensors) -> None:
    names = sorted(tensors)
    where = {}
    for number, part in enumerate((names[:5], names[5:])):
        with (folder / f"part-{number}.bin").open("wb") as file:
            write_torch(file, {name: tensors[name] for name in part})
        where |= dict.fromkeys(part, f"part-{number}.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    (folder / SINGLE).unlink()


def test_shards_with_an_index(tmp_path, capsys):
    folder, tensors = state_dict_folder(tmp_path)
    sharded(folder, tensors)
    assert main(["convert", str(folder), f"torus:{tmp_path}/start"]) == 0
    assert main(["convert", f"{tmp_path}/start", f"hf:{tmp_path}/out"]) == 0
    assert same(read_folder(tmp_path / "out"), tensors)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    for change, status, message in (
        ({"ghost": "part-0.bin"}, 3, "`ghost`, which no file holds"),
        ({"ghost": "../bin/part-0.bin"}, 4, "outside of itself"),
        ({"ghost": "part-9.bin"}, 3, "has no part-9.bin"),
        ({"ghost": 1}, 4, "does not name files"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": index | change}))
        capsys.readouterr()
        assert main(["convert", str(folder), f"torus:{tmp_path}/no"]) == status
        assert message in capsys.readouterr().err
    index.pop("lm_head.weight", None) or index.pop("model.norm.weight")
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    assert main(["convert", str(folder), f"torus:{tmp_path}/no"]) == 3
    assert not (tmp_path / "no").exists()


REFUSED = {
    "no state dict": (lambda t: {"a": {"b": np.ones(2, np.float32)}}, r"there is `a\.b`"),
    "nothing": (lambda t: {}, "holds no tensors; it holds nothing"),
    "numbers": (lambda t: [1, 2, "x"], "holds no tensors; it holds"),
    "two models": (lambda t: {"model": t, "ema": t | {}}, "more than one model: `"),
    "one too many": (lambda t: t | {"x": np.ones(2, np.float32)}, "holds `x`, which the llama"),
    "one too few": (lambda t: {n: a for n, a in t.items() if "layers.1.mlp.up" not in n},
                    "tensors are needed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_containers_that_are_not_understood(name, tmp_path, capsys):
    wrap, message = REFUSED[name]
    folder, _ = state_dict_folder(tmp_path, wrap)
    assert main(["convert", str(folder), f"torus:{tmp_path}/no"]) == 3
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "no").exists()


def test_wrong_commands(tmp_path, capsys):
    folder, _ = state_dict_folder(tmp_path)
    start = f"torus:{tmp_path}/start"
    assert main(["convert", str(folder), start]) == 0
    for arguments, status, message in (
        ([str(folder), start + "2", "--with-optimizer"], 3, "no moments and step of Adam"),
        ([f"{tmp_path}/start", f"hf:{tmp_path}/o", "--with-optimizer"], 2, "hold no optimizer"),
        ([f"{tmp_path}/start", f"zero:{tmp_path}/o"], 2, "only read; written are hf, torus, dcp"),
        ([f"{tmp_path}/start", f"dpc:{tmp_path}/o"], 2, "did you mean `dcp`"),
        ([str(folder), f"ucp:{tmp_path}/o"], 2, "one of the two has to be torus"),
        (
            [f"zero:{folder}/{SINGLE}", f"torus:{tmp_path}/o", "--like", str(folder)],
            2,
            "is not a folder",
        ),
    ):
        capsys.readouterr()
        assert main(["convert", *arguments]) == status
        assert message in capsys.readouterr().err


def test_what_transformers_wrote(tmp_path):
    torch = pytest.importorskip("torch", reason=REASON)
    pytest.importorskip("transformers", reason=REASON)
    model = theirs.build(theirs.FAMILIES["qwen3"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "bin").mkdir()
    (tmp_path / "hf/config.json").rename(tmp_path / "bin/config.json")
    torch.save(model.state_dict(), tmp_path / "bin" / SINGLE)  # the tied head is in there too
    assert main(["convert", f"{tmp_path}/bin", f"torus:{tmp_path}/start"]) == 0
    assert main(["convert", f"{tmp_path}/start", f"hf:{tmp_path}/out"]) == 0
    (tmp_path / "bin/config.json").rename(tmp_path / "hf/config.json")
    assert same(read_folder(tmp_path / "out"), read_folder(tmp_path / "hf"))


# ---------------------------------------------------------------- DCP, with torch


def adam(model):
    import torch

    named = list(model.named_parameters())
    groups = [{"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def one_step(model, optimizer):
    import torch

    torch.manual_seed(1)
    tokens = torch.randint(0, theirs.V, (2, 12))
    optimizer.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()


def state_of(model, optimizer):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optim": state}


@pytest.mark.filterwarnings("ignore")
def test_torch_loads_what_we_write_and_we_what_torch_writes(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason=REASON)
    pytest.importorskip("transformers", reason=REASON)
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model = theirs.build(theirs.FAMILIES["smollm"])
    optimizer = adam(model)
    for _ in range(2):
        one_step(model, optimizer)
    dcp.save({**state_of(model, optimizer), "epoch": 7}, checkpoint_id=tmp_path / "theirs")
    model.config.save_pretrained(tmp_path / "theirs")
    command = ["convert", f"{tmp_path}/theirs", f"torus:{tmp_path}/start", "--with-optimizer"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "moments of Adam: step 2" in output and "betas (0.9, 0.95)" in output
    assert "left behind:" in output and "epoch" in output
    assert main(["convert", f"{tmp_path}/start", f"dcp:{tmp_path}/ours", "--with-optimizer"]) == 0
    again = theirs.build(theirs.FAMILIES["smollm"])
    with torch.no_grad():
        for weight in again.parameters():
            weight.add_(1.0)
    other = adam(again)
    one_step(again, other)  # so that there is state to load into
    state = state_of(again, other)
    tied = state["model"].pop("lm_head.weight")
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=tmp_path / "ours", planner=planner)
    state["model"]["lm_head.weight"] = tied
    set_state_dict(again, other, model_state_dict=state["model"], optim_state_dict=state["optim"])

    def all_equal():
        for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), name
            for key in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(optimizer.state[a][key], other.state[b][key]), (name, key)

    all_equal()
    one_step(model, optimizer)
    one_step(again, other)
    all_equal()  # and the step that follows is the same, bit for bit


SHARDED = """
import os, sys, torch
from torch.distributed import checkpoint as dcp, init_process_group, device_mesh
from torch.distributed.tensor import Shard, Replicate, distribute_tensor
init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=int(sys.argv[2]),
                   world_size=2)
mesh = device_mesh.init_device_mesh("cpu", (2,))
tensors = torch.load(f"{sys.argv[1]}/all.pt")
places = [Shard(0), Shard(1), Replicate()]
state = {n: distribute_tensor(t, mesh, [places[i % 3] if t.ndim > 1 else Shard(0)])
         for i, (n, t) in enumerate(tensors.items())}
dcp.save({"model": state}, checkpoint_id=f"{sys.argv[1]}/sharded")
os._exit(0)  # one interpreter in ten aborts in gloo's threads as it goes down
"""


def test_shards_of_two_processes(tmp_path):
    torch = pytest.importorskip("torch", reason=REASON)
    family, model = tiny(PRESET)
    tensors = random_tensors(family, model)
    torch.save({n: torch.from_numpy(a.copy()) for n, a in tensors.items()}, tmp_path / "all.pt")
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert len(list((tmp_path / "sharded").glob("*.distcp"))) == 2
    (tmp_path / "sharded/config.json").write_text(json.dumps(family.write(model)))
    assert main(["convert", f"{tmp_path}/sharded", f"torus:{tmp_path}/start"]) == 0
    assert main(["convert", f"{tmp_path}/start", f"hf:{tmp_path}/out"]) == 0
    assert same(read_folder(tmp_path / "out"), tensors)


# ---------------------------------------------------------------- DCP, without torch


@pytest.fixture
def folder(tmp_path):
    """A folder that we wrote."""
    random_folder(tmp_path / "hf", PRESET)
    assert main(["convert", f"{tmp_path}/hf", f"torus:{tmp_path}/start"]) == 0
    assert main(["convert", f"{tmp_path}/start", f"dcp:{tmp_path}/dcp"]) == 0
    return tmp_path / "dcp"


def test_there_and_back(folder, tmp_path, capsys):
    capsys.readouterr()
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["arrays"]["model.model.norm.weight"] == {"shape": [24], "dtype": "float32"}
    assert main(["convert", str(folder), f"torus:{tmp_path}/again"]) == 0
    assert main(["diff", f"{tmp_path}/start", f"{tmp_path}/again"]) == 0


def index_of(folder):
    return loads((folder / METADATA).read_bytes(), "x", KNOWN | _CLASSES, plain)


def edited(folder, change) -> None:
    """Rewrites the index after `change(index, a matrix's entry, its place)`."""
    index = index_of(folder)
    stored = index.get("storage_data")
    name = "model.model.embed_tokens.weight"
    entry = index.get("state_dict_metadata")[name]
    place = next(p for key, p in stored.items() if key.get("fqn") == name)
    change(index, entry, place)
    (folder / METADATA).write_bytes(dumps(index))


def chunk(entry):
    return entry.state["chunks"][0].state


EDITS = {
    "a file outside": (lambda i, e, p: p.state.update(relative_path="../dcp/" + DATA), 4,
                       "outside of itself"),
    "an absolute file": (lambda i, e, p: p.state.update(relative_path="/etc/passwd"), 4,
                         "outside of itself"),
    "a file that is missing": (lambda i, e, p: p.state.update(relative_path="x.distcp"), 3,
                               "has no x.distcp"),
    "beyond the file": (lambda i, e, p: p.state.update(offset=2**40), 4, "bytes"),
    "a negative place": (lambda i, e, p: p.state.update(offset=-1), 4, "not sizes"),
    "a huge length": (lambda i, e, p: p.state.update(length=2**61), 4, "bytes"),
    "another chunk": (lambda i, e, p: p.state.update(next(
        q.state for q in i.get("storage_data").values() if q.get("length") != p.get("length"))),
        4, "is not the tensor of the index"),
    "compressed": (lambda i, e, p: p.state.update(transform_descriptors=["zstd"]), 4,
                   "stored transformed"),
    "a huge size": (lambda i, e, p: e.state.update(size=Inert("torch.Size", ((2**50, 24),))), 4,
                    "its pieces end at"),
    "a gap": (lambda i, e, p: chunk(e).update(offsets=Inert("torch.Size", ((1, 0),))), 4, ""),
    "other axes": (lambda i, e, p: e.state.update(size=Inert("torch.Size", ((5,),))), 4,
                   "its pieces have other axes"),
    "no chunks": (lambda i, e, p: e.state["chunks"].clear(), 4, "pieces end at 0"),
    "twice": (lambda i, e, p: e.state["chunks"].append(e.state["chunks"][0]), 4, "there twice"),
    "an unknown dtype": (lambda i, e, p: e.state["properties"].__setattr__("state", (1,)), 4,
                         "not an index of tensors"),
    "no storage": (lambda i, e, p: i.state.pop("storage_data"), 4, "not an index of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_index_that_lies(name, folder, tmp_path, capsys):
    change, status, message = EDITS[name]
    edited(folder, change)
    before = sorted(p.name for p in tmp_path.iterdir())
    capsys.readouterr()
    assert main(["convert", str(folder), f"torus:{tmp_path}/no"]) == status
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_newest_step_one_level_down_is_read(folder, tmp_path, capsys):
    parent = tmp_path / "checkpoints"
    parent.mkdir()
    for name in ("step_5", "step_12"):
        shutil.copytree(folder, parent / name)
    (parent / "step_5" / METADATA).write_bytes(b"")
    (parent / "logs").mkdir()
    assert open_place(str(parent)) == ("dcp", parent)
    assert read_dcp(parent).facts == read_dcp(folder).facts
    (parent / "step_5").rename(parent / "best")
    with pytest.raises(MismatchError, match=r"has no .metadata; name one of best, step_12"):
        read_dcp(parent)
    shutil.rmtree(parent / "best")
    shutil.move(parent / "step_12", tmp_path / "outside")
    (parent / "step_12").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeInputError, match="is a link out of its folder"):
        read_dcp(parent)
    (parent / "step_12").unlink()
    with pytest.raises(MismatchError, match=r"has no .metadata$"):
        read_dcp(parent)


def test_an_index_that_calls(folder, tmp_path, capsys):
    evil = pickle.dumps(Calls(os.system, f"touch {tmp_path}/ran"), 4)
    (folder / METADATA).write_bytes(evil)
    for command in (["convert", str(folder), f"torus:{tmp_path}/no"], ["inspect", str(folder)],
                    ["diff", str(folder), str(folder)]):  # fmt: skip
        capsys.readouterr()
        assert main(command) == 4
        assert "names `posix.system`" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "no").exists()


def test_a_chunk_that_calls(folder, tmp_path, capsys):
    evil = archive(pickle.dumps(Calls(os.system, f"touch {tmp_path}/ran"), 4))
    data = (folder / DATA).read_bytes()
    (folder / DATA).write_bytes(data + evil)
    edited(folder, lambda i, e, p: p.state.update(offset=len(data), length=len(evil)))
    assert main(["convert", str(folder), f"torus:{tmp_path}/no"]) == 4
    assert "names `posix.system`" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "no").exists()


def test_links_out_of_the_folder(folder, tmp_path, capsys):
    (folder / DATA).rename(tmp_path / "elsewhere")
    (folder / DATA).symlink_to(tmp_path / "elsewhere")
    assert main(["convert", str(folder), f"torus:{tmp_path}/no"]) == 4
    assert "link out of its folder" in capsys.readouterr().err
    bin_folder, _ = state_dict_folder(tmp_path)
    (bin_folder / SINGLE).rename(tmp_path / "other")
    (bin_folder / SINGLE).symlink_to(tmp_path / "other")
    assert main(["convert", str(bin_folder), f"torus:{tmp_path}/no"]) == 4
    assert "link out of its folder" in capsys.readouterr().err


FOUND = {
    "dcp": (".metadata", "__0_0.distcp"), "zero": ("latest", "config.json"),
    "ucp": ("latest_universal", "config.json"), "torch": ("pytorch_model.bin", "config.json"),
    "hf": ("latest", "pytorch_model.bin", "config.json", "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_formats_are_found_out(kind, tmp_path):
    for name in FOUND[kind]:
        (tmp_path / name).touch()
    assert open_place(str(tmp_path)) == (kind, tmp_path)
    assert open_place(f"ucp:{tmp_path}") == ("ucp", tmp_path)
    for name in ("x.pt", "x.bin", "x.pth"):
        (tmp_path / name).touch()
        assert open_place(f"{tmp_path}/{name}")[0] == "torch"


def test_settings_and_steps_that_are_none():
    strange = {"lr": Inert("x"), "betas": (0.9, 0.9, 0.9), "eps": 1e-8, "weight_decay": None}
    assert adam_settings(strange) == {"eps": 1e-8}
    assert adam_settings({"lr": 1, "betas": [0.9, 0.95]}) == {"lr": 1, "betas": [0.9, 0.95]}
    empty = {part: PieceTensors({}) for part in ("params", "mu", "nu")}
    for step, message in ((None, "no moments and step"), (2**31, "is at step"), (-1, "at step")):
        with pytest.raises(MismatchError, match=message):
            to_ours(Source(empty, step), *tiny(PRESET), None, optimizer=True)


def test_grids():
    def pieces(*cells):
        class Cell:
            def __init__(self, shape):
                self.shape = shape

        found = tuple((start, Cell(shape)) for start, shape in cells)
        check_grid(Pieces(np.dtype("float32"), (4, 6), found), "x")

    pieces(((0, 0), (4, 6)))
    pieces(((0, 0), (1, 6)), ((1, 0), (3, 6)))
    pieces(*[((i, j), (2, 3)) for i in (0, 2) for j in (0, 3)])
    for wrong in (
        [((0, 0), (3, 6))],
        [((0,), (4,))],
        [((0, 0, 0), (4, 6, 1))],
        [((0, 0), (2, 6)), ((1, 0), (3, 6))],
        [((i, j), (2, 3)) for i in (0, 2) for j in (0, 3)][:3],
        [((0, 0), (4, 3)), ((0, 3), (4, 3)), ((0, 3), (4, 3))],
    ):
        with pytest.raises(UnsafeInputError, match="x: "):
            pieces(*wrong)
