"""What a config needs and how fast it goes on a TPU slice that is not there, by the compiler.

`make_plan` builds the mesh on the slice's described devices, compiles the very step that
`trainer/loop.py` runs, ahead of time, with libtpu on CPU, and reads the program. The evaluation of
a run is compiled too, for its memory. Memory is the
compiler's own; times are estimates made from its schedule. A program that does not fit is refused
within seconds, with the bytes it needs. Run as a module it reads {"experiment", "slice", "save",
"page"} as JSON and writes the plan, or {"refused"}: `torus plan` does so, to have an environment of
its own and to survive a compiler that crashes.
"""

import gzip
import importlib.metadata
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoint.steps import write_whole
from models import spec
from models.decoder import param_specs
from models.spec import Tree
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from sharding.rules import BATCH, SEQ
from sharding.topology import FAMILIES, Slice, parse_slice, slice_devices
from trainer.config import Experiment, check_sizes, from_dict, validate
from trainer.plan.forecast import Forecast, forecast, setting_of
from trainer.state import TrainState, abstract_state, make_layout
from trainer.step import jit_train_step, make_eval_step

# The two ways in which libtpu refuses: early, by a lower bound, and late, after its allocation.
_REFUSALS = (
    r"required for HLO temporaries \((?P<need>[\d.]+[KMGT]?)\) exceeds available HBM "
    r"\((?P<have>[\d.]+[KMGT]?)\)",
    r"Used (?P<need>[\d.]+[KMGT]?) of (?P<have>[\d.]+[KMGT]?) hbm",
)


@dataclass(frozen=True)
class Plan:
    """One config on one slice. Memory is in bytes per device; a part that is not known is None."""

    config: str
    slice: str
    chips: int
    devices: int
    mesh: dict[str, int]
    remat: str  # what is kept for the backward pass, "auto" resolved
    barriers: bool  # config.model.barriers, as chosen
    options: dict[str, str]  # of the compiler
    parameters: int  # of the model, without padding
    tokens_per_step: int
    parameter_bytes: int
    optimizer_bytes: int
    capacity: int  # what the compiler lets a program use
    needed: int  # the peak of a program that fits, the compiler's demand of one that does not
    argument_bytes: int | None  # parameters, optimizer state and batch, as laid out
    temporary_bytes: int | None  # at the peak: activations, gradients, gathered weights, logits
    host_bytes: int | None  # offloaded to the host's memory
    evaluation_bytes: int | None  # the peak of an evaluation in the run, beside the whole state
    trace_seconds: float
    compile_seconds: float
    versions: dict[str, str]
    forecast: Forecast | None  # of a program that was compiled

    @property
    def fits(self) -> bool:
        return max(self.needed, self.evaluation_bytes or 0) <= self.capacity

    def to_json(self) -> dict:
        """Returns the plan as a JSON object, "fits" and "compiled" included."""
        return {**asdict(self), "fits": self.fits, "compiled": self.forecast is not None}


def make_plan(experiment: Experiment, target: Slice, save: str = "", page: str = "") -> Plan:
    """Compiles the train step of `experiment` for `target`; takes minutes when it fits.

    save: a file for the program's text, gzipped; "" keeps none.
    page: a file for what trainer/plan/explain.py draws of the program; "" draws nothing.

    Call it in a process that was started with `sharding.topology.compiler_environment()`.

    Raises:
      UsageError: a config that does not suit the slice, an unknown slice, no libtpu.
      jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
    """
    validate(experiment)
    mesh = make_mesh(experiment.mesh, slice_devices(target))
    check_sizes(experiment, dict(mesh.shape))
    layout = make_layout(experiment, mesh)
    state = abstract_state(experiment, layout)
    batch = abstract_batch(experiment, mesh)

    start = time.perf_counter()
    # A concrete mesh would send every eager operation of the trace to devices that are not there.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step, choice = jit_train_step(experiment, layout)
        lowered = step.lower(state, batch)
    traced = time.perf_counter()
    prediction = evaluation = None
    try:
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        needed, capacity = memory.peak_memory_in_bytes, FAMILIES[target.chip].compiler_bytes
        arguments, host = memory.argument_size_in_bytes, memory.host_temp_size_in_bytes
        temporaries = needed - arguments
        text = compiled.as_text()
        evaluation = _evaluation_bytes(experiment, mesh, state, batch)
        prediction = forecast(text, choice.experiment, target, dict(mesh.shape))
        if save:
            with gzip.open(save, "wt") as file:
                file.write(text)
    except jax.errors.JaxRuntimeError as error:
        if (option := missing_option(str(error))) is not None:
            raise UsageError(
                f"libtpu {importlib.metadata.version('libtpu')} has no option {option}: "
                f"leave it out with --config.perf={experiment.perf},-{option}"
            ) from error
        if (refusal := parse_refusal(str(error))) is None:
            raise
        needed, capacity = refusal
        arguments = temporaries = host = None
    plan = Plan(
        config=experiment.name,
        slice=target.name,
        chips=target.chips,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        remat=choice.experiment.model.remat,
        barriers=choice.experiment.model.barriers,
        options=choice.options,
        parameters=spec.count(param_specs(experiment.model)),
        tokens_per_step=experiment.train.batch_size * experiment.data.seq_len,
        parameter_bytes=bytes_per_device(state.params),
        optimizer_bytes=bytes_per_device(state.opt_state),
        capacity=int(capacity),
        needed=int(needed),
        argument_bytes=arguments,
        temporary_bytes=temporaries,
        host_bytes=host,
        evaluation_bytes=evaluation,
        trace_seconds=round(traced - start, 2),
        compile_seconds=round(time.perf_counter() - traced, 2),
        versions={name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        forecast=prediction,
    )
    if page and prediction is not None:
        from trainer.plan.explain import write_page

        setting = setting_of(choice.experiment, target, dict(mesh.shape))
        write_whole(Path(page), write_page(text, plan.to_json(), setting))
    return plan


def _evaluation_bytes(
    experiment: Experiment, mesh: Mesh, state: TrainState, batch: dict[str, jax.ShapeDtypeStruct]
) -> int | None:
    """Returns the most memory while a run evaluates, None for one that never does."""
    if not experiment.eval.every:
        return None
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(make_eval_step(experiment)).lower(state.params, batch)
    try:
        needed = lowered.compile().memory_analysis().peak_memory_in_bytes
    except jax.errors.JaxRuntimeError as error:
        if (refusal := parse_refusal(str(error))) is None:
            raise
        needed = refusal[0]
    return int(needed) + bytes_per_device(state.opt_state)


def abstract_batch(experiment: Experiment, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns one batch as ShapeDtypeStructs, rows and columns sharded as the loader does it."""
    shape = (experiment.train.batch_size, experiment.data.seq_len)
    sharding = NamedSharding(mesh, PartitionSpec(BATCH, SEQ))
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
        for name in experiment.data.fields
    }


def bytes_per_device(tree: Tree) -> int:
    """Returns the bytes that each device holds of a tree of sharded arrays or ShapeDtypeStructs."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def parse_refusal(message: str) -> tuple[float, float] | None:
    """Returns (bytes needed, bytes available) of a refusal for memory, None for another error."""
    for pattern in _REFUSALS:
        if match := re.search(pattern, message):
            return _bytes(match["need"]), _bytes(match["have"])
    return None


def missing_option(message: str) -> str | None:
    """Returns the compile option that a version of libtpu does not know; None: another error."""
    match = re.search(r"No such compile option: '?(\w+)", message)
    return match[1] if match else None


def _bytes(text: str) -> float:
    """Reads the compiler's sizes: "15.75G", "512.0M", "640"."""
    exponent = "KMGT".find(text[-1]) + 1
    return float(text.rstrip("KMGT")) * 2.0 ** (10 * exponent)


def main() -> None:
    """Reads a request from stdin, writes one JSON object to stdout."""
    request = json.load(sys.stdin)
    try:
        experiment = from_dict(request["experiment"])
        target = parse_slice(request["slice"])
        answer = make_plan(experiment, target, request["save"], request["page"]).to_json()
    except UsageError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
