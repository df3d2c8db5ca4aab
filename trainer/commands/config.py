"""`torus config`: every field of a config with its meaning, its value, and what set it."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from sharding.fields import field_types

USAGE = """\
usage: torus config --config=CONFIG [--config.PATH=VALUE ...]

Prints every field of CONFIG as it is written on the command line: its value, who set it (default,
file, or command line) and what it means. Nothing is trained or written.

  torus config --config=quickstart
  torus config --config=quickstart --config.optimizer.peak_lr=1e-3
  torus config --config=ladder:100m | grep -v ' default '          # what is not a default
"""


def main(argv: list[str]) -> int:
    """Prints the fields; raises UsageError for what `torus train` would refuse."""
    from trainer.config import Experiment, joined, leaves, load_config, parse_flags

    argv = joined(argv)
    experiment, _ = parse_flags(argv)
    reference = [a.partition("=")[2] for a in argv if a.startswith("--config=")][-1]
    default, file = dict(leaves(Experiment())), dict(leaves(load_config(reference)))
    given = {a.partition("=")[0].removeprefix("--config.") for a in argv}
    meanings = dict(_meanings(Experiment))
    for path, value in leaves(experiment):
        changed = "file" if file[path] != default[path] else "default"
        origin = "command line" if path in given else changed
        text = repr(value) if isinstance(value, tuple) else str(value)
        print(f"--config.{path}={text}".ljust(46), origin.ljust(12), _first(meanings[path]))
        for line in _wrapped(meanings[path])[1:]:
            print(" " * 59, line)
    return 0


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 60) or [""]


def _first(text: str) -> str:
    return _wrapped(text)[0]


def _meanings(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields ("model.rope.theta", meaning) for every leaf of a config dataclass."""
    comments = field_comments(cls)
    for name, kind in field_types(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _meanings(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", comments[name]


def field_comments(cls: Any) -> dict[str, str]:
    """Returns field → its meaning: the comment at the end of its line, or the one above it.

    The comments in the source are the only place where a meaning is written.
    """
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.lstrip().startswith("# "):
                break
            above.insert(0, line.strip().removeprefix("# "))
        behind = re.search(r"  # (.*)$", lines[node.end_lineno - 1])
        found[node.target.id] = behind[1] if behind else " ".join(above)
    return found
