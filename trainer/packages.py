"""Which versions of the packages Torus stands on are installed, and whether they fit together.

Reads package metadata only and imports none of the packages, so that a wrong install is one clear
line before training starts instead of an ImportError from their depths. Versions are compared by
their release numbers; the ranges are those of Torus's own metadata and of the packages on one
another.
"""

import importlib.metadata
import re
import tomllib
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from sharding.errors import UsageError, install_hint

DISTRIBUTION = "torus-train"
# The five the stack is built from, and what they share: a wrong one of these breaks the others.
STACK = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "ml-collections",
    "numpy",
)  # fmt: skip
# Platform packages and the extra of jax that says which version it wants of them.
_PLATFORM = {"libtpu": "tpu", "jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13"}


Lookup = Callable[[str], tuple[str, list[str]] | None]


def check_packages(
    lookup: Lookup | None = None, declared: Iterable[str] | None = None
) -> list[str]:
    """Returns one line per package of the stack that is missing or outside a declared range.

    An empty list means that all fit; about 20 ms. `lookup` (name -> version and requirements, or
    None) and `declared` (Torus's own requirements) stand in for the installed metadata in tests.
    """
    return _conflicts(STACK, lookup or _installed, declared)


def check_platform_packages(lookup: Lookup | None = None) -> list[str]:
    """Returns one line per installed libtpu or CUDA plugin that is not the one JAX asks for.

    Apart from `check_packages`, because a libtpu that is used only to compile ahead of time may
    well be newer than the one that JAX pins.
    """
    return _conflicts(tuple(_PLATFORM), lookup or _installed, ())


def _conflicts(names: tuple[str, ...], lookup: Lookup, declared: Iterable[str] | None) -> list[str]:
    found = {name: lookup(name) for name in (*STACK, *_PLATFORM)}
    if declared is None:
        declared = declared_requirements()
    wanted = [("torus", text) for text in declared]
    wanted += [(name, text) for name, got in found.items() if got for text in got[1]]
    problems = []
    for owner, text in wanted:
        name, ranges, marker = _split(text)
        if name not in names or not _applies(owner, name, marker):
            continue
        installed = found[name]
        if installed is None and name not in _PLATFORM:
            has = "which is not installed"
        elif installed is not None and not satisfies(installed[0], ranges):
            has = f"but {installed[0]} is installed"
        else:
            continue
        problems.append(f'{owner} needs {name}{ranges}, {has}: pip install "{name}{ranges}"')
    return list(dict.fromkeys(problems))


def data_library(module: str) -> Any:
    """Returns a module of the libraries behind the extra `data`.

    Raises:
      UsageError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UsageError(f"{package} is not installed: {install_hint('data')}") from None


def library_versions() -> dict[str, str]:
    """Returns the installed versions of the stack and of platform packages, for a run's record."""
    found = {name: _installed(name) for name in (*STACK, *_PLATFORM)}
    return {name: got[0] for name, got in found.items() if got}


def declared_requirements() -> list[str]:
    """Returns Torus's own requirements: of the checkout it runs from, or as installed."""
    project = _checkout()
    if project is not None:
        return list(project["dependencies"])
    return importlib.metadata.requires(DISTRIBUTION) or []


def torus_version() -> str:
    """Returns the version of Torus itself."""
    project = _checkout()
    return project["version"] if project else importlib.metadata.version(DISTRIBUTION)


def satisfies(version: str, ranges: str) -> bool:
    """Returns whether a version lies in comma-separated ranges such as ">=0.10,<0.13".

    Compares release numbers: a pre-release counts as its release.
    """
    return all(_within(_release(version), clause) for clause in ranges.split(",") if clause)


def _checkout() -> dict[str, Any] | None:
    """The [project] table beside this code, or None where Torus runs from site-packages."""
    path = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if not path.exists():
        return None
    project = tomllib.loads(path.read_text())["project"]
    return project if project["name"] == DISTRIBUTION else None


def _installed(name: str) -> tuple[str, list[str]] | None:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return distribution.version, list(distribution.requires or [])


def _split(requirement: str) -> tuple[str, str, str]:
    """Splits "jax[tpu] >=0.10, <0.13 ; extra == 'x'" into name, ranges and marker."""
    text, _, marker = requirement.partition(";")
    match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?([^)]*)\)?", text)
    assert match, requirement
    name = re.sub(r"[-_.]+", "-", match[1]).lower()
    return name, re.sub(r"\s", "", match[2]), marker.strip()


def _applies(owner: str, name: str, marker: str) -> bool:
    """Whether a requirement counts: no marker, or the extra of jax for a platform package."""
    if name in _PLATFORM:
        return owner == "jax" and marker.replace("'", '"') == f'extra == "{_PLATFORM[name]}"'
    return not marker


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version.strip())
    return tuple(int(part) for part in match[1].split(".")) if match else (0,)


def _within(version: tuple[int, ...], clause: str) -> bool:
    match = re.match(r"(===|~=|==|!=|>=|<=|>|<)(.+)", clause)
    if match is None:
        return True
    operator, text = match[1], match[2]
    bound = _release(text)
    if text.endswith(".*"):
        same = version[: len(bound)] == bound
        return same if operator == "==" else not same
    if operator == "~=":
        return version[: len(bound) - 1] == bound[:-1] and _padded(version, bound) >= bound
    length = max(len(version), len(bound))
    left, right = (v + (0,) * (length - len(v)) for v in (version, bound))
    return {
        "==": left == right, "===": left == right, "!=": left != right,
        ">=": left >= right, "<=": left <= right, ">": left > right, "<": left < right,
    }[operator]  # fmt: skip


def _padded(version: tuple[int, ...], bound: tuple[int, ...]) -> tuple[int, ...]:
    return version + (0,) * (len(bound) - len(version))
