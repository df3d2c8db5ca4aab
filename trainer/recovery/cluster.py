"""Which host of how many this is, from what the scheduler says in the environment.

JAX_PROCESS_ID, JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS come first; then a step of SLURM
(`srun`), then the list of hosts that GKE gives a TPU slice. JobSet says its part in the first form,
set by tpu_scripts/jobset.yaml.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sharding.addresses import without_port
from sharding.errors import UsageError

VARIABLES = ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS")


@dataclass(frozen=True)
class Cluster:
    """This host is number `host` of `hosts`, and the first one is reached at `address`."""

    host: int = 0
    hosts: int = 1
    address: str = "127.0.0.1"


def find_cluster(environment: Mapping[str, str]) -> Cluster:
    """Returns this host's place; one host where nothing is said of others.

    Raises:
      UsageError: a variable that is no number, out of range or missing beside the others.
    """
    if any(name in environment for name in VARIABLES):
        index, count, address = VARIABLES
        first = environment.get(address, "127.0.0.1")
    elif "SLURM_STEP_NODELIST" in environment:
        index, count, address = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"
        first = _first_node(environment[address])
    elif "TPU_WORKER_HOSTNAMES" in environment:
        index, count, address = "TPU_WORKER_ID", "", "TPU_WORKER_HOSTNAMES"
        first = environment[address].split(",")[0]
    else:
        return Cluster()
    several = len(environment.get(address, "").split(","))
    hosts = _number(environment, count, "1") if count else several
    host = _number(environment, index, "0" if hosts == 1 else "")
    if hosts > 1 and address not in environment:
        raise UsageError(f"{address} is missing: the first host's address, as {index} and {count}")
    if not 0 <= host < hosts:
        raise UsageError(f"{index} = {host} of {count or address} = {hosts}: counted from 0")
    return Cluster(host, hosts, without_port(first))


def _number(environment: Mapping[str, str], name: str, default: str) -> int:
    text = environment.get(name, default)
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise UsageError(f"{name} = {text!r} is not a number; see torus launch --help")
    return int(text)


def _first_node(nodes: str) -> str:
    """Returns the first of a list as SLURM writes it: node[003-007,9],gpu1 begins with node003."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UsageError(f"SLURM_STEP_NODELIST = {nodes!r} names no node")
    return "".join(part or "" for part in match.groups())
