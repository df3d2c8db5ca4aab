"""Eight fake CPU devices and a cache for every test, set before JAX is first imported."""

import gc
import os
import shutil
import signal
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The built-in dataset and compiled programs, of one worker: JAX does not write its cache so that
# another process may read it meanwhile.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ["TORUS_CACHE"] = str(ROOT / ".pytest_cache" / f"torus-{WORKER}")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # an installed libtpu must not look for a TPU
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",  # compiles in two thirds of the time; tests run few steps
    # A third of the time on JAX 0.10, and the programs of tests are small; 0.11 has it no more.
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jax").startswith("0.10.") else []),
    # Compiling a program in pieces at the same time costs a fifth more, and both cores have work.
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",  # sharding/runtime.py says why
    # Eight devices meet in every collective. On a starved machine that takes longer than the 40 s
    # after which XLA:CPU takes the process down.
    "--xla_cpu_collective_call_terminate_timeout_seconds=180",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=60",
)
for _flag in _FLAGS:
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

# A shell that starts the tests in the background makes them ignore Ctrl-C, and the children that
# tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two workers end together when the files that take longest are begun first.
_LONGEST = (
    "trainer/test_pairs.py", "models/test_sequence.py", "trainer/test_resume.py",
    "trainer/test_step.py", "trainer/recovery/test_hosts_protocol.py",
    "models/attention/test_attention_oracle.py", "trainer/data/test_remote.py",
    "trainer/test_guard.py", "models/test_decoder.py", "trainer/recovery/test_launch.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {ROOT / "tests" / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Spares Python's collector what earlier modules left: JAX keeps every traced program, and in
    a worker that has run for ten minutes one collection takes 2 s instead of 0.1 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """A copy of the cache for a module whose processes are killed, perhaps while they write it."""
    folder, shared = tmp_path_factory.mktemp("cache"), os.environ["TORUS_CACHE"]
    if os.path.isdir(shared):
        shutil.copytree(shared, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORUS_CACHE", str(folder))
        yield
