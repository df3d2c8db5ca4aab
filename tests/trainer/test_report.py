"""The report of whole, crashed, resumed, tiny and empty runs; and what is no run."""

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sharding.errors import UsageError
from tests.buckets import google
from trainer import report
from trainer.commands import report as command
from trainer.compare import losses
from trainer.metrics import MetricsWriter, bits_per_byte
from trainer.report import facts, load_run, render_html, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def _make_run(folder, steps=100, first=1, resumed_from=None, **experiment):
    folder.mkdir(exist_ok=True)
    experiment = {"name": "pico", "train": {"steps": 200}} | experiment
    (folder / "experiment.json").write_text(json.dumps(experiment))
    with MetricsWriter(folder, tensorboard=False, resumed_from=resumed_from) as writer:
        if resumed_from is None:
            writer.event(
                0, "start", parameters=1234567, mesh={"data": 1, "fsdp": 8}, devices=8,
                device="NVIDIA H200", versions={"jax": "0.10.2"}, steps=200,
            )  # fmt: skip
        for step in range(first, steps + 1):
            loss = 1 + 4 * math.exp(-step / 30)
            writer.train(
                step,
                {
                    "loss": loss, "bits_per_byte": bits_per_byte(loss), "grad_norm": 0.5,
                    "learning_rate": 1e-3, "tokens_per_second": 1000.0, "mfu": 0.4,
                    "step_ms": 20.0, "data_wait_ms": 0.1, "tokens_seen": step * 64,
                    "memory_gib": 1.5,
                },
            )  # fmt: skip
            if step % 50 == 0:
                writer.eval(step, {"loss": loss, "bits_per_byte": bits_per_byte(loss)})
    return folder


def _facts(folder, now=None):
    return dict(facts(load_run(folder), time.time() if now is None else now))


def test_report_is_two_files_and_self_contained(tmp_path):
    run = _make_run(tmp_path / "run")
    page, picture = write_report(run)
    assert (page, picture) == (run / "report.html", run / "report.png")
    assert picture.read_bytes().startswith(PNG)
    text = page.read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", text) and "http" not in text
    assert "1,234,567" in text and "data:image/png;base64," in text
    assert sorted(p.name for p in run.iterdir()) == [
        "experiment.json", "metrics.jsonl", "report.html", "report.png",
    ]  # fmt: skip


def test_facts(tmp_path):
    run = _make_run(tmp_path / "run")
    for name in ("50", "100", "100.tmp"):
        (run / "checkpoints" / name).mkdir(parents=True)
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.event(100, "baseline", gzip_bits_per_byte=3.0, xz_bits_per_byte=2.5)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record["time"] = records[0]["time"] + 3660 * (record is not records[0])
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    known = _facts(run, records[-1]["time"])
    assert known["Name"] == "pico"
    assert known["Status"] == "running, step 100 of 200"
    assert known["Mesh"] == "data 1, fsdp 8"
    assert known["Device"] == "8 x NVIDIA H200"
    assert known["Tokens seen"] == "6,400"
    assert known["Eval loss"].startswith("best 1.1427 at step 100")
    assert known["gzip, xz bits per byte"] == "3.000, 2.500"
    assert known["MFU"] == "median 40.0%"
    assert known["Checkpoints"] == "50, 100"
    assert known["Wall time"] == "1h01m"
    assert "Updates skipped" not in known


def _loss_axes(run):
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.add_subplot()
    report._draw_loss(axes, load_run(run))
    FigureCanvasAgg(figure).draw()
    return axes


def test_compressors_and_bits_are_drawn_to_scale(tmp_path):
    """With 4 bytes a token, a loss of L nats is L / ln 2 / 4 bits per byte."""
    run = _make_run(tmp_path / "run", steps=1)
    with MetricsWriter(run, tensorboard=False) as writer:
        for step in (2, 3):
            loss = 6.0 / step
            values = {"loss": 9.0, "mean_loss": loss, "bits_per_byte": bits_per_byte(loss, 4.0)}
            writer.train(step, values)
        writer.event(3, "baseline", gzip_bits_per_byte=3.0, xz_bits_per_byte=2.5)
    axes = _loss_axes(run)
    lines = {line.get_label(): line for line in axes.get_lines()}
    for label, bits in (("gzip -9, 3.00", 3.0), ("xz -9, 2.50", 2.5)):
        line = lines[f"{label} bits per byte"]
        assert list(line.get_ydata()) == pytest.approx([bits * 4 * math.log(2)] * 2)
    (right,) = axes.child_axes
    nats, bits = np.asarray(axes.get_ylim()), np.asarray(right.get_ylim())
    np.testing.assert_allclose(bits, nats / math.log(2) / 4, rtol=1e-6)


def test_curves_are_means_and_no_label_lies_on_them(tmp_path):
    run = _make_run(tmp_path / "run", steps=50, name="a name with a $formula\\nonsense$ " * 9)
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.event(50, "baseline", gzip_bits_per_byte=3.0, xz_bits_per_byte=2.5)
        writer.event(50, "hang")
        writer.train(51, {"loss": math.nan, "mean_loss": math.nan})
        writer.train(52, {"loss": 4.5, "mean_loss": 1.25})
    axes = _loss_axes(run)
    (curve,) = [line for line in axes.get_lines() if line.get_label() == "train"]
    assert curve.get_xydata()[-1].tolist() == [52, 1.25]
    legend, title = axes.get_legend().get_window_extent(), axes._left_title.get_window_extent()
    assert legend.y0 >= axes.bbox.y1 - 1 and title.y0 >= legend.y1 - 1
    assert not axes.texts
    assert dict(facts(load_run(run), time.time()))["Train loss"] == "1.2500 at step 52"


def test_memory_takes_the_place_of_an_mfu_that_is_not_known(tmp_path, monkeypatch):
    titles = []
    style = report._style
    monkeypatch.setattr(report, "_style", lambda *a, **k: (titles.append(a[1]), style(*a, **k)))
    run = _make_run(tmp_path / "run", steps=3)
    report.draw(load_run(run))
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"mfu": 0.4', '"mfu": null'))
    report.draw(load_run(run))
    assert titles[5] == "MFU, %" and titles[12] == "Highest memory in use, GiB"
    assert "MFU" not in _facts(run)


def test_status_of_a_stopped_and_of_a_finished_run(tmp_path):
    run = _make_run(tmp_path / "run")
    later = time.time() + 7200
    assert _facts(run, later)["Status"] == "silent since step 100 of 200, 2h00m before this report"
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.event(100, "stopped", by="SIGTERM")
    assert _facts(run, later)["Status"] == "stopped at step 100 of 200 by SIGTERM"
    _make_run(run, first=101, steps=200, resumed_from=100)
    assert _facts(run, later)["Status"].startswith("silent since step 200")
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.event(200, "finished")
    assert _facts(run, later)["Status"] == "finished at step 200 of 200"


def test_incidents_and_names_are_shown_and_escaped(tmp_path):
    run = _make_run(tmp_path / "run", name="<b>pico</b>")
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.event(60, "hang", reason="no <heartbeat>", host=3)
        writer.event(60, "checkpoint", seconds=1.23456)
        writer.train(101, {"loss": math.nan, "skipped_steps": 1})
    text = render_html(load_run(run), b"", now=time.time())
    assert "no &lt;heartbeat&gt;" in text and "<b>pico" not in text
    assert text.count('class="alert"') == 1
    assert "seconds 1.235" in text
    assert _facts(run)["Updates skipped"] == "1"


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"kind": "train", "step": 1, "time": 1.0, "loss": 5.0}\n',
        '{"kind": "train", "step": 1, "time": 1.0, "loss": "NaN"}\n{"kind": "tr',
        '{"kind": "event", "step": 0, "time": 1.0, "event": "start"}\n',
        '{"kind": "eval", "step": 0, "time": 1.0, "loss": 0.0}\n',
    ],
    ids=["empty", "one record", "only NaN, torn", "only an event", "zero loss"],
)
def test_small_runs(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    page, picture = write_report(tmp_path)
    assert picture.read_bytes().startswith(PNG) and page.stat().st_size > 1000


def test_run_that_crashed_before_its_first_record(tmp_path):
    (tmp_path / "experiment.json").write_text('{"name": "early"}')
    write_report(tmp_path)
    assert _facts(tmp_path)["Status"] == "nothing recorded yet"


def test_a_run_in_a_bucket(tmp_path, monkeypatch):
    """Read there, and by default written there; a run without a name has its folder's."""
    (tmp_path / "bucket").mkdir()
    _make_run(tmp_path / "bucket" / "pico", steps=3, name="")
    with google() as store:
        store.fill("bucket", tmp_path / "bucket")
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        page, _ = write_report("gs://bucket/pico", tmp_path / "out")
        assert "<title>pico</title>" in page.read_text()
        write_report("gs://bucket/pico")
        assert store.buckets["bucket"]["pico/report.png"].startswith(PNG)


def test_long_runs_stay_light(tmp_path):
    line = '{{"kind": "train", "step": {0}, "time": {0}.0, "loss": 2.0, "mfu": 0.5}}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(map(line.format, range(1, 30_001))))
    page, _ = write_report(tmp_path)
    assert page.stat().st_size < 2e6


@pytest.mark.parametrize("make", [None, "folder"])
def test_what_is_no_run(tmp_path, make):
    folder = tmp_path / "elsewhere"
    if make:
        folder.mkdir()
    with pytest.raises(UsageError, match=rf"no run at {re.escape(str(folder))}: "):
        write_report(folder)
    assert folder.exists() == bool(make) and not list(tmp_path.rglob("report.*"))


def test_broken_experiment_is_named(tmp_path):
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(UsageError, match=r"experiment\.json is not JSON"):
        write_report(tmp_path)


def test_command_writes_where_told(tmp_path, capsys):
    run = _make_run(tmp_path / "run")
    assert command.main([str(run), f"--out={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "out" / name) for name in ("report.html", "report.png")
    ]
    assert not (run / "report.html").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file; name a folder"):
        command.main([str(run), f"--out={tmp_path / 'file'}"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "torus report: the following arguments are required: RUN"),
        (["runs/a", "--ouut=x"], "does not take `--ouut=x`; did you mean `--out`?"),
    ],
)
def test_command_refuses(argv, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        command.main(argv)


def test_incidents_of_a_supervisor_are_shown(tmp_path):
    _make_run(tmp_path)
    crash = {"time": 5.0, "generation": 0, "kind": "crash", "rank": 1, "step": 7, "cause": "gone"}
    (tmp_path / "incidents.jsonl").write_text(json.dumps(crash) + '\n{"time": 6.0, "ki')
    (shown,) = [e for e in load_run(tmp_path).events if e["event"] == "crash"]
    assert (shown["step"], shown["cause"], shown["rank"]) == (7, "gone", 1)


def test_several_runs_in_one_picture_and_table(tmp_path, capsys):
    a = _make_run(tmp_path / "a", train={"steps": 200, "seed": 0})
    b = _make_run(tmp_path / "b", steps=60, name="<i>b", train={"steps": 200, "seed": 1})
    assert command.main([str(a), str(b), f"--out={tmp_path / 'out'}"]) == 0
    page, picture = (Path(line) for line in capsys.readouterr().out.splitlines())
    assert picture.read_bytes().startswith(PNG)
    text = page.read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", text) and "<i>" not in text
    assert "<tr><th>config.train.seed</th><td>0</td><td>1</td></tr>" in text
    assert "config.train.steps" not in text, "what is alike is left out"
    assert re.search(r"<th>Train loss</th><td>1\.14.*?</td><td>1\.54", text)
    assert not list(a.glob("compare.*"))


@pytest.mark.parametrize(
    ("runs", "message"),
    [(["a", "a"], "named twice"), (["a", "nothing"], "no run at"), (["a"] * 9, "at most 8")],
)
def test_what_cannot_be_compared(runs, message, tmp_path):
    _make_run(tmp_path / "a", steps=2)
    with pytest.raises(UsageError, match=message):
        command.main([*(str(tmp_path / run) for run in runs), f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_losses_that_a_picture_can_show():
    records = [{"step": step, "loss": math.nan if step % 2 else 1.0} for step in range(10_000)]
    assert len(losses(records)) <= 2000 and not any(step % 2 for step, _ in losses(records))
    assert losses([]) == losses([{"step": 1}]) == []
