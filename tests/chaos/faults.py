"""The faults that a run survives, or must end of: each is played by chance of a seed, and checked.

A player starts the run, strikes it and asserts how it ended; `lost` is what the fault may cost in
steps. A snapshot counts when all hosts hold it, which here takes up to two steps more; what goes
back to the disk may find the newest checkpoint still being written, and then takes the one before.
"""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from checkpoint.steps import complete_steps
from tests.chaos.trial import CHECKPOINT, SNAPSHOT, STEPS, Trial, alive
from tests.processes import ROOT
from trainer.metrics import read_metrics
from trainer.recovery.policy import NO_PROGRESS, PREEMPTED
from trainer.recovery.progress import PHASES

MEMORY, DISK = SNAPSHOT + 2, 2 * CHECKPOINT  # steps that may be lost
HANG = 3.0  # seconds that a step may take
TWO = ("--processes", "2")
EVAL = "--config.eval.every=8"
LIMITS = tuple(f"--limit={phase}={HANG}" for phase in ("data", "step"))


@dataclass(frozen=True)
class Fault:
    """One row of the table. `brief`: also in the short suite."""

    name: str
    play: Callable[[Trial], None]
    lost: int
    brief: bool = False


FAULTS: dict[str, Fault] = {}


def fault(name: str, lost: int, *, brief: bool = False):
    def add(play: Callable[[Trial], None]) -> Callable[[Trial], None]:
        FAULTS[name] = Fault(name, play, lost, brief)
        return play

    return add


def chaos(schedule: str) -> str:
    return f"--config.health.chaos={schedule}"


def any_step(t: Trial, first: int = 3, last: int = STEPS - 3) -> int:
    return t.draw.randint(first, last)


# ---------------------------------------------------------------- a process dies


def kill(t: Trial, phase: str, rank: int, processes: int = 2) -> None:
    """One process kills itself in a phase; the incident must name it."""
    flags = ("--processes", str(processes))
    if phase in ("restore", "compile"):  # of a run that goes on
        newest = t.calm.half(t, *TWO)[-1]
        step = newest if phase == "compile" else 0
    else:
        of_phase = {"eval": [8, 16, 24], "save": [CHECKPOINT, 2 * CHECKPOINT, STEPS]}
        step = t.draw.choice(of_phase.get(phase) or range(3, STEPS - 2))
    t.ends(t.start(*flags, EVAL, chaos(f"kill@{step}/rank{rank}/{phase}")))
    t.injected()
    (crash,) = t.kinds("crash")
    assert (crash["rank"], crash["cause"]) == (rank, "killed by SIGKILL"), f"blamed {crash}"
    t.same_bits(t.calm(*flags))


for _phase in ("compile", "restore", "data", "step", "eval", "save"):
    fault(f"SIGKILL in {_phase}", MEMORY, brief=_phase in ("step", "save"))(
        lambda t, phase=_phase: kill(t, phase, t.seed % 2)
    )
fault("SIGKILL of one of 4", MEMORY)(lambda t: kill(t, "step", 1 + t.draw.randrange(3), 4))
fault("coordinator of 4 lost", MEMORY)(lambda t: kill(t, "step", 0, 4))


@fault("SIGKILL while a checkpoint is written", MEMORY)
def kill_in_write(t: Trial) -> None:
    job = t.start(*TWO)
    number = t.draw.choice([CHECKPOINT, 2 * CHECKPOINT])
    t.until(lambda: list((t.run / "checkpoints").glob(f"{number}.*tmp*")))
    t.pause(0.2)
    t.strike(t.trainer(job, t.seed % 2))
    t.ends(job)
    t.kinds("crash")
    t.same_bits(t.calm(*TWO))


@fault("SIGKILL while memory is restored", MEMORY)
def kill_in_restore(t: Trial) -> None:
    job = t.start(*TWO)
    t.at_step(any_step(t))
    t.strike(t.trainer(job, t.seed % 2))
    t.in_phase("restore", generation=1)
    t.pause(0.3)
    t.strike(t.trainer(job, t.draw.randrange(2)))
    t.ends(job)
    t.kinds("crash", "crash")
    t.same_bits(t.calm(*TWO))


@fault("crash loop", 0)
def crash_loop(t: Trial) -> None:
    """Every generation is killed while it compiles: three tries, and no more."""
    job = t.start(*TWO)
    for generation in range(3):
        t.in_phase("compile", generation=generation)
        t.strike(t.trainer(job, t.draw.randrange(2)))
    t.ends(job, NO_PROGRESS, 30)
    t.kinds("crash", "crash", "crash")


# ---------------------------------------------------------------- a process stands still


def hang(t: Trial, kind: str) -> None:
    rank = t.seed % 2
    t.ends(t.start(*TWO, *LIMITS, chaos(f"{kind}@{any_step(t)}/rank{rank}")))
    t.injected()
    (found,) = t.kinds("hang")
    assert (found["rank"], found["cause"]) == (rank, "hung"), f"blamed {found}"
    t.same_bits(t.calm(*TWO))


fault("SIGSTOP", MEMORY, brief=True)(lambda t: hang(t, "stop"))
fault("alive but stuck", MEMORY)(lambda t: hang(t, "stuck"))


# ---------------------------------------------------------------- what stands around it


@fault("keeper killed", 0, brief=True)
def keeper_killed(t: Trial) -> None:
    job = t.start(*TWO)
    t.at_step(any_step(t, last=STEPS - 8))
    t.strike(t.keeper(job))
    t.ends(job)
    (lost,) = t.kinds("keeper lost")
    t.result.detect = round(lost["time"] - t.struck, 3)
    t.same_bits(t.calm(*TWO))


@fault("keeper killed and then a trainer", DISK)
def keeper_then_trainer(t: Trial) -> None:
    job = t.start(*TWO)
    t.at_step(any_step(t, last=STEPS - 12))
    os.kill(t.keeper(job), signal.SIGKILL)
    t.until(lambda: t.incidents("keeper lost"))
    t.pause(0.8)
    newest = max(complete_steps(t.run / "checkpoints"), default=0)
    t.strike(t.trainer(job, t.seed % 2))
    t.ends(job)
    t.kinds("keeper lost", "crash")
    assert t.incidents("recovered")[0]["restored"] >= newest
    t.same_bits(t.calm(*TWO))


@fault("launcher killed", DISK, brief=True)
def launcher_killed(t: Trial) -> None:
    job = t.start(*TWO)
    t.at_step(any_step(t))
    pids = [t.trainer(job, rank) for rank in (0, 1)]
    newest = max(complete_steps(t.run / "checkpoints"), default=0)
    t.strike(job.pid)
    job.wait()
    t.ends(t.start(*TWO))
    assert not any(map(alive, pids)), "a trainer outlived it"
    t.kinds()
    starts = [e["step"] for e in read_metrics(t.run, "event") if e["event"] in ("start", "resumed")]
    assert starts[-1] >= newest
    t.same_bits(t.calm(*TWO))


@fault("host of 2 lost and back", MEMORY, brief=True)
def host_lost(t: Trial) -> None:
    """With all its memory: parity brings it back. Every other time it is the one that leads."""
    jobs = [t.start(host=n, hosts=2) for n in (0, 1)]
    victim = t.seed % 2
    t.at_step(any_step(t, first=SNAPSHOT + 3))
    t.strike(jobs[victim].pid)
    jobs[victim].wait()
    jobs[victim] = t.start(host=victim, hosts=2)
    for job in jobs:
        t.ends(job)
    (found,) = t.kinds("host lost")
    assert found["hosts"] == [victim]
    assert t.incidents("recovered")[0]["source"] in ("parity", "disk")
    t.same_bits(t.calm(*TWO))


@fault("two hosts of a parity group of 3", DISK)
def two_hosts_lost(t: Trial) -> None:
    flags = ("--config.train.batch_size=12", "--config.model.width=48")
    jobs = [t.start(*flags, host=n, hosts=3) for n in range(3)]
    t.at_step(any_step(t, first=CHECKPOINT + 2))
    spared = t.seed % 3
    victims = [n for n in range(3) if n != spared]
    newest = max(complete_steps(t.run / "checkpoints"), default=0)
    t.strike(*(jobs[n].pid for n in victims))
    for n in victims:
        jobs[n].wait()
        jobs[n] = t.start(*flags, host=n, hosts=3)
    for job in jobs:
        t.ends(job)
    (found,) = t.incidents("recovered")
    assert found["source"] in ("disk", "new") and found["restored"] >= newest
    t.same_bits(t.calm("--processes", "3", *flags))


@fault("hosts 2 → 1 → 2", DISK)
def hosts_go_and_come(t: Trial) -> None:
    """Sums over devices are taken in another order for a while: float32, 30 steps."""
    flags = ("--mesh", "2", "--mesh", "1", "--lease", "5")
    jobs = [t.start(*flags, host=n, hosts=2, SLOW="data=0.25") for n in (0, 1)]
    victim = t.seed % 2
    t.at_step(any_step(t, last=12), rank=1 - victim)
    t.strike(jobs[victim].pid)
    t.until(lambda: len(t.incidents("resized")) == 1)
    jobs[victim] = t.start(*flags, host=victim, hosts=2, SLOW="data=0.25")
    for job in jobs:
        t.ends(job)
    lost, *resized = t.kinds("host lost", "resized", "resized")
    assert lost["hosts"] == [victim] and [i["hosts"] for i in resized] == [1, 2]
    t.near(t.calm(*TWO), 1e-3)


@fault("a frozen host wakes when it was given up", MEMORY)
def stale_host(t: Trial) -> None:
    """Supervisor and trainer of an old generation go on while the next one trains or waits."""
    jobs = [t.start("--lease", "3", host=n, hosts=2) for n in (0, 1)]
    victim = t.seed % 2
    t.at_step(any_step(t), rank=1 - victim)
    frozen = [jobs[victim].pid, t.trainer(jobs[victim], 0)]
    t.strike(*frozen, how=signal.SIGSTOP)
    t.until(lambda: t.incidents("host lost", "crash", "hang"))
    t.pause(2.0)
    t.strike(*frozen, how=signal.SIGCONT)
    for job in jobs:
        t.ends(job)
    (found,) = t.kinds("host lost")
    assert found["hosts"] == [victim]
    t.same_bits(t.calm(*TWO))


@fault("wall clocks jump and SIGKILL", MEMORY)
def clocks_jump(t: Trial) -> None:
    path = f"{ROOT}/tests/chaos/clock{os.pathsep}{ROOT}"
    schedule = f"kill@{any_step(t)}/rank{t.seed % 2}"
    t.ends(t.start(*TWO, chaos(schedule), PYTHONPATH=path, CLOCK_JUMP=str(t.seed)))
    t.kinds("crash")
    t.same_bits(t.calm(*TWO))


# ---------------------------------------------------------------- asked to stop


def sigterm(t: Trial, phase: str) -> None:
    """Told that it has 0.7 s to save; gone after two on any machine; then the same command."""
    job = t.start(*TWO, EVAL, "--grace", "0.7", SLOW=f"{phase}=2*1")
    t.in_phase(phase, rank=t.seed % 2)
    t.pause(1.0)
    t.strike(job.pid, how=signal.SIGTERM)
    began = time.monotonic()
    t.ends(job, PREEMPTED)
    t.result.detect = round(time.monotonic() - began, 3)  # until it was gone
    assert t.result.detect < 2.0, f"{t.result.detect:.1f} s to be gone"
    newest = max(complete_steps(t.run / "checkpoints"), default=0)
    t.ends(t.start(*TWO, EVAL))
    starts = [e["step"] for e in read_metrics(t.run, "event") if e["event"] in ("start", "resumed")]
    assert starts[-1] == newest
    if t.incidents():  # else there was no folder to write that down
        t.kinds("stopped")
    t.same_bits(t.calm(*TWO))


for _phase in PHASES[:-1]:
    fault(f"SIGTERM in {_phase} with 1 s", DISK, brief=_phase == "compile")(
        lambda t, phase=_phase: sigterm(t, phase)
    )


# ---------------------------------------------------------------- storage


@fault("disk full", MEMORY, brief=True)
def disk_full(t: Trial) -> None:
    """The file system of the run is full for a few seconds, and then has room again."""
    disk, log = t.small_disk(16), t.folder / "log"
    t.run = disk / "run"
    job = t.start(*TWO)
    t.at_step(t.draw.choice([any_step(t, 3, 8), any_step(t, 12, 18)]))
    t.struck = time.time()
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(2**16)):
            pass
    t.until(lambda: "cannot be written" in log.read_text())
    t.pause(2.0)
    (disk / "filler").unlink()
    t.ends(job)
    t.same_bits(t.calm(*TWO))


@fault("slow storage and SIGKILL", MEMORY)
def slow_storage(t: Trial) -> None:
    """Each checkpoint takes three seconds more to be durable: no alarm, and memory is newer."""
    schedule = f"kill@{any_step(t, CHECKPOINT + 2)}/rank{t.seed % 2}"
    t.ends(t.start(*TWO, chaos(schedule), SLOW="sync=3"))
    t.injected()
    t.kinds("crash")
    t.same_bits(t.calm(*TWO))


def damage(t: Trial, step: int) -> str:
    """Flips a byte of the largest file of a step, cuts the file in half or removes it."""
    files = (p for p in (t.run / f"checkpoints/{step}/state").rglob("d/*") if p.is_file())
    file, kind = max(files, key=lambda p: p.stat().st_size), t.seed % 3
    if kind == 2:
        file.unlink()
        return "missing"
    content = bytearray(file.read_bytes())
    content[t.draw.randrange(len(content) // 4, 3 * len(content) // 4)] ^= 1 << t.draw.randrange(8)
    file.write_bytes(content if kind == 0 else content[: len(content) // 2])
    return ("flipped", "truncated")[kind]


@fault("newest checkpoint damaged", CHECKPOINT, brief=True)
def newest_damaged(t: Trial) -> None:
    *_, before, newest = t.calm.half(t, *TWO)
    damage(t, newest)
    t.ends(t.start(*TWO))
    t.kinds()
    passed = [e for e in read_metrics(t.run, "event") if "passed over" in e["event"]]
    assert [e["step"] for e in passed] == [before], f"passed over: {passed}"
    assert (t.run / f"checkpoints/{newest}.damaged").is_dir()
    t.same_bits(t.calm(*TWO))


@fault("every checkpoint damaged", 0)
def all_damaged(t: Trial) -> None:
    """Nothing is trained on, nothing begins anew, and the end comes soon."""
    steps = t.calm.half(t, *TWO)
    for step in steps:
        damage(t, step)
    t.ends(t.start(*TWO), NO_PROGRESS, 120)
    assert complete_steps(t.run / "checkpoints") == steps
    assert max(r["step"] for r in read_metrics(t.run, "train")) == steps[-1]


# ---------------------------------------------------------------- data


def unhealthy(t: Trial, kind: str) -> None:
    """The same schedule without a kill is what it must end like."""
    step = any_step(t, 16, 22)  # before, the loss falls so fast that a spike is none
    flags = (*TWO, "--config.health.window=8", "--config.health.skip_spikes=True")
    calm = t.calm(*flags, chaos(f"{kind}@{step}"))
    killed = f"kill@{t.draw.randint(step - 1, step + 4)}/rank{t.seed % 2}"
    t.ends(t.start(*flags, chaos(f"{kind}@{step},{killed}")))
    t.injected()
    t.kinds("crash")
    name = {"nan": "non-finite"}.get(kind, kind)
    for run in (calm, t.run):
        found = {e["step"]: e for e in read_metrics(run, "event") if e["event"] == name}
        assert step in found and found[step]["update"] == "left out", f"recorded: {found}"
    t.same_bits(calm)


fault("NaN batch and SIGKILL", MEMORY, brief=True)(lambda t: unhealthy(t, "nan"))
fault("spike batch and SIGKILL", MEMORY)(lambda t: unhealthy(t, "spike"))


@fault("a read fails once", 0)
def read_fails(t: Trial) -> None:
    t.ends(t.start(*TWO, chaos(f"error@{any_step(t)}/rank{t.seed % 2}")))
    t.kinds()
    t.same_bits(t.calm(*TWO))


@fault("a read fails for ever", DISK, brief=True)
def data_gone(t: Trial) -> None:
    """It ends with a status that says so, in bounded time."""
    t.ends(t.start(*TWO, chaos(f"error@{any_step(t)}xinf/rank{t.seed % 2}")), NO_PROGRESS, 150)
    assert {i["kind"] for i in t.incidents()} <= {"crash", "recovered"}


def play(t: Trial) -> None:
    """Plays the trial's fault and measures what it cost.

    Raises:
      AssertionError: the run did not survive as it must.
    """
    row = FAULTS[t.result.fault]
    try:
        row.play(t)
        t.measure(row.lost)
    finally:
        t.result.incidents = t.incidents()
        t.close()
    shutil.rmtree(t.folder)
