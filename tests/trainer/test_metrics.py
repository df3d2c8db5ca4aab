"""Records survive crashes, restarts and NaN; rates leave out what is not training."""

import json
import math
import os
import pty
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto import event_pb2

from sharding.errors import UsageError
from trainer import metrics
from trainer.console import Console, format_duration, format_record
from trainer.metrics import (
    LogConfig,
    MetricsWriter,
    StepTimer,
    bits_per_byte,
    memory_gib,
    read_metrics,
)

ROOT = Path(__file__).parents[2]


def _steps(records):
    return [record["step"] for record in records]


def _write(folder, steps, value=1.0, **options):
    with MetricsWriter(folder, tensorboard=False, **options) as writer:
        for step in steps:
            writer.train(step, {"loss": value})


def test_records_round_trip(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.train(1, {"loss": jnp.float32(2.5), "grad_norm": np.float64(0.5), "mfu": None})
        writer.eval(1, {"loss": 2.25})
        writer.event(1, "start", mesh={"fsdp": 8}, parameters=10, folder=Path("x"))
    train, evaluation, event = read_metrics(tmp_path)
    assert train["loss"] == 2.5 and train["grad_norm"] == 0.5 and train["mfu"] is None
    assert abs(train["time"] - time.time()) < 60
    assert evaluation["kind"] == "eval"
    assert event["event"] == "start" and event["mesh"] == {"fsdp": 8} and event["folder"] == "x"
    assert read_metrics(tmp_path, "eval") == [evaluation]
    assert read_metrics(tmp_path / "metrics.jsonl", "train") == [train]


def test_each_record_is_on_disk_at_once(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.train(1, {"loss": 1.0})
        assert _steps(read_metrics(tmp_path)) == [1]


def test_values_that_json_lacks(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.train(1, {"loss": math.nan, "grad_norm": math.inf})
        writer.event(1, "spike", norms={"a": -math.inf})
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    train = read_metrics(tmp_path)[0]
    assert math.isnan(train["loss"]) and train["grad_norm"] == math.inf


def test_missing_file_is_an_empty_run(tmp_path):
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("tear", [b'{"kind": "train", "st', b"\xff\xfe\x00", b'"text"', b"{}"])
def test_torn_last_line_is_passed_over_and_appended_after(tmp_path, tear):
    _write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tear)
    assert _steps(read_metrics(tmp_path)) == [1, 2]
    _write(tmp_path, [3])
    assert _steps(read_metrics(tmp_path)) == [1, 2, 3]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)  # nothing of the torn line is left for other readers to fall over


def test_any_cut_of_the_file_reads_and_continues(tmp_path):
    _write(tmp_path, range(1, 6))
    content = (tmp_path / "metrics.jsonl").read_bytes()
    for length in range(len(content)):
        (tmp_path / "metrics.jsonl").write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        assert _steps(read_metrics(tmp_path))[:whole] == list(range(1, whole + 1))
        _write(tmp_path, [9])
        assert _steps(read_metrics(tmp_path)) == [*range(1, whole + 1), 9]


def test_resume_supersedes_later_records_and_keeps_events(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (10, 20, 30, 40):
            writer.train(step, {"loss": 1.0})
        writer.eval(20, {"loss": 1.0})
        writer.eval(40, {"loss": 1.0})
        writer.event(40, "crash")
    _write(tmp_path, [30], value=2.0, resumed_from=20)
    assert _steps(read_metrics(tmp_path, "train")) == [10, 20, 30]
    assert read_metrics(tmp_path, "train")[-1]["loss"] == 2.0
    assert _steps(read_metrics(tmp_path, "eval")) == [20]
    assert [e["event"] for e in read_metrics(tmp_path, "event")] == ["crash", "resumed"]


def test_last_record_of_a_step_counts(tmp_path):
    _write(tmp_path, [10, 20], value=1.0)
    _write(tmp_path, [10], value=3.0)
    records = read_metrics(tmp_path)
    assert {r["step"]: r["loss"] for r in records} == {10: 3.0, 20: 1.0}


def test_other_processes_write_nothing(tmp_path):
    folder = tmp_path / "run"
    with MetricsWriter(folder, process_index=1, console=Console(1)) as writer:
        writer.train(1, {"loss": 1.0})
    assert not folder.exists()


def test_start_over_supersedes_all(tmp_path):
    _write(tmp_path, [1, 2])
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.event(0, "start")
        writer.train(1, {"loss": 2.0})
    assert _steps(read_metrics(tmp_path, "train")) == [1]


def test_a_new_run_is_not_resumed(tmp_path):
    _write(tmp_path, [1], resumed_from=0)
    assert read_metrics(tmp_path, "event") == []
    _write(tmp_path, [1], resumed_from=0)
    assert [e["event"] for e in read_metrics(tmp_path, "event")] == ["resumed"]


def test_object_store(tmp_path, monkeypatch):
    """A store cannot append: the file is rewritten whole, now and then and at the end."""
    monkeypatch.setattr(metrics, "folder_path", lambda folder: tmp_path / "bucket")
    with MetricsWriter("gs://bucket/run") as writer:
        writer.train(1, {"loss": 1.0})
        assert read_metrics("gs://bucket/run") == []
        monkeypatch.setattr(metrics._RewrittenFile, "_SECONDS", -1.0)
        writer.train(2, {"loss": 1.0})
        assert _steps(read_metrics("gs://bucket/run")) == [1, 2]
    with MetricsWriter("gs://bucket/run") as writer:
        writer.train(3, {"loss": 1.0})
    assert _steps(read_metrics("gs://bucket/run")) == [1, 2, 3]
    assert [path.name for path in (tmp_path / "bucket").iterdir()] == ["metrics.jsonl"]


def test_object_store_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "folder_path", lambda folder: tmp_path / "bucket")
    with MetricsWriter("gs://bucket/run") as writer:
        writer.train(1, {"loss": 1.0})
        (tmp_path / "bucket").rmdir()
    assert "could not write" in caplog.text


def test_tensorboard_gets_finite_numbers(tmp_path):
    with MetricsWriter(tmp_path, resumed_from=0) as writer:
        writer.train(1, {"loss": 1.5, "grad_norm": math.nan, "mfu": None})
        writer.event(1, "note")
    files = list((tmp_path / "tensorboard").iterdir())
    content = b"".join(file.read_bytes() for file in files)
    assert b"train/loss" in content and b"train/grad_norm" not in content


def test_a_run_that_begins_anew_takes_its_old_curves_out_of_tensorboard(tmp_path):
    """TensorBoard drops what was drawn before of the step of a START, and of later ones."""
    starts = []
    for _ in range(2):  # the first attempt saved nothing
        with MetricsWriter(tmp_path) as writer:
            writer.train(1, {"loss": 1.5})
        (file,) = (tmp_path / "tensorboard").iterdir()
        content = file.read_bytes()
        file.unlink()
        while content:  # length, its checksum, an event, its checksum
            (size,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            starts += [event.step] if event.HasField("session_log") else []
            content = content[16 + size :]
    assert starts == [1]


def test_tensorboard_folder_only_when_asked(tmp_path):
    _write(tmp_path, [1])
    assert not (tmp_path / "tensorboard").exists()


def test_bits_per_byte():
    assert bits_per_byte(math.log(256)) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), bytes_per_token=4.0) == pytest.approx(2.0)


def test_memory_of_devices_and_of_the_host():
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    busy, idle = ({"peak_bytes_in_use": n * 2**30} for n in (3, 1))
    assert memory_gib([Device(idle), Device(busy)]) == 3.0
    assert 0.01 < memory_gib([Device(None)]) < 1000  # resident memory of this process


@pytest.mark.parametrize(
    "change", [{"every": 0}, {"profile_start": -2}, {"profile_steps": 0}], ids=str
)
def test_log_config_refuses(change):
    with pytest.raises(UsageError, match=rf"config\.log\.{next(iter(change))} = "):
        LogConfig(**change).validate()


class Clock:
    """A clock that tests move by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def _timer(clock, **options):
    return StepTimer(total_steps=100, tokens_per_step=1000, clock=clock, **options)


def test_first_report_has_no_rates():
    clock = Clock()
    timer = _timer(clock)
    clock.now += 60  # compilation and the first step
    assert timer.report(1) == {"tokens_seen": 1000}
    clock.now += 2
    assert timer.report(11)["step_ms"] == pytest.approx(200)


def test_rates_leave_out_pauses():
    clock = Clock()
    timer = _timer(clock, flops_per_step=5e9, peak_flops=1e11, device_count=4)
    timer.report(1)
    for _ in range(10):
        with timer.data_wait():
            clock.now += 0.02
        clock.now += 0.08
    with timer.pause():
        clock.now += 50
    fields = timer.report(11)
    assert fields["step_ms"] == pytest.approx(100)
    assert fields["data_wait_ms"] == pytest.approx(20)
    assert fields["tokens_per_second"] == pytest.approx(10_000)
    assert fields["tokens_per_second_per_device"] == pytest.approx(2_500)
    assert fields["mfu"] == pytest.approx(0.5)
    assert fields["eta_seconds"] == pytest.approx(51 / 10 * 89)  # evaluations to come cost too
    assert fields["tokens_seen"] == 11_000
    clock.now += 1
    assert timer.report(21)["step_ms"] == pytest.approx(100)


def test_pause_waits_for_the_running_step_first():
    clock = Clock()
    timer = _timer(clock)
    timer.report(1)

    class Pending:
        def block_until_ready(self):
            clock.now += 1

    with timer.pause(Pending()):
        clock.now += 10
    assert timer.report(2)["step_ms"] == pytest.approx(1000)


def test_mfu_is_null_without_a_peak():
    clock = Clock()
    timer = _timer(clock, flops_per_step=1e9)
    timer.report(1)
    clock.now += 1
    assert timer.report(2)["mfu"] is None


RECORD = {
    "kind": "train", "step": 120, "time": 0.0, "loss": 1.2344, "bits_per_byte": 1.781,
    "grad_norm": 0.523, "learning_rate": 3e-4, "tokens_per_second": 12345.4, "mfu": 0.412,
    "step_ms": 212.3, "data_wait_ms": 0.31, "skipped_steps": 0, "eta_seconds": 192.2,
}  # fmt: skip


def test_log_line():
    assert format_record(RECORD, 2000) == (
        "step 120/2000  loss 1.234  bpb 1.78  grad 0.52  tok/s 12.3k  mfu 41%  eta 3m12s"
    )
    on_cpu = RECORD | {"mfu": None, "bits_per_byte": None, "data_wait_ms": 30.0}
    assert format_record(on_cpu, 2000) == (
        "step 120/2000  loss 1.234  grad 0.52  tok/s 12.3k  data 30.0 ms  eta 3m12s"
    )
    quiet = RECORD | {"mfu": None, "bits_per_byte": None}
    assert "lr 3.0e-04" in format_record(quiet, 2000)  # where there is room
    mean = format_record(RECORD | {"mean_loss": 1.5}, 2000)
    assert "loss 1.500" in mean and "1.234" not in mean
    first = {"kind": "train", "step": 1, "time": 0.0, "loss": math.nan, "skipped_steps": 1}
    assert format_record(first, 2000) == "step 1/2000  loss nan  SKIPPED 1"
    event = {"kind": "event", "step": 5, "time": 0.0, "event": "hang", "host": 3, "mesh": {"a": 1}}
    assert format_record(event, 9) == "hang at step 5/9  host 3"


@given(
    step=st.integers(1, 10**7), total=st.integers(1, 10**7), loss=st.floats(0, 20),
    grad=st.floats(0, 1e6), rate=st.floats(1, 1e10), ms=st.floats(0.1, 1e5),
    wait=st.floats(0, 1e5), skipped=st.integers(0, 99), eta=st.floats(0, 1e7),
    mfu=st.none() | st.floats(0, 1),
)  # fmt: skip
def test_step_lines_fit_in_80_columns(
    step, total, loss, grad, rate, ms, wait, skipped, eta, mfu
):  # fmt: skip
    record = RECORD | {
        "step": step, "loss": loss, "grad_norm": grad, "tokens_per_second": rate, "mfu": mfu,
        "step_ms": ms, "data_wait_ms": wait, "skipped_steps": skipped, "eta_seconds": eta,
    }  # fmt: skip
    line = format_record(record, total)
    assert len(line) <= 80 and line.startswith(f"step {step}/{total}  loss {loss:.3f}  ")
    assert "tok/s" in line and ("SKIPPED" in line) == (skipped > 0)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(950.4, "950"), (999.4, "999"), (999.6, "1k"), (12345.4, "12.3k"), (999_499, "999k"),
     (999_600, "1M"), (4_012_345, "4.01M"), (2.5e9, "2.5G"), (3e12, "3.0e+12")],
)  # fmt: skip
def test_rates_are_short(rate, text):
    line = format_record({"kind": "train", "step": 1, "tokens_per_second": rate}, 2)
    assert line == f"step 1/2  tok/s {text}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "1m00s"), (192, "3m12s"), (18420, "5h07m"), (183600, "2d03h")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_console_without_terminal_writes_plain_lines(capsys):
    with Console(2000) as console:
        console.show(RECORD)
        console.show({"kind": "eval", "step": 120, "time": 0.0, "loss": 1.3})
        console.print("saved")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [format_record(RECORD, 2000), "eval 120/2000  loss 1.300", "saved"]


_ON_TERMINAL = """
import time
from trainer import metrics
from trainer.console import Console
with Console(200) as console:
    for step in range(1, 200):
        console.show({"kind": "train", "step": step, "time": 0.0, "loss": 1.0, "mfu": 0.41})
        time.sleep(0.05)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGKILL"])
def test_terminal_is_sane_after_an_interrupt(signal_name):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _ON_TERMINAL],
        cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    output = b""
    while b"step 3/200" not in output:
        output += os.read(master, 4096)
    process.send_signal(getattr(signal, signal_name))
    while True:
        try:
            output += os.read(master, 4096)
        except OSError:  # the terminal's other end is closed
            break
    process.wait(10)
    os.close(master)
    assert b"mfu 41%" in output and b"3/200" in output
    hidden, shown = output.rfind(b"\x1b[?25l"), output.rfind(b"\x1b[?25h")
    assert shown > hidden >= 0
    if signal_name == "SIGINT":
        assert process.returncode != 0 and b"KeyboardInterrupt" in output
