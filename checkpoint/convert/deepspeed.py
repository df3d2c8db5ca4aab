"""DeepSpeed: runs of ZeRO 1, 2 and 3, read; universal checkpoints, read and written.

A run keeps float32 masters and Adam's moments in flat buffers, one per parameter group and rank.
ZeRO 1 and 2 cut the buffer of a group into one stretch per rank, wherever that falls; ZeRO 3 cuts
every parameter by itself, filled up to a multiple of the ranks. A universal checkpoint has a folder
per parameter. The weights taken are always the masters; DeepSpeed is imported by nothing here.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.convert.folders import find_tag, inside, resolved
from checkpoint.convert.pieces import (
    Pieces,
    PieceTensors,
    WrittenTensors,
    count_of,
    flat_pieces,
    sizes_of,
    sound,
    whole,
)
from checkpoint.convert.sources import MOMENTS, PARAMS, Source, adam_settings
from checkpoint.convert.torchfiles import Strided, read_torch, write_torch
from sharding.errors import MismatchError, UnsafeInputError, shown

_CLASSES = frozenset({
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
})  # fmt: skip
_OPTIMIZER = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_KEYS = {"fp32": PARAMS, **MOMENTS}
GROUPS = 64  # DeepSpeed leaves parameter groups beyond those in the file unread, without a word


# ---------------------------------------------------------------- runs


def read_zero(folder: Path) -> Source:
    """Returns the masters, moments and step of a run, or of one of its steps.

    Raises:
      UnsafeInputError: damaged or hostile files. MismatchError: a rank is missing, ranks disagree,
        or the run is tensor parallel, has experts or frozen parameters.
    """
    tag = find_tag(folder, "latest", _OPTIMIZER)
    names = sorted(path.name for path in tag.iterdir())
    model = next((name for name in names if _MODEL.fullmatch(name)), None)
    ranks = {int(m[1]): m[0] for m in map(_OPTIMIZER.fullmatch, names) if m}
    if model is None or any(m and int(m[2]) for m in map(_OPTIMIZER.fullmatch, names)):
        raise MismatchError(f"{tag} has no model states, or those of several model parallel ranks")
    facts = read_torch(inside(tag, model), _CLASSES)
    states = [read_torch(inside(tag, ranks[rank]), _CLASSES) for rank in sorted(ranks)]
    with sound(f"{tag} is not a run of ZeRO"):
        world, shapes = facts["dp_world_size"], _shapes(facts)
        if sorted(ranks) != list(range(world)):
            raise MismatchError(f"{tag} has the states of ranks {sorted(ranks)}, not of {world}")
        for field in ("frozen_param_shapes", "frozen_param_fragments", "num_experts"):
            if facts.get(field):
                raise MismatchError(f"{tag}: {field} is not read, and the run has some")
        if facts.get("mp_world_size", 1) != 1:
            found = shown(facts["mp_world_size"])
            raise MismatchError(f"{tag}: {found} model parallel ranks, not 1")
        return _assemble(tag, shapes, [s["optimizer_state_dict"] for s in states])


def _shapes(facts: dict) -> list[dict[str, tuple[int, ...]]]:
    return [{n: sizes_of(s) for n, s in group.items()} for group in facts["param_shapes"]]


def _assemble(tag: Path, shapes: list[dict], states: list[dict]) -> Source:
    stage = states[0]["zero_stage"].args[0]
    if stage == 3:
        inner, masters = "optimizer_state_dict", "fp32_flat_groups"
    else:
        inner, masters = "base_optimizer_state", "single_partition_of_fp32_groups"
    adam = [state[inner]["state"] for state in states]
    steps = {
        # Early versions of FusedAdam count in the parameter group alone.
        count_of(entry.get("step", state[inner]["param_groups"][0].get("step")))
        for rank, state in zip(adam, states, strict=True)
        for entry in rank.values()
    }
    if len(steps) != 1:
        raise MismatchError(f"{tag}: its ranks are at steps {sorted(steps)[:4]}")
    cut = _cut_parameters if stage == 3 else _cut_groups
    parts: dict[str, dict[str, Pieces]] = {part: {} for part in _KEYS.values()}
    for index, group in enumerate(shapes):
        flat = {PARAMS: [state[masters][index] for state in states]}
        flat |= {part: [rank[index][key] for rank in adam] for key, part in MOMENTS.items()}
        for part, buffers in flat.items():
            if not all(isinstance(b, Strided) and b.stride == (1,) for b in buffers):
                raise UnsafeInputError(f"{tag}: group {index} of {part} is not flat")
            for name, tensor in cut(buffers, group, f"{tag}: group {index} of {part}"):
                if name in parts[part]:
                    raise UnsafeInputError(f"{tag}: `{name}` is in two groups")
                parts[part][name] = tensor
    settings = states[0][inner]["param_groups"][0]
    return Source(
        {part: PieceTensors(found) for part, found in parts.items()}, steps.pop(),
        adam_settings(settings),
    )  # fmt: skip


def _cut_groups(buffers: list[Strided], group: dict, where: str) -> Iterator[tuple[str, Pieces]]:
    """Yields the parameters of a group whose buffer is cut into one stretch per rank."""
    rank, at = 0, 0
    for name, shape in group.items():
        pieces, missing = [], math.prod(shape)
        while missing:
            while rank < len(buffers) and at == buffers[rank].shape[0]:
                rank, at = rank + 1, 0
            if rank == len(buffers):
                raise UnsafeInputError(f"{where} ends inside `{name}`")
            count = min(missing, buffers[rank].shape[0] - at)
            pieces.append(buffers[rank].part(at, at + count))
            at, missing = at + count, missing - count
        yield name, flat_pieces(pieces, shape, f"{where}: `{name}`")
    padding = sum(b.shape[0] for b in buffers[rank:]) - at
    if padding >= 2 * len(buffers):
        raise UnsafeInputError(f"{where} has {padding} elements more than its parameters")


def _cut_parameters(
    buffers: list[Strided], group: dict, where: str
) -> Iterator[tuple[str, Pieces]]:
    """Yields the parameters of a group that each rank has an equal part of."""
    at = 0
    for name, shape in group.items():
        count = -(-math.prod(shape) // len(buffers))
        if any(at + count > buffer.shape[0] for buffer in buffers):
            raise UnsafeInputError(f"{where} ends inside `{name}`")
        pieces = [buffer.part(at, at + count) for buffer in buffers]
        yield name, flat_pieces(pieces, shape, f"{where}: `{name}`")
        at += count
    if any(buffer.shape[0] - at >= 2 * len(buffers) for buffer in buffers):
        raise UnsafeInputError(f"{where} has more elements than its parameters")


# ---------------------------------------------------------------- universal checkpoints


def read_ucp(folder: Path) -> Source:
    """Returns what a universal checkpoint, or the newest in a folder, holds.

    Raises:
      UnsafeInputError: damaged or hostile files. MismatchError: a file is missing, or a tensor's
        shape is told nowhere.
    """
    tag = find_tag(folder, "latest_universal", re.compile("zero"))
    model = next((p.name for p in sorted(tag.iterdir()) if _MODEL.fullmatch(p.name)), None)
    zero = tag / "zero"
    if model is None or not zero.is_dir():
        raise MismatchError(f"{tag} has no model states, or no folder `zero`")
    facts = read_torch(inside(tag, model), _CLASSES)
    places = sorted(place for place in zero.iterdir() if place.is_dir())
    for place in (zero, *places):
        if not resolved(place).is_relative_to(resolved(tag)):
            raise UnsafeInputError(f"{place} is a link out of its folder")
    state = read_torch(inside(zero, "optimizer_state.pt"), _CLASSES)
    parts: dict[str, dict[str, Pieces]] = {part: {} for part in _KEYS.values()}
    steps = set()
    with sound(f"{tag} is not a universal checkpoint"):
        shapes = {n: s for group in _shapes(facts) for n, s in group.items()}
        for place in places:
            for key, part in _KEYS.items():
                found = read_torch(inside(place, f"{key}.pt"))
                tensor = found["param"] if isinstance(found, dict) else found
                parts[part][place.name] = whole(tensor, shapes.get(place.name, tensor.shape))
            if (place / "step.pt").exists():
                step = read_torch(inside(place, "step.pt"))
                steps.add(count_of(step))
        inner = state.get("optimizer_state_dict", {}).get("state", {})
        steps |= {count_of(group["step"]) for group in inner.values() if "step" in group}
        settings = adam_settings((state.get("param_groups") or [{}])[0])
    if len(steps) != 1:
        raise MismatchError(f"{tag}: its parameters are at steps {sorted(steps)[:4]}")
    return Source(
        {part: PieceTensors(found) for part, found in parts.items()}, steps.pop(), settings
    )  # fmt: skip


class UcpWriter:
    """A universal checkpoint being written: `parts` take tensors, `finish` writes the rest."""

    def __init__(self, folder: Path, step: int) -> None:
        """step: the number of updates taken, which names the folder of the step."""
        self._folder, self._step = folder, step
        self._tag = folder / f"global_step{step}_universal"
        self._zero = self._tag / "zero"
        self._zero.mkdir(parents=True)
        self.parts = {
            part: WrittenTensors(lambda name, array, key=key: self._put(name, key, array))
            for key, part in _KEYS.items()
        }

    def _put(self, name: str, key: str, array: np.ndarray) -> Strided:
        path = self._zero / name / f"{key}.pt"
        path.parent.mkdir(exist_ok=True)
        self._save(path, {"param": array, "cat_dim": 0})
        return read_torch(path)["param"]

    def finish(self) -> None:
        """Writes the steps, what DeepSpeed asks of a checkpoint, and the name of the newest."""
        count = np.array(self._step, np.float32)
        facts = self.parts[PARAMS].facts
        for name in facts:
            self._save(self._zero / name / "step.pt", count)
        # No settings: those of the DeepSpeed config that loads this stay in force.
        groups: list[dict] = [{} for _ in range(GROUPS)]
        inner = {"state": {0: {"step": count}}, "param_groups": groups[:1]}
        state = {"ds_version": "0.19.8", "param_groups": groups, "optimizer_state_dict": inner}
        self._save(self._zero / "optimizer_state.pt", state)
        model: dict[str, Any] = {
            "module": {}, "buffer_names": [], "optimizer": None, "shared_params": {},
            "param_shapes": [{name: shape for name, (_, shape) in facts.items()}],
            "frozen_param_shapes": None, "frozen_param_fragments": None, "lr_scheduler": None,
            "skipped_steps": 0, "global_steps": self._step, "dp_world_size": 1, "mp_world_size": 1,
            "ds_version": "0.19.8",
            "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        }  # fmt: skip
        # The first name is looked for at stages 1 and 2, the second at stage 3.
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            self._save(self._tag / name, model)
        (self._folder / "latest_universal").write_text(self._tag.name)

    @staticmethod
    def _save(path: Path, value: Any) -> None:
        with path.open("wb") as file:
            write_torch(file, value)
