"""Megatron: what megatron-core's dist_checkpointing (torch_dist) and Megatron-LM (torch) wrote.

torch_dist is torch's DCP inside: whole tensors with all layers in one, and a file `common.pt`. The
older layout has a file per tensor and pipeline rank, whose parts are put together here. Both give
the same names, `decoder.layers.N.…`, which one table maps for every model. Arguments of the run say
what the model is; one that asks for what our model does not compute is refused by name.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from checkpoint.convert.families import Family
from checkpoint.convert.fields import Constant, Theirs
from checkpoint.convert.folders import find_tag, inside, resolved
from checkpoint.convert.pieces import Pieces, PieceTensors, check_grid, count_of, sound, whole
from checkpoint.convert.sources import MOMENTS, PARAMS, Source, adam_settings
from checkpoint.convert.torch_dcp import read_index
from checkpoint.convert.torchfiles import Strided, read_torch
from checkpoint.convert.trees import LAYERS
from models.config import ModelConfig, RopeConfig
from sharding.errors import MismatchError, UnsafeInputError, UsageError, nearest, shown

NAME = "megatron"
POINTER = "latest_checkpointed_iteration.txt"
COMMON = "common.pt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")
_FILE = "model_optim_rng.pt"
# Beside tensors: arguments, states of random numbers and of the rerun machinery.
CLASSES = frozenset([
    "argparse.Namespace", "types.SimpleNamespace", "signal.Signals", "pathlib.PosixPath",
    "_codecs.encode", "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    *("megatron.core." + name for name in (
        "enums.ModelType", "enums.Fp8Recipe", "enums.Fp4Recipe", "transformer.enums.AttnBackend",
        "transformer.enums.CudaGraphScope", "rerun_state_machine.RerunDiagnostic",
        "rerun_state_machine.RerunMode", "rerun_state_machine.RerunState")),
])  # fmt: skip
_STATE = re.compile(r"optimizer\.state\.(exp_avg|exp_avg_sq|fp32_param|param)\.(.+)")
_OTHER = re.compile(r"optimizer\.|chained_\d+\.")
_MASTERS = "masters"
_PARTS = {**MOMENTS, "fp32_param": _MASTERS, "param": _MASTERS}
# Transformer Engine keeps a norm with the matrix that follows it.
_NORMS = (("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
          ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."))  # fmt: skip
_COLUMNS = re.compile(r"(?:word_embeddings|output_layer|linear_qkv|linear_fc1)\.(?:weight|bias)$")
_ROWS = re.compile(r"(?:linear_proj|linear_fc2)\.weight$")
_GATED = re.compile(r"linear_fc1\.(?:weight|bias)$")

Tensors = dict[str, Pieces]


def read_megatron(folder: Path) -> Source:
    """Returns weights, moments, step and arguments of a run, or of one of its iterations.

    Where there are float32 masters of 16-bit weights, they are the weights. `described` has the
    arguments by name, None where the checkpoint has none.

    Raises:
      UnsafeInputError: damaged or hostile files. MismatchError: a rank is missing, ranks disagree,
        or the run has experts or virtual pipeline stages.
    """
    tag = find_tag(folder, POINTER, re.compile(rf"\.metadata|{_RANK.pattern}"), _folder_name)
    with sound(f"{tag} is not a checkpoint of Megatron"):
        read = _read_dist if (tag / ".metadata").exists() else _read_legacy
        parts, common, left = read(tag)
        parts[PARAMS].update(parts.pop(_MASTERS, {}))
        args = common.get("args")
        return Source(
            {part: PieceTensors(found) for part, found in parts.items() if found},
            *_progress(common.get("optimizer")), sorted(left),
            described=None if args is None else dict(args.state),
        )  # fmt: skip


def _folder_name(text: str) -> str:
    return f"iter_{int(text):07d}" if text.isdecimal() else text


def _progress(optimizer: Any) -> tuple[int | None, dict[str, Any]]:
    """Returns the number of updates and Adam's settings, as far as they are told."""
    if not isinstance(optimizer, dict):
        return None, {}
    inner = optimizer.get("optimizer", optimizer)
    groups, state = inner.get("param_groups") or [{}], inner.get("state") or {}
    steps = [s.get("step") for s in state.values() if isinstance(s, dict)]
    steps += [state.get("common_step"), *(group.get("step") for group in groups)]
    found = {count_of(step) for step in steps if step is not None}
    if len(found) > 1:
        raise MismatchError(f"the optimizer is at steps {sorted(found)[:4]}")
    return found.pop() if found else None, adam_settings(groups[0])


def _plain_name(name: str) -> str:
    for theirs, ours in _NORMS:
        name = name.replace(theirs, ours)
    return name


# ---------------------------------------------------------------- torch_dist


def _read_dist(tag: Path) -> tuple[dict[str, Tensors], dict, list[str]]:
    """Returns the tensors of every part, what `common.pt` holds, and the names of other values."""
    common = read_torch(inside(tag, COMMON), CLASSES)
    tensors, values = read_index(tag)
    parts: dict[str, Tensors] = {PARAMS: {}}
    left = [name for name in values if "_extra_state" not in name]
    for name, tensor in tensors.items():
        state = _STATE.fullmatch(name)
        if not state and _OTHER.match(name):
            left.append(name)
            continue
        part, name = (_PARTS[state[1]], state[2]) if state else (PARAMS, name)
        parts.setdefault(part, {}).update(_layers(_plain_name(name), tensor))
    return parts, common, left


def _layers(name: str, tensor: Pieces) -> Tensors:
    """Returns the layers of a stack, each under its own name, or the tensor itself."""
    before, stack, after = name.rpartition("decoder.layers.")
    if not stack or after[:1].isdigit():
        return {name: tensor}
    if not 0 < tensor.shape[0] <= LAYERS:
        raise MismatchError(f"`{name}` {list(tensor.shape)} is not a stack of layers")
    return {f"{before}{stack}{i}.{after}": tensor.at(0, i) for i in range(tensor.shape[0])}


# ---------------------------------------------------------------- a file per rank


def _read_legacy(tag: Path) -> tuple[dict[str, Tensors], dict, list[str]]:
    """Returns as `_read_dist`, put together from the files of all ranks."""
    places = {(int(m[1]), int(m[2] or 0)): path
              for path in sorted(tag.iterdir()) if (m := _RANK.fullmatch(path.name))}  # fmt: skip
    tensor, pipeline = (1 + max(rank[axis] for rank in places) for axis in (0, 1))
    if len(places) != tensor * pipeline:
        raise MismatchError(f"{tag} has {len(places)} files of {tensor} × {pipeline} ranks")
    for place in places.values():
        if not resolved(place).is_relative_to(resolved(tag)):
            raise UnsafeInputError(f"{place} is a link out of its folder")
    states = {r: read_torch(inside(place, _FILE), CLASSES) for r, place in places.items()}
    common = states[0, 0]
    _check_files(tag, list(states.values()), tensor, pipeline)
    gated = bool(common["args"].state.get("swiglu"))
    parts: dict[str, Tensors] = {}
    first = 0
    for stage in range(pipeline):
        found = [_parts(states[rank, stage]) for rank in range(tensor)]
        for part, tensors in found[0].items():
            if any(one[part].keys() != tensors.keys() for one in found):
                raise MismatchError(f"{tag}: ranks of stage {stage} hold other tensors")
            for name in tensors:
                merged = _merge(name, [one[part][name] for one in found], gated=gated)
                parts.setdefault(part, {})[_plain_name(_LAYER.sub(
                    lambda m, first=first: str(first + int(m[0])), name))] = merged  # fmt: skip
        first += 1 + max((int(m[0]) for m in map(_LAYER.search, found[0][PARAMS]) if m), default=-1)
    rest = {"opt_param_scheduler", "rng_state", *(() if len(parts) > 1 else ("optimizer",))}
    return parts, common, [name for name in common if name in rest]


def _check_files(tag: Path, states: list[dict], tensor: int, pipeline: int) -> None:
    """Refuses what the files of ranks do not tell by their tensors."""
    for state in states:
        version, args = state.get("checkpoint_version", 0), state["args"].state
        if version != 3.0:
            raise MismatchError(f"{tag}: checkpoint_version {version} is not read, only 3.0; "
                                "before, queries, keys and values lay otherwise")  # fmt: skip
        if "model" not in state:
            raise MismatchError(f"{tag}: virtual pipeline stages (`model0`, …) are not read")
        for name, found in (("tensor", tensor), ("pipeline", pipeline)):
            if args.get(f"{name}_model_parallel_size", found) != found:
                raise MismatchError(f"{tag}: there are files of {found} {name} parallel ranks, "
                                    "not of all")  # fmt: skip
    steps = {(s.get("iteration"), _progress(s.get("optimizer"))[0]) for s in states}
    if len(steps) > 1:
        raise MismatchError(f"{tag}: its ranks are at several steps")


def _parts(state: dict) -> dict[str, dict[str, Strided]]:
    """Returns weights, moments and masters of one rank by name.

    The optimizer numbers its parameters: first those that decay, the tensors of two axes, then the
    others, both in the order of the model. Shapes are compared.
    """
    weights = {n: t for n, t in state["model"].items() if isinstance(t, Strided)
               and "_extra_state" not in n}  # fmt: skip
    found: dict[str, dict[str, Strided]] = {PARAMS: weights}
    optimizer = state.get("optimizer") or {}
    inner = optimizer.get("optimizer", optimizer)
    if not inner.get("state"):
        return found  # none, or Megatron's distributed optimizer with a file of its own
    names = sorted(weights, key=lambda name: len(weights[name].shape) < 2)
    decaying = sum(len(tensor.shape) > 1 for tensor in weights.values())
    if [len(g["params"]) for g in inner["param_groups"]] != [decaying, len(names) - decaying]:
        raise MismatchError("the optimizer's groups are not those with and without weight decay")
    for key, part in MOMENTS.items():
        found[part] = {name: inner["state"][index][key] for index, name in enumerate(names)}
    if masters := [t for group in optimizer.get("fp32_from_fp16_params", ()) for t in group]:
        found[_MASTERS] = dict(zip(names, masters, strict=True))
    for part, tensors in found.items():
        for name, tensor in tensors.items():
            if tensor.shape != weights[name].shape:
                raise MismatchError(f"`{part}/{name}` has shape {list(tensor.shape)}, its weight "
                                    f"{list(weights[name].shape)}")  # fmt: skip
    return found


def _merge(name: str, ranks: list[Strided], *, gated: bool) -> Pieces:
    """Returns the tensor whose parts tensor parallel ranks hold."""
    pieces: list[tuple[tuple[int, ...], Strided]] = []
    shape = ranks[0].shape
    if len(ranks) == 1:
        return whole(ranks[0])
    if _COLUMNS.search(name):
        halves = 2 if gated and _GATED.search(name) else 1  # gate and up of every rank
        rows, rest = shape[0] // halves, (0,) * (len(shape) - 1)
        for half in range(halves):
            for index, part in enumerate(ranks):
                at = (half * len(ranks) + index) * rows
                pieces.append(((at, *rest), part.part(half * rows, (half + 1) * rows)))
        shape = (shape[0] * len(ranks), *shape[1:])
    elif _ROWS.search(name):
        pieces = [((0, index * shape[1]), part) for index, part in enumerate(ranks)]
        shape = (shape[0], shape[1] * len(ranks))
    else:
        first = ranks[0].read().tobytes()
        if any(part.shape != shape or part.read().tobytes() != first for part in ranks[1:]):
            raise MismatchError(f"`{name}` differs between tensor parallel ranks")
        return whole(ranks[0])
    if len({part.dtype for part in ranks}) > 1:
        raise MismatchError(f"`{name}` has several dtypes")
    merged = Pieces(ranks[0].dtype, shape, tuple(pieces))
    check_grid(merged, f"`{name}`")
    return merged


# ---------------------------------------------------------------- the model

TABLE = """
embedding: V D            = embedding.word_embeddings.weight: V D
positions: P D            = embedding.position_embeddings.weight: P D
head: V D                 = output_layer.weight: V D
final_norm/scale: D       = decoder.final_layernorm.weight: D
final_norm/bias: D        = decoder.final_layernorm.bias: D
layers/attention_norm/scale: L D = decoder.layers.{L}.input_layernorm.weight: D
layers/attention_norm/bias: L D  = decoder.layers.{L}.input_layernorm.bias: D
layers/mlp_norm/scale: L D       = decoder.layers.{L}.pre_mlp_layernorm.weight: D
layers/mlp_norm/bias: L D        = decoder.layers.{L}.pre_mlp_layernorm.bias: D
layers/attention/wq: L D (K G) H & layers/attention/wk: L D K H & layers/attention/wv: L D K H \
    = decoder.layers.{L}.self_attention.linear_qkv.weight: (K [(G H) | H | H]) D
layers/attention/bq: L (K G) H & layers/attention/bk: L K H & layers/attention/bv: L K H \
    = decoder.layers.{L}.self_attention.linear_qkv.bias: (K [(G H) | H | H])
layers/attention/wo: L N H D     = decoder.layers.{L}.self_attention.linear_proj.weight: D (N H)
layers/attention/bo: L D         = decoder.layers.{L}.self_attention.linear_proj.bias: D
layers/attention/q_norm/scale: L H = decoder.layers.{L}.self_attention.q_layernorm.weight: H
layers/attention/k_norm/scale: L H = decoder.layers.{L}.self_attention.k_layernorm.weight: H
layers/mlp/down: L F D           = decoder.layers.{L}.mlp.linear_fc2.weight: D F
layers/mlp/down_bias: L D        = decoder.layers.{L}.mlp.linear_fc2.bias: D
"""
GATED = """
layers/mlp/gate: L D F & layers/mlp/up: L D F = decoder.layers.{L}.mlp.linear_fc1.weight: [F | F] D
"""
PLAIN = """
layers/mlp/up: L D F      = decoder.layers.{L}.mlp.linear_fc1.weight: F D
layers/mlp/up_bias: L F   = decoder.layers.{L}.mlp.linear_fc1.bias: F
"""
POSITIONS = {"rope": "rope", "learned_absolute": "learned"}
# Arguments that have to be as here, or absent: any other value is another computation.
ONLY = {
    "activation_func_clamp_value": None, "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False, "attention_output_gate": False,
    "experimental_attention_variant": None, "glu_linear_offset": 0.0,
    "heterogeneous_layers_config_encoded_json": None, "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None, "hybrid_override_pattern": None, "is_hybrid_model": False,
    "linear_attention_freq": None, "mrope_section": None, "mtp_num_layers": None,
    "multi_latent_attention": False, "no_rope_freq": None, "num_experts": None,
    "qk_l2_norm": False, "quick_geglu": False, "retro_add_retriever": False,
    "rotary_interleaved": False, "rotary_seq_len_interpolation_factor": None,
    "softmax_scale": None, "softmax_type": "vanilla", "spec": None, "squared_relu": False,
    "use_legacy_models": False, "window_size": None,
}  # fmt: skip


def adapted(model: ModelConfig, found: Source) -> tuple[Family, ModelConfig]:
    """Returns the table for a model, and the model with the vocabulary that is stored.

    Megatron fills its vocabulary up and sums over all of it in its loss, so all of it is kept.
    """
    table = TABLE + (GATED if model.activation in ("swiglu", "geglu") else PLAIN)
    rows = [s[0] for n, (_, s) in found.facts.items() if n.endswith("word_embeddings.weight")]
    model = dataclasses.replace(model, vocab=rows[0] if rows else model.vocab)
    return Family(NAME, "GPTModel", "", table, ()), model


def read_args(args: dict[str, Any]) -> ModelConfig:
    """Returns the model that arguments of Megatron-LM describe.

    Raises:
      MismatchError: an argument that is missing, or asks for what our model does not compute.
    """
    theirs = Theirs(args)
    theirs.where = "args of the checkpoint: "
    take = theirs.take

    def flag(name: str) -> bool:
        return take(name, bool, False)

    for name, value in ONLY.items():
        Constant(name, value).read(theirs, {})
    width, heads = take("hidden_size", int), take("num_attention_heads", int)
    gated, biases = flag("swiglu"), take("add_bias_linear", bool, True)
    norm = _choice(theirs, "normalization", {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"})
    for name, refused in (("swiglu", biases), ("qk_layernorm", norm == "layernorm")):
        if refused and flag(name):
            raise MismatchError(f"{theirs.where}{name} = True with biases is not supported")
    # Megatron's fused GELU, and the one named after OpenAI, are the tanh form.
    tanh = not gated and (flag("openai_gelu") or take("bias_gelu_fusion", bool))
    grouped, scaled = flag("group_query_attention"), flag("use_rope_scaling")
    rope = RopeConfig(
        theta=take("rotary_base", float, 10_000.0), fraction=take("rotary_percent", float, 1.0),
        scaling="llama3" if scaled else "none",
        factor=take("rope_scaling_factor", float, 8.0) if scaled else 1.0,
    )  # fmt: skip
    model = ModelConfig(
        vocab=take("padded_vocab_size", int), layers=take("num_layers", int), width=width,
        heads=heads, kv_heads=take("num_query_groups", int) if grouped else heads,
        head_dim=take("kv_channels", int, max(1, width // heads)),
        mlp=take("ffn_hidden_size", int, 4 * width), rope=rope,
        max_length=take("max_position_embeddings", int), norm=norm,
        norm_eps=take("norm_epsilon", float, 1e-5), qkv_bias=biases or flag("add_qkv_bias"),
        position=_choice(theirs, "position_embedding_type", POSITIONS), out_bias=biases,
        qk_norm="head" if flag("qk_layernorm") else "none",
        activation="swiglu" if gated else "gelu" if tanh else "gelu_exact",
        tie_embeddings=not flag("untie_embeddings_and_output_weights"),
    )  # fmt: skip
    try:
        model.validate()
    except UsageError as error:
        raise MismatchError(f"{theirs.where}{error}") from error
    return model


def _choice(theirs: Theirs, name: str, known: dict[str, str]) -> str:
    found = theirs.take(name, str)
    if found not in known:
        raise MismatchError(f"{theirs.where}{name} = {shown(found)} is not supported; known: "
                            f"{', '.join(known)}{nearest(found, known)}")  # fmt: skip
    return known[found]
