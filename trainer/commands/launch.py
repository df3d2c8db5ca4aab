"""`torus launch`: `torus train` under a supervisor that starts it again until it is done."""

import os
import sys

from sharding.errors import UsageError, nearest
from trainer.commands.parser import CommandParser

USAGE = """\
usage: torus launch [--processes N] [--grace S] [--limit PHASE=SECONDS ...] [--tries N]
                    [--patience S] --config=CONFIG --workdir=RUN [--config.PATH=VALUE ...]

Runs `torus train` with the same arguments, and starts it again after a crash, or after a hang: a
process that stays in one phase longer than its limit has its stacks printed and is killed. The run
goes on from its newest intact checkpoint and ends on the same bits as one that nothing disturbed.

  torus launch --config=quickstart --workdir=runs/a
  torus launch --processes 2 --limit step=60 --config=quickstart --workdir=runs/b

  --processes N          trainers on this host, a JAX job of N processes (1)
  --grace S              seconds to save and end after SIGTERM or Ctrl-C (60); a second one ends
                         all at once
  --limit PHASE=SECONDS  of start, data, restore, compile, step, eval, save or end, instead of one
                         that is learned: 20 times the slowest of 100, at least 10 s
  --tries N              give up after N starts in a row without a new checkpoint (3)
  --patience S           seconds to wait for the other hosts (600)

On several hosts run the same command on each, with the host's number in JAX_PROCESS_ID, how many
there are in JAX_NUM_PROCESSES and the first one's address in JAX_COORDINATOR_ADDRESS. They agree
through RUN/launch, so RUN is a folder that all of them see.

What happened is in RUN/incidents.jsonl. Exit status: 0 finished, 64 a mistake in the command or
config, 65 an input is damaged or does not match, 69 the other hosts did not come, 70 no progress,
76 stopped by SIGTERM and saved (start it again), 130 stopped by Ctrl-C.
"""
_SEVERAL = (
    "learns of other hosts from JAX_PROCESS_ID, JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS; see "
    "torus launch --help"
)


def main(argv: list[str]) -> int:
    """Returns the exit status of the supervised run."""
    from trainer.config import parse_flags, validate
    from trainer.recovery.progress import PHASES
    from trainer.recovery.supervisor import Options, Supervisor
    from trainer.run import check_workdir

    parser = CommandParser("launch")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--grace", type=float, default=60.0)
    parser.add_argument("--limit", action="append", default=[])
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--patience", type=float, default=600.0)
    own, rest = parser.parse_known_args(argv)
    if own.processes < 1 or own.tries < 1 or own.grace < 0:
        raise UsageError("--processes and --tries are at least 1, --grace at least 0")
    if "TORUS_DISTRIBUTED" in os.environ:
        raise UsageError(f"TORUS_DISTRIBUTED is set: `torus launch` {_SEVERAL}")
    hosts, host = (
        int(os.environ.get(f"JAX_{name}", default))
        for name, default in (("NUM_PROCESSES", "1"), ("PROCESS_ID", "0"))
    )
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "127.0.0.1").rpartition(":")
    if not 0 <= host < hosts:
        raise UsageError(f"JAX_PROCESS_ID = {host} of JAX_NUM_PROCESSES = {hosts}: {_SEVERAL}")
    experiment, flags = parse_flags(rest, workdir="folder of the run, local or gs://")
    validate(experiment)
    check_workdir(flags["workdir"], experiment)
    command = [sys.executable, "-m", "trainer.commands.main", "train", *rest]
    limits = dict(_limit(text, PHASES) for text in own.limit)
    options = Options(
        command, flags["workdir"], own.processes, own.grace, limits, own.tries,
        host, hosts, address[0] or address[2], own.patience,
    )  # fmt: skip
    return Supervisor(options).run()


def _limit(text: str, phases: tuple[str, ...]) -> tuple[str, float]:
    phase, _, seconds = text.partition("=")
    if phase not in phases:
        raise UsageError(f"--limit {text}: choose {', '.join(phases)}{nearest(phase, phases)}")
    try:
        value = float(seconds)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UsageError(f"--limit {text}: seconds, more than 0")
    return phase, value
