"""A SLURM cluster of two nodes on this machine, from Debian's packages.

Everything of it lies in one folder and listens on loopback. The nodes' names are known inside of
them only, by a mount namespace with another /etc/hosts.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CONFIG = """\
ClusterName=torus
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait={kill_wait}
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=90 State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=2 State=UP
"""


def install() -> str:
    """Installs SLURM where it is missing and one may; returns why it is not there, or ""."""
    if os.geteuid():
        return "only root can run slurmctld and slurmd"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "no mount namespaces"
    if not shutil.which("slurmctld") or not shutil.which("munged"):
        if not shutil.which("apt-get"):
            return "no SLURM, and no apt-get that could install it"
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        apt = ["apt-get", "--yes", "--quiet"]
        subprocess.run([*apt, "update"], env=environment, check=True)
        command = [*apt, "install", "--no-install-recommends", *PACKAGES]
        subprocess.run(command, env=environment, check=True)
    return ""


def wait_for(what: Callable[[], object], seconds: float = 900.0) -> None:
    """Waits until `what` is true; fails after so many seconds."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"not within {seconds:g} s"
        time.sleep(0.2)


class Slurm:
    """The cluster while it is there; `with running(folder) as slurm`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """Returns what a command of SLURM says, "" where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    def submit(self, *command: str, cwd: Path, **variables: str) -> str:
        """Submits a job and returns its number; its log is `folder`/NUMBER.log."""
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={self.folder}/%j.log", *command],
            env=self.environment | variables, cwd=cwd, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """Returns what `scontrol show job` says."""
        words = self.ask("scontrol", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def ended(self, job: str) -> bool:
        return self.facts(job).get("JobState") in ("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT")

    def tasks(self, job: str) -> dict[int, dict[str, list[int]]]:
        """Returns by number of the task its processes: its shell, launchers and trainers."""
        found: dict[int, dict[str, list[int]]] = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (path / "environ").read_bytes().split(b"\0")
                words = (path / "cmdline").read_bytes().split(b"\0")
                given = dict(word.partition(b"=")[::2] for word in environment)
                of_step = b"SLURM_STEP_NODELIST" in given  # neither the batch script nor srun
                if given.get(b"SLURM_JOB_ID") != job.encode() or not of_step:
                    continue
                kind = (
                    "trainers" if b"trainer.recovery.standby" in words
                    else "shells" if words[0].endswith(b"bash")
                    else "launchers" if b"launch" in words else "others"
                )  # fmt: skip
                task = found.setdefault(int(given[b"SLURM_PROCID"]), {})
                task.setdefault(kind, []).append(int(path.name))
        return found


@contextlib.contextmanager
def running(folder: Path, kill_wait: int) -> Iterator[Slurm]:
    """Starts munge, the controller and two nodes; ends them and all their jobs."""
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    hosts = Path("/etc/hosts").read_text()
    (folder / "hosts").write_text(f"{hosts}\n127.0.0.1 n1 n2\n")
    text = CONFIG.format(
        folder=folder, host=socket.gethostname(), ports=_free_ports(3), kill_wait=kill_wait
    )
    (folder / "slurm.conf").write_text(text)
    slurm = Slurm(folder)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
    munge = [f"--{name}={folder}/munge.{end}" for name, end in files.items()]
    commands = [["munged", "--force", f"--seed-file={folder}/munge.seed", *munge], ["slurmctld"]]
    for node in ("n1", "n2"):
        (folder / f"spool.{node}").mkdir()
        script = f"mount --bind {folder}/hosts /etc/hosts && exec slurmd -N {node}"
        commands.append(["unshare", "--mount", "bash", "-c", script])
    try:
        for command in commands:
            subprocess.run(command, env=slurm.environment, check=True)
        wait_for(lambda: slurm.ask("sinfo", "-h", "-p", "low", "-o", "%D %T") == "2 idle", 120)
        yield slurm
    finally:
        slurm.ask("scancel", "--signal=KILL", "--full", "--me")
        slurm.ask("scancel", "--me")
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not slurm.ask("squeue", "-h"), kill_wait + 30)
        for path in (*folder.glob("slurm*.pid"), folder / "munge.pid"):
            with contextlib.suppress(OSError):
                os.kill(int(path.read_text()), signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.socket()) for _ in range(count)]
        for server in servers:
            server.bind(("127.0.0.1", 0))
        return [server.getsockname()[1] for server in servers]
