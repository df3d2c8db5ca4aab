"""What any mesh saved, any mesh restores bit for bit and trains on from."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint import matrix
from tests.processes import run_processes
from tests.trainer.test_step import TOLERANCE

JOB = Path(__file__).parent / "matrix.py"

# name: (processes, devices of each, meshes)
JOBS = {
    "one process": (1, 8, {
        "one": {"fsdp": 1}, "fsdp2": {"fsdp": 2}, "tensor4": {"fsdp": 1, "tensor": 4},
        "fsdp8": {"fsdp": 8}, "data2-fsdp4": {"data": 2, "fsdp": 4},
        "zero1": {"data": 4, "fsdp": 2, "zero": 1},
        "fsdp2-seq2-tensor2": {"fsdp": 2, "seq": 2, "tensor": 2},
    }),
    "two processes of 4": (2, 4, {
        "2p-fsdp8": {"fsdp": 8}, "2p-data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    }),
    "two processes of 1": (2, 1, {"2p-fsdp2": {"fsdp": 2}}),
    "four processes of 2": (4, 2, {"4p-fsdp4-tensor2": {"fsdp": 4, "tensor": 2}}),
    "four processes of 1": (4, 1, {"4p-data2-fsdp2": {"data": 2, "fsdp": 2}}),
}  # fmt: skip
FEW = ("tensor4", "data2-fsdp4")  # the first has more devices over tensor than KV heads


def check(whole: dict, moved: dict) -> None:
    """Restoring compared the bits; here the next losses: those of the run that was not stopped."""
    assert len(moved) == len(whole) ** 2
    for pair, losses in moved.items():
        saved = pair.split(" > ")[0]
        assert len(losses) == 5
        np.testing.assert_allclose(losses, whole[saved], rtol=TOLERANCE, err_msg=pair)


@pytest.mark.soak  # tests/trainer/test_resume.py moves a run to two other meshes on every change
def test_two_meshes_restore_what_two_saved(tmp_path):
    places = {name: matrix.Place(JOBS["one process"][2][name]) for name in FEW}
    whole = {name: matrix.save(place, tmp_path / name) for name, place in places.items()}
    moved = {
        f"{saved} > {name}": matrix.restore(place, tmp_path / saved)
        for name, place in places.items()
        for saved in FEW
    }
    check(whole, moved)


@pytest.mark.multiprocess
@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)  # 12 compilations and 144 runs, on a machine with other work too
def test_every_mesh_restores_what_every_mesh_saved(tmp_path):
    whole = run("save", JOBS, tmp_path)
    assert len(whole) == 12
    check(whole, run("restore", JOBS, tmp_path, saved=list(whole)))


def run(what: str, jobs: dict, folder: Path, saved: list[str] | None = None) -> dict:
    found = {}
    for processes, devices, meshes in jobs.values():
        arguments = [what, folder, json.dumps(meshes), json.dumps(saved)]
        results = run_processes(JOB, processes, devices, arguments, timeout=3600)
        line = next(x for x in results[0].stdout.splitlines() if x.startswith("RESULT "))
        found |= json.loads(line.removeprefix("RESULT "))
    return found
