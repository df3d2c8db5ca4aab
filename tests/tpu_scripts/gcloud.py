#!/usr/bin/env python3
"""A Cloud TPU of two workers in a folder, $CLOUD, behind gcloud's command line.

resource         there while the TPU is; holds its state
calls            every command line
refuse           text that a request is refused with
preempt          that many looks from now the TPU is taken away
create_hangs, delete_fails    what their names say, while they are there
describe_fails   text that every look is answered with, from the first request to delete on
worker<N>/       home of a worker; what gcloud runs there runs in a real shell
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])
RESOURCE = CLOUD / "resource"
WORKERS = [CLOUD / "worker0", CLOUD / "worker1"]


def fail(text: str) -> None:
    sys.exit(f"ERROR: (gcloud.compute.tpus.{'.'.join(sys.argv[3:5])}) {text}")


def not_found(kind: str) -> None:
    """As gcloud says it: with the resource's name, the account, and details after it."""
    name = f"projects/p1/locations/zone-a/{'nodes' if kind == 'tpu-vm' else 'queuedResources'}/t1"
    fail(
        f"NOT_FOUND: Resource '{name}' was not found. This command is authenticated as "
        "me@example.com which is the active account specified by the [core/account] property\n"
        f"- '@type': type.googleapis.com/google.rpc.ResourceInfo\n  resourceName: {name}"
    )


def lose() -> None:
    """What a worker runs ends with it, and its disk is gone."""
    for worker in WORKERS:
        for pid in worker.glob("torus/.torus/pid"):
            subprocess.run(["kill", "-KILL", pid.read_text().strip()], check=False)
        shutil.rmtree(worker, ignore_errors=True)


def describe(kind: str) -> None:
    preempt = CLOUD / "preempt"
    if preempt.exists():
        left = int(preempt.read_text()) - 1
        preempt.write_text(str(left))
        if left == 0:
            preempt.unlink()
            RESOURCE.write_text("SUSPENDED" if kind == "queued-resources" else "PREEMPTED")
            lose()
    failure, deleted = CLOUD / "describe_fails", CLOUD / "asked_to_delete"
    if failure.exists() and deleted.exists():
        sys.exit(failure.read_text())
    if not RESOURCE.exists():
        not_found(kind)
    print("WARNING: Python 3.9 will not be supported by the next gcloud.", file=sys.stderr)
    print(RESOURCE.read_text())
    if RESOURCE.read_text() in ("WAITING_FOR_RESOURCES", "CREATING"):
        RESOURCE.write_text("ACTIVE" if kind == "queued-resources" else "READY")


def create(kind: str) -> None:
    if (CLOUD / "refuse").exists():
        fail((CLOUD / "refuse").read_text())
    if RESOURCE.exists():
        fail("ALREADY_EXISTS")
    RESOURCE.write_text("WAITING_FOR_RESOURCES" if kind == "queued-resources" else "CREATING")
    for worker in WORKERS:
        worker.mkdir(exist_ok=True)
    if (CLOUD / "create_hangs").exists():
        time.sleep(60)


def delete(kind: str) -> None:
    (CLOUD / "asked_to_delete").touch()
    if (CLOUD / "delete_fails").exists():
        fail("INTERNAL: try again later")
    if not RESOURCE.exists():
        not_found(kind)
    RESOURCE.unlink()
    lose()


def chosen(options: dict[str, str]) -> list[Path]:
    if not RESOURCE.exists() or RESOURCE.read_text() not in ("ACTIVE", "READY"):
        fail("the TPU is not there")
    return WORKERS if options["--worker"] == "all" else [WORKERS[int(options["--worker"])]]


def ssh(options: dict[str, str]) -> None:
    worst = 0
    for worker in chosen(options):
        environment = {
            **os.environ, "HOME": str(worker), "WORKER": worker.name[-1],
            "PATH": f"{CLOUD}/vm:{os.environ['PATH']}",
        }  # fmt: skip
        command = ["bash", "-c", options["--command"]]
        worst = max(worst, subprocess.run(command, cwd=worker, env=environment).returncode)
    sys.exit(worst)


def main(arguments: list[str]) -> None:
    with open(CLOUD / "calls", "a") as calls:
        calls.write(" ".join(arguments) + "\n")
    assert arguments[:2] == ["compute", "tpus"], arguments
    kind, verb, *rest = arguments[2:]
    options = dict(a.split("=", 1) for a in rest if a.startswith("--") and "=" in a)
    assert options["--zone"] == "zone-a" and "--quiet" in rest, arguments
    if verb == "ssh":
        ssh(options)
    elif verb == "scp":
        source, target = (a for a in rest if not a.startswith("--"))
        place = target.partition(":")[2]
        for worker in chosen(options):
            shutil.copy(source, worker / place)
    elif verb == "describe":
        describe(kind)
    elif verb == "create":
        create(kind)
    else:
        delete(kind)


main(sys.argv[1:])
