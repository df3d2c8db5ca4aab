"""Version ranges, and the conflicts they show."""

import time

import pytest

from trainer.packages import (
    STACK,
    check_packages,
    check_platform_packages,
    declared_requirements,
    library_versions,
    satisfies,
    torus_version,
)


@pytest.mark.parametrize(
    ("version", "ranges", "fits"),
    [
        ("0.10.2", ">=0.10,<0.13", True),
        ("0.13.0", ">=0.10,<0.13", False),
        ("0.9.9", ">=0.10", False),
        ("0.12.0.1", "<=0.12", False),
        ("1.0", "==1.0.0", True),
        ("0.0.42.1", "==0.0.42.*", True),
        ("0.0.43", "==0.0.42.*", False),
        ("1.5", "!=1.5", False),
        ("1.5.1", "!=1.5.*", False),
        ("1.6", "!=1.5.*", True),
        ("1.4.5", "~=1.4.2", True),
        ("1.5", "~=1.4.2", False),
        ("2.9", "~=2.2", True),
        ("1.4", "~=1.4.2", False),
        ("2.0.0rc1", ">=2.0", True),
        ("1.1", ">1.0", True),
        ("3.0+cu13", ">=3", True),
        ("3.0", "", True),
    ],
)
def test_satisfies(version, ranges, fits):
    assert satisfies(version, ranges) == fits


def _lookup(**changes):
    packages = {name: ("1.0", []) for name in STACK}
    packages["jax"] = ("1.0", ["jaxlib<=1.0,>=1.0", 'libtpu==0.5.*; extra == "tpu"'])
    packages |= {name.replace("_", "-"): entry for name, entry in changes.items()}
    return packages.get


def test_all_fit():
    declared = ["jax>=0.9,<2", "rich>=13", "orbax_checkpoint[gcs] >= 0.5"]
    assert check_packages(_lookup(), declared) == []


def test_outside_our_range():
    (line,) = check_packages(_lookup(), ["jax>=1.1,<2"])
    assert line == ('torus needs jax>=1.1,<2, but 1.0 is installed: pip install "jax>=1.1,<2"')


def test_outside_the_range_of_another_package():
    (line,) = check_packages(_lookup(jaxlib=("0.9", [])), [])
    assert line.startswith("jax needs jaxlib<=1.0,>=1.0, but 0.9 is installed")


def test_missing():
    (line,) = check_packages(_lookup(grain=None), ["grain>=0.2"])
    assert line.startswith("torus needs grain>=0.2, which is not installed")


def test_platform_packages_are_a_matter_of_their_own():
    newer = _lookup(libtpu=("0.6", []))
    assert check_packages(newer, []) == []
    (line,) = check_platform_packages(newer)
    assert line.startswith("jax needs libtpu==0.5.*, but 0.6 is installed")
    assert check_platform_packages(_lookup(libtpu=("0.5.1", []))) == []
    assert check_platform_packages(_lookup()) == []


def test_installed_packages_fit_and_the_check_is_quick():
    assert check_packages() == []
    start = time.perf_counter()
    for _ in range(3):
        check_packages()
    assert (time.perf_counter() - start) / 3 < 0.15  # 20 ms on an idle machine


def test_what_is_declared_and_installed():
    assert any(text.startswith("jax>=") for text in declared_requirements())
    assert set(STACK) <= set(library_versions())
    assert torus_version()[0].isdigit()
