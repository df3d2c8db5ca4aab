"""What any mesh saved, any mesh restores bit for bit and trains on from."""

import numpy as np

from tests.checkpoint import matrix
from tests.trainer.test_step import TOLERANCE

MESHES = {"one": {"fsdp": 1}, "data2-fsdp4": {"data": 2, "fsdp": 4}}


def check(whole: dict, moved: dict) -> None:
    """Restoring compared the bits; here the next losses: those of the run that was not stopped."""
    assert len(moved) == len(whole) ** 2
    for pair, losses in moved.items():
        saved = pair.split(" > ")[0]
        assert len(losses) == 5
        np.testing.assert_allclose(losses, whole[saved], rtol=TOLERANCE, err_msg=pair)


def test_two_meshes_restore_what_two_saved(tmp_path):
    places = {name: matrix.Place(axes) for name, axes in MESHES.items()}
    whole = {name: matrix.save(place, tmp_path / name) for name, place in places.items()}
    moved = {
        f"{saved} > {name}": matrix.restore(place, tmp_path / saved)
        for name, place in places.items()
        for saved in MESHES
    }
    check(whole, moved)
