"""`torus launch`: `torus train` under a supervisor that starts it again until it is done."""

import math
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from checkpoint.steps import is_remote
from sharding.config import AXES
from sharding.errors import UsageError, nearest
from trainer.commands.parser import CommandParser
from trainer.recovery.cluster import find_cluster
from trainer.recovery.policy import microbatches

if TYPE_CHECKING:
    from trainer.config import Experiment

USAGE = """\
usage: torus launch [--processes N] [--grace S] [--limit PHASE=SECONDS ...] [--tries N]
                    [--mesh HOSTS[:AXIS=SIZE,...] ...] [--lease S] [--patience S]
                    --config=CONFIG --workdir=RUN [--config.PATH=VALUE ...]

Runs `torus train` with the same arguments, and starts it again after a crash, or after a hang: a
process that stays in one phase longer than its limit has its stacks printed and is killed. The run
goes on from its newest intact checkpoint, or from a snapshot in memory that is newer (one in 10
steps; --config.checkpoint.snapshot_every), and ends on the same bits as one that nothing disturbed.

  torus launch --config=quickstart --workdir=runs/a
  torus launch --processes 2 --limit step=60 --config=quickstart --workdir=runs/b

  --processes N          trainers on this host, a JAX job of N processes (1)
  --grace S              seconds to save and end after SIGTERM or Ctrl-C (60); a second Ctrl-C
                         ends all at once
  --limit PHASE=SECONDS  of start, data, restore, compile, step, eval, save or end, instead of one
                         that is learned: 20 times the slowest of 100, at least 10 s
  --tries N              give up after N starts in a row without a new checkpoint (3)
  --patience S           seconds to wait for enough hosts, or for a full disk (600)

Several hosts run the same command. They learn of each other from `srun`, from GKE's list of a TPU
slice, or from JAX_PROCESS_ID, JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS: this host's number,
how many there are, and where the first one is. They agree through RUN/launch, so RUN is a folder
that all of them see. tpu_scripts/ has what starts them: tpu.sh, slurm.sbatch, jobset.yaml.

  --mesh HOSTS[:AXIS=SIZE,...]   how many hosts may train, and with which axes of config.mesh; once
                         for each. Hosts beyond the largest are spares. When one is lost a spare
                         takes its place, else the run goes on with the next smaller mesh, and on
                         the larger one again when the host is back. The rows of a batch and their
                         order stay; fewer hosts take them in more microbatches. Without it all
                         hosts are needed.
  --lease S              seconds of silence after which a host is lost (15; 75 on object storage)

  torus launch --mesh 4 --mesh 2 --mesh 1:fsdp=2 --config=quickstart --workdir=/shared/run

What happened is in RUN/incidents.jsonl. SIGTERM and Ctrl-C save and end; so does SIGUSR2, with 78.
What could not be saved within --grace is told there, and on the console, as lost_steps.

Exit status, and what a scheduler should do
   0  finished                                               nothing
  64  a mistake in the command or config                     not try again
  65  an input is damaged or does not match                  not try again
  69  too few hosts came                                     try again after a while
  70  several tries in a row without a new checkpoint        not try again, call somebody
  71  the budget of rewinds is spent                         not try again, call somebody
  73  RUN cannot be written                                  try again after a while
  75  this host cannot start trainers                        try again
  76  stopped by SIGTERM, saved                              try again, it does not count
  77  this host computes wrongly (name in RUN/launch/suspects)  try again without it
  78  stopped by SIGUSR2, saved                              try again with another size
 130  stopped by Ctrl-C, saved                               nothing
   2  a mistake found before anything was started            not try again
"""


def main(argv: list[str]) -> int:
    """Returns the exit status of the supervised run."""
    from trainer.config import parse_flags, validate
    from trainer.lock import check_unlocked
    from trainer.recovery.progress import PHASES
    from trainer.recovery.supervisor import Options, Supervisor
    from trainer.run import check_workdir

    parser = CommandParser("launch")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--grace", type=float, default=60.0)
    parser.add_argument("--limit", action="append", default=[])
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--patience", type=float, default=600.0)
    parser.add_argument("--mesh", action="append", default=[])
    parser.add_argument("--lease", type=float)
    own, rest = parser.parse_known_args(argv)
    if own.processes < 1 or own.tries < 1:
        raise UsageError("--processes and --tries are at least 1")
    for name in ("grace", "patience", "lease"):
        if (seconds := getattr(own, name)) is not None and not 0 <= seconds < math.inf:
            raise UsageError(f"--{name} {seconds:g}: seconds, at least 0")
    if "TORUS_DISTRIBUTED" in os.environ:
        raise UsageError("TORUS_DISTRIBUTED is set: `torus launch` finds hosts by itself; unset it")
    cluster = find_cluster(os.environ)
    experiment, flags = parse_flags(rest, workdir="folder of the run, local or gs://")
    validate(experiment)
    check_workdir(flags["workdir"], experiment)
    if cluster.hosts == 1:  # of several hosts, one may come back to the job that holds the lock
        check_unlocked(flags["workdir"])
    limits = dict(_limit(text, PHASES) for text in own.limit)
    lease = own.lease if own.lease is not None else 75.0 if is_remote(flags["workdir"]) else 15.0
    options = Options(
        ["train", *rest], flags["workdir"], own.processes, own.grace, limits, own.tries,
        cluster.host, cluster.hosts, cluster.address, own.patience, lease,
        _sizes(own.mesh, experiment, cluster.hosts),
        experiment.checkpoint.snapshot_every > 0 and hasattr(os, "memfd_create"),
    )  # fmt: skip
    return Supervisor(options).run()


def _sizes(meshes: list[str], experiment: "Experiment", hosts: int) -> dict[int, list[str]]:
    """Returns, for each number of hosts that the run may have, what its trainers are told then."""
    from trainer.config import validate

    if not meshes:
        return {hosts: []}
    axes = {}
    for text in meshes:
        count, _, given = text.partition(":")
        if not count.isdecimal() or not 1 <= int(count) <= hosts:
            raise UsageError(f"--mesh {text}: begins with a number of hosts, 1 to {hosts}")
        pairs = [pair.partition("=") for pair in given.split(",") if pair]
        for axis, _, size in pairs:
            if axis not in AXES:
                raise UsageError(f"--mesh {text}: choose {', '.join(AXES)}{nearest(axis, AXES)}")
            if not re.fullmatch(r"-1|[0-9]{1,6}", size):
                raise UsageError(f"--mesh {text}: {axis} is a whole number")
        axes[int(count)] = {axis: int(size) for axis, _, size in pairs}
    sizes = {}
    for count, mesh in axes.items():
        train = experiment.train
        more = microbatches(train.batch_size, train.accumulation, max(axes), count)
        validate(  # what the trainers would refuse is refused now
            replace(
                experiment,
                mesh=replace(experiment.mesh, **mesh),
                train=replace(train, accumulation=more),
            )
        )
        sizes[count] = [
            *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
            f"--config.train.accumulation={more}",
        ]
    return sizes


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
