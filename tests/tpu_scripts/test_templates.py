"""The templates for SLURM and JobSet do with every exit status what `torus launch --help` says."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.processes import ROOT
from trainer.commands import launch
from trainer.recovery import policy
from trainer.recovery.cluster import VARIABLES, find_cluster
from trainer.recovery.health import DIVERGED, SUSPECT

STATUSES = {
    policy.FINISHED, policy.MISTAKE, policy.BAD_DATA, policy.LOST, policy.NO_PROGRESS, DIVERGED,
    policy.UNWRITABLE, policy.RETRY, policy.PREEMPTED, SUSPECT, policy.RESIZE,
}  # fmt: skip


def told() -> dict[int, str]:
    """What the help tells a scheduler to do about each status."""
    table = launch.USAGE.partition("Exit status")[2].splitlines()[1:]
    return {
        int(match[1]): match[2]
        for line in table
        if (match := re.match(r" *(\d+)  .*?  +(.*)", line))
    }


def test_the_help_tells_every_status():
    assert set(told()) == STATUSES | {2, 130}


# ---------------------------------------------------------------- SLURM

# Two nodes; each runs what it is told, with what srun says in its environment. As seen on SLURM
# 22.05: a signal reaches every process of the step, in whatever session, and more than once; the
# status is 137 if a task was killed, or else the highest of the tasks'.
SRUN = """\
import os, signal, subprocess, sys
from pathlib import Path

def family(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in family(int(child)))]

def pass_on(number, frame):
    for _ in range(2):
        for pid in [pid for task in tasks for pid in family(task.pid)]:
            os.kill(pid, signal.SIGTERM)

command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
place = {"SLURM_STEP_NODELIST": "node[007-008]", "SLURM_STEP_NUM_TASKS": "2"}
tasks = []
signal.signal(signal.SIGTERM, pass_on)
for n in (0, 1):
    environment = {**os.environ, **place, "SLURM_PROCID": str(n), "SLURMD_NODENAME": f"n{n}"}
    tasks.append(subprocess.Popen(command, start_new_session=True, env=environment))
statuses = [task.wait() for task in tasks]
sys.exit(137 if min(statuses) < 0 else max(statuses))
"""
SCONTROL = """\
#!/bin/bash
case $1-$2 in
  show-config) echo 'KillWait                = 30 sec' ;;
  show-job) cat job ;;
  *) echo "$*" >>calls ;;
esac
"""
# Stands for `torus launch`: tells where it is, and ends as $END says of its host. "kill" kills it
# at its first start, "killtask" also the shell that started it, "wait" is for SIGTERM.
LAUNCH = """\
import os, signal, sys, time
from trainer.recovery.cluster import find_cluster
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(time.monotonic()))
cluster = find_cluster(os.environ)
first = not os.path.exists(f"host{cluster.host}")
with open(f"host{cluster.host}", "w") as file:
    file.write(f"{cluster.hosts} {cluster.address} {' '.join(sys.argv[1:])}")
end = os.environ["END"].split()[cluster.host]
while end == "wait" and not (asked and time.monotonic() - asked[0] > 0.3):
    time.sleep(0.02)
if end == "killtask":
    os.kill(os.getppid(), signal.SIGKILL)
if end == "killtask" or (end == "kill" and first):
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit({"wait": 76, "kill": 76}.get(end) or int(end))
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the template on two nodes; returns the job and the folder it runs in."""
    srun = f'#!/bin/sh\nexec {sys.executable} {tmp_path}/srun.py "$@"\n'
    for name, text in {"srun": srun, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "srun.py").write_text(SRUN)
    (tmp_path / "stub.py").write_text(LAUNCH)
    (tmp_path / "job").write_text("JobState=RUNNING Reason=None")
    (tmp_path / "run/launch").mkdir(parents=True)
    (tmp_path / "run/launch/suspects").write_text("node008\nnode009\n")

    def start(end: str, **variables: str) -> tuple[subprocess.Popen, Path]:
        environment = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "TORUS_COMMAND": f"{sys.executable} {tmp_path}/stub.py", "END": end,
            "SLURM_JOB_ID": "42", "TORUS_BACKOFF": "0", **variables,
        }  # fmt: skip
        command = ["bash", str(ROOT / "tpu_scripts/slurm.sbatch"), "--config=x", "--workdir=run"]
        with open(tmp_path / "log", "w") as log:
            return subprocess.Popen(
                command, env=environment, cwd=tmp_path, stderr=log, start_new_session=True
            ), tmp_path

    return start


def calls(folder: Path) -> list[str]:
    """What scontrol was asked to do."""
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


@pytest.mark.parametrize(
    "status",
    [
        pytest.param(status, marks=() if status in (0, 70, 77) else pytest.mark.soak)
        for status in sorted(STATUSES | {2, 130})
    ],
)
def test_slurm_queues_again_what_should_be_tried_again(slurm, status):
    job, folder = slurm(f"{status} {status}")
    assert job.wait(60) == status
    advice = told()[status]
    again = advice.startswith("try again") and "size" not in advice
    assert ("requeue 42" in calls(folder)) == again
    without = "update JobId=42 ExcNodeList=node008,node009" in calls(folder)
    assert without == ("without it" in advice)
    for host in (0, 1):
        words = (folder / f"host{host}").read_text()
        assert words == ("2 node007 launch --grace 100 --patience 300 --config=x --workdir=run")


@pytest.mark.parametrize(
    ("ends", "status", "again"),
    [
        ("killtask 76", 137, True),  # srun would tell 137 for all of these
        ("killtask 70", 70, False),
        ("0 killtask", 0, False),  # with --mesh the others go on, and end
        pytest.param("killtask 130", 130, False, marks=pytest.mark.soak),
        pytest.param("75 64", 64, False, marks=pytest.mark.soak),
        pytest.param("77 0", 0, False, marks=pytest.mark.soak),
    ],
)
def test_a_killed_task_does_not_hide_how_the_others_ended(slurm, ends, status, again):
    job, folder = slurm(ends)
    assert job.wait(60) == status
    assert calls(folder) == ["requeue 42"] * again
    assert not list(folder.glob("slurm-*"))


def test_a_killed_launcher_is_started_again_where_it_was(slurm):
    job, folder = slurm("kill 76")
    assert job.wait(60) == 76 and calls(folder) == ["requeue 42"]
    assert "plain scancel there are 30 s to save" in (folder / "log").read_text()
    assert "torus launch on n0 was killed (137), started again" in (folder / "log").read_text()


def test_a_job_that_is_killed_at_once_time_and_again_ends(slurm):
    job, folder = slurm("killtask 76", SLURM_RESTART_COUNT="20")
    assert job.wait(60) == 137 and not calls(folder)


@pytest.mark.parametrize(
    ("state", "again"),
    [
        ("JobState=RUNNING Reason=None", True),  # scancel --signal=TERM, --signal, preemption
        ("JobState=COMPLETING Reason=None", False),  # scancel
        pytest.param("JobState=COMPLETING Reason=TimeLimit", True, marks=pytest.mark.soak),
    ],
)
def test_slurm_passes_a_signal_on_and_queues_again_what_was_not_cancelled(slurm, state, again):
    job, folder = slurm("wait wait")
    while not all((folder / f"host{host}").exists() for host in (0, 1)):
        assert job.poll() is None
    (folder / "job").write_text(state)
    os.killpg(job.pid, signal.SIGTERM)  # the batch script and srun; the tasks twice, by srun
    assert job.wait(60) == 76
    assert calls(folder) == ["requeue 42"] * again


# ---------------------------------------------------------------- JobSet


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load((ROOT / "tpu_scripts/jobset.yaml").read_text())


def test_jobset_does_with_each_status_what_the_help_says(jobset):
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    actions = {}
    for rule in job["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == container["name"] and codes["operator"] == "In"
            actions |= dict.fromkeys(codes["values"], rule["action"])
    for status, advice in told().items():
        if status in (0, 130):
            continue
        ends = "not try again" in advice or "size" in advice
        wanted = "FailJob" if ends else None if status == SUSPECT else "Ignore"
        assert actions.get(status) == wanted, (status, advice)
    assert {"type": "DisruptionTarget"} in job["podFailurePolicy"]["rules"][-1]["onPodConditions"]


def test_jobset_tells_each_host_its_place(jobset):
    spec = jobset["spec"]["replicatedJobs"][0]
    job = spec["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    given = {entry["name"]: entry.get("value", "2") for entry in container["env"]}
    assert set(given) == set(VARIABLES)
    cluster = find_cluster(given)
    assert (cluster.host, cluster.hosts) == (2, job["completions"])
    assert job["completions"] == job["parallelism"]
    name = jobset["metadata"]["name"]  # JobSet names pods JOBSET-JOB-JOBINDEX-PODINDEX.SUBDOMAIN
    assert cluster.address == f"{name}-{spec['name']}-0-0.{name}"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > int(container["command"][-1])


# ---------------------------------------------------------------- who and where


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, "127.0.0.1")),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (0, 1, "127.0.0.1")),  # without srun
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "a1,b[1-2]"},
            (1, 3, "a1"),
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[9,12].x"},
            (0, 2, "n9.x"),
        ),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, (1, 2, "10.0.0.1")),
        (dict(zip(VARIABLES, ("1", "2", "[fe80::1]:99"), strict=True)), (1, 2, "fe80::1")),
        (dict(zip(VARIABLES, ("1", "2", "host"), strict=True)), (1, 2, "host")),
    ],
)
def test_a_host_finds_its_place(environment, place):
    found = find_cluster(environment)
    assert (found.host, found.hosts, found.address) == place


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("two", "2", "a"), "JAX_PROCESS_ID = 'two' is not a number"),
        (("0", "2.5", "a"), "JAX_NUM_PROCESSES = '2.5' is not a number"),
        (("2", "2", "a"), "JAX_PROCESS_ID = 2 of JAX_NUM_PROCESSES = 2"),
        (("-1", "2", "a"), "JAX_PROCESS_ID = '-1'"),
        (("1", "2"), "JAX_COORDINATOR_ADDRESS is missing"),
        (("1",), "JAX_PROCESS_ID = 1 of JAX_NUM_PROCESSES = 1"),
        ((), None),
    ],
)
def test_what_is_no_place_is_refused(values, message):
    environment = dict(zip(VARIABLES, values, strict=False))
    if message is None:
        environment["JAX_NUM_PROCESSES"], message = "2", "JAX_PROCESS_ID = '' is not a number"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_cluster(environment)
