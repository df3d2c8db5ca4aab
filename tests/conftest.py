"""Eight fake CPU devices for every test, set before JAX is first imported."""

import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # an installed libtpu must not look for a TPU
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",  # compiles in two thirds of the time; tests run few steps
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",  # sharding/mesh.py says why
    # Eight devices meet in every collective. On a starved machine that takes longer than the 40 s
    # after which XLA:CPU takes the process down.
    "--xla_cpu_collective_call_terminate_timeout_seconds=400",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=100",
)
for _flag in _FLAGS:
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

# A shell that starts the tests in the background makes them ignore Ctrl-C, and the children that
# tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
