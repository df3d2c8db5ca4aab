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
from trainer.recovery.health import SUSPECT

STATUSES = {
    getattr(policy, name)
    for name in (
        "FINISHED", "MISTAKE", "BAD_DATA", "LOST", "NO_PROGRESS", "DIVERGED", "UNWRITABLE", "RETRY",
        "PREEMPTED", "RESIZE",
    )
} | {SUSPECT}  # fmt: skip


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

# Two nodes; each runs what it is told, with what srun says in its environment.
SRUN = f"""\
#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for n in 0 1; do
  SLURM_STEP_NODELIST='node[007-008]' SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=$n \\
    {sys.executable} "$STUB" "$@" &
  tasks="$tasks $!"
done
trap 'kill -TERM $tasks; again=1' TERM
worst=0
for task in $tasks; do
  again=; wait "$task"; status=$?
  if [ -n "$again" ]; then wait "$task"; status=$?; fi
  worst=$((status > worst ? status : worst))
done
exit "$worst"
"""
# Stands for `torus launch`: tells where it is, and ends as $END says.
LAUNCH = """\
import os, signal, sys, time
from trainer.recovery.cluster import find_cluster
signal.signal(signal.SIGTERM, lambda *_: os._exit(76))
cluster = find_cluster(os.environ)
with open(f"host{cluster.host}", "w") as file:
    file.write(f"{cluster.hosts} {cluster.address} {' '.join(sys.argv[1:])}")
time.sleep(30 if os.environ["END"] == "wait" else 0)
sys.exit(int(os.environ["END"]) if cluster.host else 0)
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the template on two nodes; returns the job and the folder it runs in."""
    scripts = {"srun": SRUN, "scontrol": '#!/bin/bash\necho "$*" >>calls\n'}
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "stub.py").write_text(LAUNCH)
    (tmp_path / "run/launch").mkdir(parents=True)
    (tmp_path / "run/launch/suspects").write_text("node008\nnode009\n")

    def start(end: str) -> tuple[subprocess.Popen, Path]:
        environment = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "STUB": str(tmp_path / "stub.py"), "END": end, "SLURM_JOB_ID": "42",
            "TORUS_BACKOFF": "0",
        }  # fmt: skip
        command = ["bash", str(ROOT / "tpu_scripts/slurm.sbatch"), "--config=x", "--workdir=run"]
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, start_new_session=True
        ), tmp_path

    return start


@pytest.mark.parametrize(
    "status",
    [
        pytest.param(status, marks=() if status in (0, 70, 77) else pytest.mark.soak)
        for status in sorted(STATUSES)
    ],
)
def test_slurm_queues_again_what_should_be_tried_again(slurm, status):
    job, folder = slurm(str(status))
    assert job.wait(60) == status
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    advice = told()[status]
    assert ("requeue 42" in calls) == (advice.startswith("try again") and "size" not in advice)
    assert ("update JobId=42 ExcNodeList=node008,node009" in calls) == ("without it" in advice)
    for host in (0, 1):
        words = (folder / f"host{host}").read_text()
        assert words == "2 node007 .venv/bin/torus launch --grace 100 --config=x --workdir=run"


def test_slurm_passes_a_signal_on_and_queues_again(slurm):
    job, folder = slurm("wait")
    while not all((folder / f"host{host}").exists() for host in (0, 1)):
        assert job.poll() is None
    os.killpg(job.pid, signal.SIGTERM)  # the batch script and its step
    assert job.wait(60) == 76
    assert (folder / "calls").read_text() == "requeue 42\n"


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
