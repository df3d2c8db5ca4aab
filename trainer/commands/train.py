"""`torus train`: trains a config in a run folder, resuming what is there."""

from concurrent.futures import ThreadPoolExecutor

from sharding.errors import UsageError
from trainer.packages import check_packages

USAGE = """\
usage: torus train --config=CONFIG --workdir=RUN [--config.PATH=VALUE ...]

Trains the experiment of CONFIG (a file, or the name of a shipped one) in the folder RUN. Run the
same command again and it resumes from the newest complete checkpoint, on whatever devices are
there now. Ctrl-C stops after the current step, saved; a second Ctrl-C stops at once.

  torus train --config=quickstart --workdir=runs/a
  torus train --config=ladder:100m --config.mesh.tensor=2 --workdir=runs/b
  torus train --config=quickstart --config.train.stop_at=100 --workdir=runs/c  # stop and save early

Useful overrides:
  --config.train.steps, .batch_size, .accumulation, .seed      how much
  --config.mesh.data, .fsdp, .seq, .tensor (one may be -1)     over which devices
  --config.mesh.zero=1|2|3                                     what fsdp shards
  --config.model.remat=auto|none|full|NAMES                    memory against speed
  --config.perf=auto|fast|off                                  compile options for a TPU
  --config.log.profile_start=STEP                              trace a few steps
Several processes: set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in each.
Without the hardware: JAX_NUM_CPU_DEVICES=8 simulates eight devices on the CPU.
`torus config --config=CONFIG` prints every field with its meaning.
"""


def main(argv: list[str]) -> int:
    """Returns 0 at the end of the run, 130 when a signal stopped it (after saving)."""
    from trainer.config import parse_flags, validate
    from trainer.data.corpus import builtin_folder, is_builtin
    from trainer.run import check_workdir

    if conflicts := check_packages():
        raise UsageError("packages do not fit together: " + "; ".join(conflicts))
    experiment, flags = parse_flags(argv, workdir="folder of the run, local or gs://")
    validate(experiment)
    check_workdir(flags["workdir"], experiment)  # before JAX is imported: says no at once

    with ThreadPoolExecutor(1) as meanwhile:
        if is_builtin(experiment.data.path):
            # Written while JAX loads; what goes wrong is told when the loop asks for the same.
            meanwhile.submit(builtin_folder, experiment.data.path)
        from trainer.loop import train

        return 130 if train(experiment, flags["workdir"]).stopped_by else 0
