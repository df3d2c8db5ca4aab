"""`torus verify` and a restore agree about a step, whatever happened to its files."""

import gc
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint import steps
from checkpoint.config import CheckpointConfig
from checkpoint.convert.native import create_step
from checkpoint.fingerprint import rows_sums
from checkpoint.manager import CheckpointManager
from checkpoint.manifest import FORMAT, write_record
from checkpoint.steps import CheckpointError, complete_steps, delete_step
from checkpoint.storage import load_step
from checkpoint.tree import flatten
from sharding.errors import UsageError
from tests.checkpoint.damages import OTHERS, flip
from trainer.commands.main import main

META = {"data": {"row": 17}, "name": "tiny"}
# A read that failed may leave others running, which Python tells when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state_of(seed: int) -> dict:
    """A state with chunks of zeros, a scalar of zero, two dtypes and several chunks an array."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(3, 96, 64)).astype(np.float32)
    w[1] = 0
    params = {"w": w, "b": rng.normal(size=7).astype(jnp.bfloat16), "zero": np.zeros((5, 3))}
    params["zero"] = params["zero"].astype(np.float32)
    return {"params": params, "skipped": np.zeros((), np.int32)}


def write_saved(folder, step, state):
    """As a run does, in small chunks."""
    arrays = jax.tree.map(jnp.asarray, state)
    with CheckpointManager(folder, CheckpointConfig(every=1, keep_last=9)) as manager:
        manager.save(step, arrays, META, force=True)


def write_converted(folder, step, state):
    """As a conversion does."""
    named = flatten(state)
    facts = {name: (x.dtype, x.shape) for name, x in named.items()}
    made, sums = create_step(folder, step, facts, META, prefix=""), {}
    for name, x in named.items():
        lead = (0,) * (x.ndim > 2)
        for i in range(x.shape[0] if lead else 1):
            part, lead = (x[i], (i,)) if lead else (x, ())
            made.put(name, lead, part)
            sums[name] = sums.get(name, 0) + rows_sums(part, lead, 0, x.shape)
    made.finish(sums)


WRITERS = {"saved": write_saved, "converted": write_converted}


@pytest.fixture(scope="module", params=WRITERS)
def pristine(request, tmp_path_factory):
    """A folder with steps 1 and 2."""
    folder = tmp_path_factory.mktemp(request.param)
    for step in (1, 2):
        WRITERS[request.param](folder, step, state_of(step))
    return folder


def restored(folder) -> str:
    """Returns what a restore of step 1 raises, "" if it gives back what was saved."""
    truth = state_of(1)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), truth)
    try:
        state, meta = load_step(folder, 1, abstract)
    except (CheckpointError, UsageError) as error:
        return str(error)
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), state, truth)
    assert all(jax.tree.leaves(same)) and meta == META, "other bits came back without a word"
    return ""


def verified(folder, capsys) -> str:
    """Returns what `torus verify` says of step 1, "" if it is sound."""
    status = main(["verify", f"torus:{folder}", "--step", "1"])
    err = capsys.readouterr().err
    assert (status != 0) == bool(err), (status, err)
    assert status == 0 or (status in (1, 2) and err.count("\n") == 1 and len(err) < 2000), err
    return err


def check(pristine, tmp_path, capsys, seed: int, flips: int, others: int) -> dict[str, int]:
    rng = np.random.default_rng(seed)
    kinds = [flip] * flips + [OTHERS[i % len(OTHERS)] for i in range(others)]
    noticed = 0
    for number, damage in enumerate(kinds):
        folder = tmp_path / "damaged"
        shutil.copytree(pristine, folder)
        what = damage(folder / "1", rng)
        by_restore, by_verify = restored(folder), verified(folder, capsys)
        assert bool(by_restore) == bool(by_verify), (
            f"seed {seed}, damage {number}: {what}\nrestore: {by_restore or 'fine'}\n"
            f"verify: {by_verify or 'fine'}"
        )
        noticed += bool(by_restore)
        shutil.rmtree(folder)
    gc.collect()
    return {"damages": len(kinds), "noticed": noticed}


def test_an_intact_step_is_sound(pristine, capsys):
    assert restored(pristine) == verified(pristine, capsys) == ""


def test_verify_and_restore_agree(pristine, tmp_path, capsys):
    """A sample; all of it is below."""
    found = check(pristine, tmp_path, capsys, seed=7, flips=10, others=11)
    assert found["noticed"] >= 5


ARRAYS = [
    7,
    {"w": 7},
    {"w": {"shape": [2]}},
    {"w": {"shape": 2, "dtype": "float32"}},
    {"w": {"shape": [-1], "dtype": "float32"}},
    {"w": {"shape": [2.0], "dtype": "float32"}},
    {"w": {"shape": [2**40, 2**40], "dtype": "float32"}},
    {"w": {"shape": [2], "dtype": "O"}},
    {"w": {"shape": [2], "dtype": "finfo"}},
    {"w": {"shape": [2], "dtype": ["float32"]}},
]


@pytest.mark.parametrize("arrays", ARRAYS, ids=str)
def test_a_manifest_of_another_form_is_refused_though_its_digests_fit(arrays, tmp_path, capsys):
    for item, content in (("manifest", {"format": FORMAT, "arrays": arrays}), ("meta", {})):
        (tmp_path / "1" / item).mkdir(parents=True)
        (tmp_path / "1" / item / "data.json").write_text(json.dumps(content))
    write_record(tmp_path, 1, {})
    for command in (["verify"], ["inspect"], ["diff", f"torus:{tmp_path}"]):
        assert main([*command, f"torus:{tmp_path}"]) == 1
        assert "manifest does not describe arrays" in capsys.readouterr().err


def test_what_is_no_small_file_is_refused_where_json_is_wanted(pristine, tmp_path, capsys):
    shutil.copytree(pristine, folder := tmp_path / "run")
    path = folder / "1/meta/data.json"
    path.unlink()
    os.mkfifo(path)
    assert "is not a regular file" in verified(folder, capsys)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "is not a regular file" in verified(folder, capsys)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    assert "is larger than" in verified(folder, capsys)


def test_a_step_that_is_retired_meanwhile_is_no_damage(pristine, tmp_path, capsys, monkeypatch):
    shutil.copytree(pristine, folder := tmp_path / "run")
    listed = steps.complete_steps(folder)
    delete_step(folder, 1)
    first = iter([listed] * 2)  # as the run deletes it after the command has listed the steps
    monkeypatch.setattr(
        steps, "complete_steps", lambda place: next(first, None) or complete_steps(place)
    )
    assert main(["verify", f"torus:{folder}"]) == 0
    assert "step 1: was deleted meanwhile\nstep 2: 4 arrays" in capsys.readouterr().out


@pytest.mark.soak
def test_verify_and_restore_agree_in_all(pristine, tmp_path, capsys):
    """500 flipped bits and 200 other damages of each way of writing a step."""
    found = check(pristine, tmp_path, capsys, seed=11, flips=500, others=200)
    assert found["noticed"] >= 200
