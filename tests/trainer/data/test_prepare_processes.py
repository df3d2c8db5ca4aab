"""`torus prepare` in real processes: killed at any moment, the same bytes come out."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with about 1 MB in several formats, with duplicates and bad lines."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    sources = sorted(Path(json.__file__).parent.parent.glob("[a-d]*.py"))
    lines = [line for path in sources for line in path.read_text().splitlines()]
    for name in ("a.jsonl", "b.jsonl"):
        with open(folder / name, "w") as stream:
            for number in range(400):
                text = "\n".join(draw.choice(lines) for _ in range(draw.randrange(60)))
                stream.write(json.dumps({"text": "twice" if number % 50 == 7 else text}) + "\n")
                if number == 300:
                    stream.write("{not json\n")
    for number in range(100):
        (folder / f"{number}.txt").write_text("\n".join(draw.choices(lines, k=20)))
    return folder


def command(text: Path, out: Path, workers: int) -> list[str]:
    return [
        sys.executable, "-m", "trainer.commands.main", "prepare", "--input", str(text), "--out",
        str(out), "--train-bpe", "500", "--unit-bytes", "40k", "--workers",
        str(workers),
    ]  # fmt: skip


def start(argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(argv: list[str]) -> str:
    job = start(argv)
    out, error = job.communicate(timeout=120)
    assert job.returncode == 0, error
    return out


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.fixture(scope="module")
def unbroken(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """Digests of what one worker writes, and the seconds it took."""
    folder = tmp_path_factory.mktemp("unbroken")
    begin = time.monotonic()
    finish(command(text, folder / "out", 1))
    assert [path.name for path in folder.iterdir()] == ["out"]
    return digests(folder / "out"), time.monotonic() - begin


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_writes_the_same_bytes(text, unbroken, tmp_path, workers):
    finish(command(text, tmp_path / "out", workers))
    assert digests(tmp_path / "out") == unbroken[0]
    assert len(unbroken[0]) > 5


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_it_goes_on(text, unbroken, tmp_path, workers):
    expected, seconds = unbroken
    draw = random.Random(workers)
    argv = command(text, tmp_path / "out", workers)
    finished = []
    for _ in range(5):
        job = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            job.wait(timeout=draw.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            # The parent alone: its workers must follow by themselves.
            job.send_signal(signal.SIGKILL)
        job.wait()
        deadline = time.monotonic() + 60
        while alive(job.pid):
            assert time.monotonic() < deadline, "workers outlive the command"
            time.sleep(0.01)
        finished.append(len(list(tmp_path.glob(".out.*.preparing/*.npz"))))
        if (tmp_path / "out").exists():
            break
    if list(tmp_path.glob(".out.*")):  # not done, or killed before the last of the clearing up
        finish(argv)
    assert digests(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert finished == sorted(finished) or finished[-1] == 0, "finished units were lost"


@pytest.mark.multiprocess
def test_interrupted_it_says_so_and_goes_on(text, unbroken, tmp_path):
    argv = command(text, tmp_path / "out", 2)
    job = start(argv)
    while not list(tmp_path.glob(".out.*.preparing/*.npz")):
        assert job.poll() is None
        time.sleep(0.005)
    job.send_signal(signal.SIGINT)
    _, error = job.communicate(timeout=120)
    assert job.returncode == 130
    assert error == "torus: interrupted\n"
    assert not (tmp_path / "out").exists()
    finish(argv)
    assert digests(tmp_path / "out") == unbroken[0]


@pytest.mark.multiprocess
def test_a_killed_worker_is_told_and_the_same_command_goes_on(text, unbroken, tmp_path):
    argv = command(text, tmp_path / "out", 2)
    job = start(argv)
    workers: list[int] = []
    while not workers:
        assert job.poll() is None
        for number in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
            if b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes():
                workers.append(int(number))
        time.sleep(0.005)
    os.kill(workers[0], signal.SIGKILL)
    _, error = job.communicate(timeout=120)
    assert job.returncode == 2
    assert error.startswith("torus: error: a worker was killed, for want of memory perhaps")
    finish(argv)
    assert digests(tmp_path / "out") == unbroken[0]
