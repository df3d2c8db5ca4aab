"""Makes Python find Torus's packages, whatever folders and files of the same names lie nearer.

Research repositories have a `trainer.py` or a `models/` too, and Python prefers what is in the
working directory or on PYTHONPATH. A notebook or script beside such names says `import torus`
before it imports any of them. The command `torus` does so, and so does every process that Torus
starts: this file by its path, followed by the module to run.
"""

import os
import runpy
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

PACKAGES = ("checkpoint", "configs", "models", "sharding", "trainer")
ROOT = os.path.dirname(os.path.realpath(__file__))


class _Finder:
    """Finds the packages in `ROOT`, and nothing else."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT]) if name in PACKAGES else None


def run() -> int:
    """Runs the command line and returns its exit status."""
    from trainer.commands.main import run

    return run()


def module_command(module: str) -> list[str]:
    """Returns the command that runs a module of this very Torus from any working directory."""
    return [sys.executable, "-P", os.path.join(ROOT, "torus.py"), module]


def call(module: str, function: str) -> None:
    """Calls a function of Torus by name: what a process of a pool unpickles first."""
    getattr(import_module(module), function)()


def _claim_names() -> None:
    for name in PACKAGES:
        if name in sys.modules:
            module = sys.modules[name]
            place = next(iter(getattr(module, "__path__", [])), getattr(module, "__file__", ""))
            if os.path.dirname(os.path.realpath(place)) != ROOT:
                raise ImportError(
                    f"`{name}` was imported from {place}, and Torus has a package of that name: "
                    "one process cannot have both, so rename the other one"
                )
    sys.meta_path.insert(0, _Finder)
    sys.modules["torus"] = sys.modules[__name__]  # also where this file is the program


_claim_names()
if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
