"""The console script `torus`: finds the subcommand, and turns failures into one line and a status.

Exit statuses: 0 success, 1 the command found a failure, 2 the user's mistake, 3 an input that does
not match what it should be, 4 an input that is damaged or unsafe, 5 an
object store that refuses or does not answer, 71 all rewinds are spent, 77 a
device or host gave other bits than it must, 130 interrupted.
Only the chosen command's module is imported; this file and the table it reads import no JAX.
"""

import gc
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from checkpoint.steps import CheckpointError
from sharding.errors import UsageError, nearest
from trainer.commands import COMMANDS
from trainer.recovery.health import Unhealthy
from trainer.terminal import escaped_streams

_ON_HOST = ("convert", "diff", "inspect", "verify")  # the accelerators may belong to a run
USAGE = """\
Torus trains language models with JAX: one config file, one command.

usage: torus COMMAND [arguments]        torus COMMAND --help

{commands}

Start here:
  torus doctor                                         # is this machine ready?
  torus train --config=quickstart --workdir=runs/a     # train a small model
  torus config --config=quickstart                     # every field, its value and its meaning
  torus train --config=quickstart --config.optimizer.peak_lr=1e-3 --workdir=runs/b
  torus sample runs/a --prompt="The "                  # use it
  torus report runs/a                                  # see how training went

Every field of a config can be set from the command line as --config.PATH=VALUE. Running the same
train command again resumes the run where it stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `torus` with `argv` (the process's arguments by default) and returns its exit status.

    Whatever it prints meanwhile is escaped: much of it are names and texts from files.
    """
    with escaped_streams():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str]) -> int:
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()  # a closed pipe must show here, not in the interpreter's shutdown
        return status
    except UsageError as error:
        return _fail(error, error.status)
    except BrokenPipeError:
        # `torus ... | head`: nobody reads on, which is no error. The interpreter flushes stdout
        # once more when it exits, so it must find an open file there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointError, ConnectionError) as error:  # storage that fails or does not answer
        return _fail(error, 1)
    except Unhealthy as error:
        return _fail(error, error.status)
    except KeyboardInterrupt:
        print("torus: interrupted", file=sys.stderr)
        return 130


def run(work: Callable[[], int] = main) -> int:
    """Runs `work`; a process that failed ends at once: a save may have left threads that wait.

    Returns the exit status of what succeeded or was interrupted.
    """
    with escaped_streams():
        try:
            status = work()
        except Exception:
            traceback.print_exc()
            status = 1
    if status not in (0, 130):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def usage() -> str:
    """Returns the help screen, commands by group."""
    width = max(len(name) for name in COMMANDS)
    lines = []
    for group in dict.fromkeys(group for group, _ in COMMANDS.values()):
        lines.append(f"{group}:")
        lines += [f"  {n:<{width}}  {does}" for n, (of, does) in COMMANDS.items() if of == group]
    return USAGE.format(commands="\n".join(lines))


def _dispatch(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if name in ("help", "-h", "--help"):
        if not rest:
            print(usage(), end="")
            return 0
        name, rest = rest[0], ["--help"]
    if name in ("version", "--version") or rest == ["--version"]:
        from trainer.packages import torus_version

        print(f"torus {torus_version()}")
        return 0
    if name not in COMMANDS:
        raise UsageError(
            f"no command `{name}`{nearest(name, COMMANDS)} (commands: {', '.join(COMMANDS)})"
        )
    command = import_module(f"trainer.commands.{name}")
    if "-h" in rest or "--help" in rest:
        print(command.USAGE.rstrip())
        return 0
    if name in _ON_HOST:
        os.environ["JAX_PLATFORMS"] = "cpu"
        gc.set_threshold(100_000)  # or all that JAX imports is searched for cycles again and again
    return command.main(rest)


def _fail(error: Exception, status: int) -> int:
    print(f"torus: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run())
