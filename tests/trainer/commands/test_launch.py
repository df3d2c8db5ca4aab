"""What `torus launch` refuses before anything starts, and what it tells trainers on fewer hosts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import UsageError
from tests import tiny
from tests.processes import ROOT
from trainer.commands.launch import _sizes, main
from trainer.recovery.cluster import VARIABLES
from trainer.recovery.policy import choose_hosts, microbatches


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Returns the line that a command is refused with; nothing may have been written."""

    def line(*arguments: str, **variables: str) -> str:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError) as error:
            main([f"--config={ROOT}/tests/tiny.py", f"--workdir={tmp_path}/run", *arguments])
        assert not (tmp_path / "run").exists() and "\n" not in str(error.value)
        return str(error.value)

    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--patience", "-1"), "--patience -1: seconds, at least 0"),
        (("--patience", "nan"), "--patience nan: seconds"),
        (("--patience", "soon"), "invalid float value: 'soon'"),
        (("--grace", "-3"), "--grace -3: seconds"),
        (("--lease", "inf"), "--lease inf: seconds"),
        (("--mesh", "two"), "--mesh two: begins with a number of hosts, 1 to 4"),
        (("--mesh", "5"), "--mesh 5: begins with a number of hosts, 1 to 4"),
        (("--mesh", "0"), "--mesh 0: begins"),
        (("--mesh", "2:tensro=2"), "choose data, fsdp, seq, tensor; did you mean `tensor`?"),
        (("--mesh", "2:tensor=two"), "tensor is a whole number"),
        (("--mesh", "2:tensor=3"), "does not divide over mesh axis tensor = 3"),
        (("--mesh", "4", "--mesh", "3:data=3"), "does not divide over data × fsdp = 3"),
    ],
)
def test_flags_are_checked(refused, arguments, message):
    places = dict(zip(VARIABLES, ("0", "4", "host0"), strict=True))
    assert message in refused(*arguments, **places)


def test_hosts_are_checked(refused):
    assert "JAX_PROCESS_ID = 'x' is not a number" in refused(JAX_PROCESS_ID="x")
    assert "TORUS_DISTRIBUTED is set" in refused(TORUS_DISTRIBUTED="1")


def test_trainers_are_told_their_mesh():
    experiment = tiny.get_config()  # 8 rows
    assert _sizes([], experiment, 4) == {4: []}
    assert _sizes(["4", "2:tensor=2,data=1", "1"], experiment, 4) == {
        4: ["--config.train.accumulation=1"],
        2: [
            "--config.mesh.tensor=2", "--config.mesh.data=1", "--config.train.accumulation=2",
        ],
        1: ["--config.train.accumulation=4"],
    }  # fmt: skip


@given(st.integers(1, 256), st.integers(1, 8), st.integers(1, 16), st.data())
def test_a_device_never_takes_more_rows_at_once_than_on_all_hosts(batch, before, full, data):
    """While the batch has enough divisors; it is never less than the batch, nor more."""
    hosts = data.draw(st.integers(1, full))
    found = microbatches(batch * before, before, full, hosts)
    rows = batch * before
    assert rows % found == 0
    assert found == rows or rows / found / hosts <= rows / before / full


@given(st.lists(st.integers(1, 64), min_size=1), st.integers(0, 64))
def test_the_largest_mesh_that_fits_is_taken(sizes, ready):
    found = choose_hosts(sizes, ready)
    assert found in sizes if found else min(sizes) > ready
    assert all(size > ready or size <= found for size in sizes if found)
