"""Settings of the whole process, and the one place for what JAX keeps private.

Commands call these before the first device is asked for; libraries and tests that do not are left
alone. A private name of JAX that is not there, or not what it was, costs its benefit and no more.
"""

import contextlib
import ctypes
import glob
import inspect
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sharding.addresses import ADDRESS, is_loopback, own_address, without_port
from sharding.config import cache_folder
from sharding.hardware import has_tpu

ORDERED_COLLECTIVES = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # of malloc.h


def start_runtime() -> None:
    """Prepares JAX before the first device is asked for; safe to call twice.

    Keeps an installed libtpu from searching for a TPU that is not there, switches the persistent
    compilation cache on and joins a multi-process job: the one that JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID describe, or with TORUS_DISTRIBUTED=1 the one that JAX
    finds by itself (Cloud TPU, SLURM, Open MPI).
    """
    keep_freed_memory()
    platforms = jax.config.jax_platforms
    if platforms and "cpu" not in platforms.split(","):  # what is done on the host is compiled too
        jax.config.update("jax_platforms", f"{platforms},cpu")
    if not has_tpu():
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # With libtpu installed for ahead-of-time work, JAX would try a TPU first and log errors.
        if not glob.glob("/dev/nvidia[0-9]*") and not jax.config.jax_platforms:
            jax.config.update("jax_platforms", "cpu")
    _order_collectives()
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        # The small programs too, some thirty a run: a restart waits for each of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # XLA:CPU warns about tuning flags of its own when it loads a cached program.
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.ERROR)
    count = os.environ.get("JAX_NUM_PROCESSES")
    if count and int(count) > 1 and not jax.distributed.is_initialized():
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        _share_compiled()
        _name_this_host(os.environ["JAX_COORDINATOR_ADDRESS"])
        # JAX's own notifier would swallow a SIGTERM until the loop asks for signals itself.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(count),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )
    elif os.environ.get("TORUS_DISTRIBUTED") == "1" and not jax.distributed.is_initialized():
        jax.distributed.initialize()


def keep_freed_memory() -> None:
    """Has glibc keep large blocks that are freed: asking for them anew costs more than copying.

    Restores and saves on the host take 0.3 to 0.7 of the time so (docs/benchmarks.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # not so without glibc
        for option, value in ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, 2**30), (_ARENA_MAX, 1)):
            mallopt(option, value)


def _name_this_host(coordinator: str) -> None:
    """Has CPU collectives listen where the other hosts reach this one.

    Gloo would look up the host's own name, which may be unknown, mean this machine alone
    (127.0.1.1 on Debian), or lie on another network. JAX passes no name on (0.10 to 0.12).
    """
    near = without_port(coordinator)
    address = os.environ.get(ADDRESS, "")
    with contextlib.suppress(OSError):  # then gloo's own way may still do
        address = address or own_address(near)
    known = ADDRESS in os.environ or near in ("localhost", address)
    if not address or (is_loopback(address) and not known):
        return
    try:
        from jax._src import xla_bridge

        make = xla_bridge._jax.make_gloo_tcp_collectives
    except (ImportError, AttributeError) as error:
        logging.getLogger(__name__).info("gloo looks up this host's own name: %s", error)
        return

    def make_here(*arguments: Any, **named: Any) -> Any:
        return make(*arguments, **{"hostname": address, **named})

    xla_bridge._jax.make_gloo_tcp_collectives = make_here


def _share_compiled() -> None:
    """Has every CPU process of a job find in the cache what the first one has compiled.

    The key holds a fingerprint of the topology, which on the CPU is another in each process (JAX
    0.10 to 0.12), and only the first writes: all others would compile anew at every restart. Where
    JAX computes the key in another way they do.
    """
    try:
        from jax._src import cache_key

        described = cache_key._hash_accelerator_config
        if len(inspect.signature(described).parameters) != 2:
            raise AttributeError("other parameters")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        logging.getLogger(__name__).info("each process compiles for itself: %s", error)
        return
    processor = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    kinds = "".join(
        sorted({li for li in processor.splitlines() if li.startswith(("flags", "Features"))})
    )

    def describe(key: Any, devices: Any) -> None:
        if isinstance(devices, np.ndarray) and devices.flat[0].platform == "cpu":
            key.update(kinds.encode())
        else:
            described(key, devices)

    cache_key._hash_accelerator_config = describe


def _order_collectives() -> None:
    """Keeps several CPU devices, in one process or many, from waiting for each other for ever.

    XLA:CPU runs what does not depend on one another concurrently, also a collective beside a loop
    that holds others, and each device picks an order of its own. Its other scheduler does not.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    several = "xla_force_host_platform_device_count" in flags or "JAX_NUM_PROCESSES" in os.environ
    if several and ORDERED_COLLECTIVES.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {ORDERED_COLLECTIVES}".strip()
