"""The parts of a training state that are converted: weights, and Adam's moments by the same rows.

A moment has an entry for every entry of its weight, so where the weight goes it goes, whatever the
format; only what a row adds to a weight is not added. Ours keeps them as `optimizer/mu` and
`optimizer/nu` with `optimizer/count`, the number of updates that Adam's bias correction needs.
"""

from dataclasses import dataclass
from typing import Any

from checkpoint.convert.engine import Plan, Renamed, of_moments, plan_to_ours, plan_to_theirs
from checkpoint.convert.families import Family
from checkpoint.convert.native import PARAMS as OUR_PARAMS
from checkpoint.convert.native import NativeTensors
from checkpoint.convert.sources import MU, NU, PARAMS, Source
from checkpoint.convert.trees import apart
from checkpoint.fingerprint import rows_sums
from models.config import ModelConfig
from sharding.errors import MismatchError

PREFIXES = {PARAMS: OUR_PARAMS, MU: "optimizer/mu/", NU: "optimizer/nu/"}
COUNT = "optimizer/count"


@dataclass(frozen=True)
class Move:
    """One part of a state: its plan, and where it is read."""

    part: str
    plan: Plan
    tensors: Any


def to_ours(
    found: Source, family: Family, model: ModelConfig, dtype: str | None, *, optimizer: bool
) -> tuple[list[Move], list[str]]:
    """Returns the moves from what a place holds, and the names of tensors that stay behind.

    dtype: of the weights; moments keep theirs.

    Raises:
      MismatchError: the tensors are not the model's, or there are no moments to carry.
    """
    if optimizer and not (found.step is not None and {MU, NU} <= set(found.parts)):
        raise MismatchError("--with-optimizer: the source holds no moments and step of Adam")
    if optimizer and not 0 <= found.step < 2**31:
        raise MismatchError(f"--with-optimizer: the source is at step {found.step}")
    moves, left = [], list(found.left)
    for part, tensors in found.parts.items():
        if part != PARAMS and not optimizer:
            left += [f"{part}/{name}" for name in tensors.facts]
            continue
        tensors = apart(tensors, family)
        names, others = unwrap(tensors, family)
        left += [name if part == PARAMS else f"{part}/{name}" for name in others]
        facts = {name: tensors.facts[origin] for name, origin in names.items()}
        plan = plan_to_ours(family, model, facts, dtype if part == PARAMS else None)
        plan = plan if part == PARAMS else of_moments(plan)
        moves.append(Move(part, plan, Renamed(tensors, names)))
    return moves, left


def native_source(folder: Any, step: int, *, optimizer: bool) -> Source:
    """Returns the parameters of a step of ours, and Adam's moments and count where asked for.

    Raises:
      MismatchError: there are none. CheckpointError: the step is damaged.
    """
    parts = [PARAMS, MU, NU] if optimizer else [PARAMS]
    tensors = {part: NativeTensors(folder, step, PREFIXES[part]) for part in parts}
    if not optimizer:
        return Source(tensors)
    counts = NativeTensors(folder, step, "")
    if not all(t.facts for t in tensors.values()) or COUNT not in counts.facts:
        raise MismatchError(f"step {step} in {folder} holds no moments and count of Adam")
    count = counts.read(COUNT, (), 0, 1)
    counts.compare({COUNT: rows_sums(count, (), 0, ())})
    return Source(tensors, int(count))


def to_theirs(found: Source, family: Family, model: ModelConfig, dtype: str | None) -> list[Move]:
    """Returns the moves from a step of ours; moments become float32.

    Raises:
      MismatchError: the step does not hold the model's arrays.
    """
    moves = []
    for part, tensors in found.parts.items():
        kind = dtype if part == PARAMS else "float32"
        plan = plan_to_theirs(family, model, tensors.facts, kind)
        moves.append(Move(part, plan if part == PARAMS else of_moments(plan), tensors))
    return moves


def unwrap(tensors: Any, family: Family) -> tuple[dict[str, str], list[str]]:
    """Returns name in the model → name in `tensors`, and the names that are not the model's.

    What wrappers put before every name (`module.`, `model.`, `state_dict.`) is found by looking for
    the family's first tensor.

    Raises:
      MismatchError: it is not there, or below two wrappers.
    """
    anchor = next(r.theirs.name for r in family.rows if not r.theirs.placeholders)
    for wanted in (anchor, family.bare(anchor)):
        found = [n for n in tensors.facts if n == wanted or n.endswith(f".{wanted}")]
        if len(found) > 1:
            raise MismatchError(f"there is more than one model: `{found[0]}` and `{found[1]}`")
        if found:
            prefix = found[0].removesuffix(wanted)
            names = {n.removeprefix(prefix): n for n in tensors.facts if n.startswith(prefix)}
            return names, sorted(set(tensors.facts) - set(names.values()))
    some = ", ".join(f"`{name}`" for name in list(tensors.facts)[:3])
    raise MismatchError(f"there is no `{anchor}` of {family.model_type}; there is {some or 'none'}")
