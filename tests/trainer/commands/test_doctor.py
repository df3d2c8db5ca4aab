"""Every finding of the doctor's can be provoked, and failures decide its exit status."""

import builtins
import shutil
import sys
from collections import namedtuple
from types import SimpleNamespace

import jax
import pytest

from sharding.errors import UsageError
from sharding.hardware import CHIPS
from trainer.commands import doctor


@pytest.fixture(autouse=True)
def _no_runtime(monkeypatch, tmp_path):
    """Tests share one JAX: what the doctor would set up there must not outlive it."""
    fake = SimpleNamespace(start_runtime=lambda: None)
    monkeypatch.setitem(sys.modules, "sharding.runtime", fake)
    return fake


def _statuses(findings):
    return [finding.status for finding in findings]


def test_healthy_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "check_platform_packages", lambda: [])
    assert doctor.main([str(tmp_path / "not" / "yet")]) == 0
    out = capsys.readouterr().out
    for subject in (
        "python",
        "packages",
        "import",
        "devices",
        "matmul",
        "links",
        "memory",
        "workdir",
    ):
        assert f" {subject} " in out
    assert "8 x cpu" in out and "FAIL" not in out
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_failure_decides_the_status(tmp_path, capsys, monkeypatch):
    problem = 'torus needs jax>=9, but 1 is installed: pip install "jax>=9"'
    monkeypatch.setattr(doctor, "check_packages", lambda: [problem])
    assert doctor.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL  packages    torus needs jax>=9, but 1 is installed\n" in out
    assert '-> pip install "jax>=9"' in out and "1 failed" in out


def test_platform_package_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "check_platform_packages", lambda: ["a needs b: pip install b"])
    assert _statuses(doctor.check_versions()) == ["warn", "ok"]


def test_broken_package(monkeypatch):
    def refuse(name):
        raise ImportError(f"cannot import {name}\nsecond line")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    (finding,) = doctor.check_imports()
    assert finding.status == "FAIL" and finding.text == "jax: ImportError: cannot import jax"


def test_jax_that_cannot_start(_no_runtime):
    def fail():
        raise RuntimeError("no driver\nmore")

    _no_runtime.start_runtime = fail
    (finding,) = doctor.check_devices()
    assert finding.status == "FAIL" and "RuntimeError: no driver" in finding.text
    assert "JAX_PLATFORMS" in finding.advice


def test_accelerator_facts_and_unknown_kinds(monkeypatch):
    monkeypatch.setattr(doctor, "_check_matmuls", lambda devices, peak: iter(()))
    device = SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * 4)
    (finding,) = doctor.check_devices()
    assert finding.status == "ok"
    assert finding.text == "4 x TPU v5 lite (tpu): each 197 TFLOP/s bfloat16, 17 GB at 819 GB/s"
    device.device_kind = "TPU v99"
    (finding,) = doctor.check_devices()
    assert finding.status == "warn" and "chip table" in finding.advice


def test_accelerator_that_jax_does_not_use(monkeypatch):
    monkeypatch.setattr(doctor, "_check_matmuls", lambda devices, peak: iter(()))
    monkeypatch.setattr(doctor, "_idle_accelerator", lambda: "install it")
    (finding,) = doctor.check_devices()
    assert finding.status == "warn" and finding.advice == "install it"


def test_links(monkeypatch):
    (finding,) = doctor.check_links()
    assert finding.status == "ok" and finding.text.startswith("8 devices compute alike")
    monkeypatch.setattr("trainer.integrity.device_problem", lambda mesh: "device 3 of process 0: x")
    (finding,) = doctor.check_links()
    assert (finding.status, finding.text) == ("FAIL", "device 3 of process 0: x")


def _device(index, platform="gpu"):
    return SimpleNamespace(id=index, platform=platform)


@pytest.mark.parametrize(
    ("rates", "status", "advice"),
    [
        ([700e12] * 4, "ok", ""),
        ([700e12, 700e12, 300e12, 690e12], "warn", "device 2 is slow"),
        ([100e12] * 4, "warn", "the datasheet says 989"),
    ],
)
def test_matmul_rates(monkeypatch, rates, status, advice):
    monkeypatch.setattr(doctor, "_matmul_rate", lambda device: rates[device.id])
    devices = [_device(i) for i in range(4)]
    (finding,) = doctor._check_matmuls(devices, CHIPS["h100"].flops_bf16)
    assert finding.status == status and finding.advice.startswith(advice)


def test_wrong_matmul(monkeypatch):
    def rate(device):
        if device.id == 1:
            raise ArithmeticError("a matrix product came out wrong")
        return 1e12

    monkeypatch.setattr(doctor, "_matmul_rate", rate)
    bad, rest = doctor._check_matmuls([_device(0), _device(1)], None)
    assert bad.status == "FAIL" and "device 1: ArithmeticError" in bad.text
    assert "right on 1 of 2 devices" in rest.text


def test_matmul_rate_notices_a_wrong_product(monkeypatch):
    device = jax.local_devices()[0]
    assert doctor._matmul_rate(device) > 1e8
    monkeypatch.setattr(jax.lax, "fori_loop", lambda low, high, body, x: x)
    with pytest.raises(ArithmeticError, match="came out wrong"):
        doctor._matmul_rate(device)


@pytest.mark.parametrize(
    ("meminfo", "limit", "status", "text"),
    [
        ("MemAvailable: 8388608 kB\n", "max\n", "ok", "8.0 GiB free of"),
        ("MemAvailable: 1048576 kB\n", "", "warn", "1.0 GiB free of"),
        ("MemAvailable: 8388608 kB\n", f"{2**30}\n", "warn", "container's limit is 1.0"),
    ],
)
def test_memory(monkeypatch, meminfo, limit, status, text):
    files = {"/proc/meminfo": meminfo, "/sys/fs/cgroup/memory.max": limit}
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(path, "0"))
    (finding,) = doctor.check_memory()
    assert finding.status == status and text in finding.text


def test_cache(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(config=SimpleNamespace()))
    assert _statuses(doctor.check_cache()) == ["warn"]
    jax.config.jax_compilation_cache_dir  # the real one is untouched  # noqa: B018
    for folder, text in (("gs://bucket/xla", "gs://bucket/xla"), (str(tmp_path), "writes")):
        monkeypatch.setattr(
            sys.modules["jax"].config, "jax_compilation_cache_dir", folder, raising=False
        )
        (finding,) = doctor.check_cache()
        assert text in finding.text


@pytest.mark.parametrize(
    ("seconds", "skew", "free", "statuses", "advice"),
    [
        (0.1, 0.0, 100, ["ok"], ""),
        (10.0, 0.0, 100, ["warn"], "slow to save"),
        (0.1, 0.0, 10, ["warn"], "will fill it"),
        (0.1, 60.0, 100, ["ok", "warn"], ""),
        (0.1, 0.0, 0, ["FAIL"], "free some space"),
    ],
)
def test_disk(tmp_path, monkeypatch, seconds, skew, free, statuses, advice):
    usage = namedtuple("usage", "free")(free * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(doctor, "_write_file", lambda folder, size: (seconds, skew))
    findings = list(doctor.check_disk("workdir", tmp_path))
    assert _statuses(findings) == statuses
    assert advice in findings[0].advice


def test_disk_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(folder, size):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "_write_file", refuse)
    (finding,) = doctor.check_disk("workdir", tmp_path)
    assert finding.status == "FAIL" and "Permission denied" in finding.text


def test_unreadable_files_are_empty(monkeypatch):
    def refuse(*args, **options):
        raise PermissionError

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr("io.open", refuse)
    assert doctor._read("/proc/none") == ""


def test_arguments():
    with pytest.raises(UsageError, match="torus doctor: does not take `--fast`"):
        doctor.main(["--fast"])
