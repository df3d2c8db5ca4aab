"""config.json and ModelConfig, both ways, from one list of fields per family.

A field of theirs is mapped, must have the one value that our model computes, or is known not to
touch the computation; anything else is refused by name, because a field that is skipped is a model
that runs wrongly without a word. Writing is checked by reading back. Old and new `transformers`
are read (`rope_theta` and `rope_scaling`, or `rope_parameters`); the old spelling is written,
which both of them read.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from models.config import COMPUTATION, ModelConfig, RopeConfig
from sharding.errors import MismatchError, UsageError, nearest, shown

# Known not to change the forward pass of any family.
NEUTRAL = frozenset({
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attention_dropout", "attn_pdrop", "auto_map", "begin_suppress_tokens", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop",
    "eos_token_id", "hidden_dropout", "id2label", "initializer_range", "is_llama_config",
    "label2id", "model_type", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "task_specific_params",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
})  # fmt: skip
# Must be absent or as here: every other value is another computation.
INERT = {"is_encoder_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False,
         "is_decoder": False, "quantization_config": None, "use_bidirectional_attention": False,
         "pruned_heads": {}}  # fmt: skip

LARGEST = 2**31  # of any size in a config
FLOAT32_MAX = 3.4028234663852886e38
RANGES = {int: lambda v: 0 < v < LARGEST, float: lambda v: 0 < v <= FLOAT32_MAX}
REQUIRED = object()
Ours = dict[str, Any]  # "rope.theta" → value


class Theirs:
    """A config.json being read; remembers which fields were asked for."""

    def __init__(self, config: dict[str, Any], inside: str = "") -> None:
        self.config, self.used = config, set() if inside else set(NEUTRAL)
        self.where = "config.json: " + (f"{inside}." if inside else "")

    def take(
        self, name: str, kind: type | None, default: Any = REQUIRED, null: Any = REQUIRED
    ) -> Any:
        """Returns a field of the given type, `default` if it is absent, `null` (or that) if null.

        Every number that this module reads has to be positive: with a theta, an epsilon or a factor
        of zero or less, `transformers` computes NaN or does not run.

        Raises:
          MismatchError: it is missing without a default, or has another type or an absurd value.
        """
        self.used.add(name)
        value = self.config.get(name)
        if value is None and not (kind is bool and name in self.config):  # no null flags there
            if name in self.config and null is not REQUIRED:
                default = null
            if default is REQUIRED:
                raise MismatchError(f"{self.where}{name} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if kind is not None and type(value) is not kind:
            raise MismatchError(
                f"{self.where}{name} = {shown(value)} is not of type {kind.__name__}"
            )
        if not RANGES.get(kind, lambda v: True)(value):
            raise MismatchError(
                f"{self.where}{name} = {shown(value)} is out of range: it has to be positive and "
                f"at most {LARGEST - 1 if kind is int else FLOAT32_MAX:.8g}"
            )
        return value

    def finish(self) -> None:
        """Raises MismatchError for a field that nobody asked for."""
        for name, value in INERT.items():
            found = self.config.get(name)
            if name not in self.used and found not in (None, value):
                raise MismatchError(f"{self.where}{name} = {shown(found)} is not supported")
        if unknown := sorted(set(self.config) - self.used - set(INERT)):
            raise MismatchError(
                f"{self.where}{shown(unknown[0])[1:-1]} = {shown(self.config[unknown[0]])} is not "
                f"a field known to this family{nearest(unknown[0][:60], self.used)}; it may change "
                "the computation"
            )


@dataclass(frozen=True)
class Field:
    """One number, string or flag that both sides have.

    `default` stands for an absent field, `null` for one that is null (as `default` when not given);
    either may be a function of ours. Where the default of `transformers` is the size of some
    particular model, the field is required here.
    """

    theirs: str
    ours: str
    kind: type = int
    default: Any = REQUIRED
    null: Any = REQUIRED
    names: dict[str, str] | None = None  # their value → ours

    def read(self, theirs: Theirs, ours: Ours) -> None:
        default, null = (d(ours) if callable(d) else d for d in (self.default, self.null))
        value = theirs.take(self.theirs, self.kind, default, null)
        if self.names is not None:
            if value not in self.names:
                raise MismatchError(
                    f"config.json: {self.theirs} = {shown(value)} is not supported; "
                    f"known: {', '.join(self.names)}{nearest(value[:60], self.names)}"
                )
            value = self.names[value]
        ours[self.ours] = value

    def write(self, ours: Ours) -> dict[str, Any]:
        value = ours[self.ours]
        if self.names is not None:
            value = next((theirs for theirs, o in self.names.items() if o == value), None)
        if not callable(self.null) and value == self.null:
            value = None  # a soft-cap of 0.0 is none here, and a division by zero there
        return {self.theirs: value}


@dataclass(frozen=True)
class Fixed:
    """Values of ours that every model of the family has; a function computes one from the rest."""

    values: dict[str, Any]

    def read(self, theirs: Theirs, ours: Ours) -> None:
        for name, value in self.values.items():
            ours[name] = value(ours) if callable(value) else value

    def write(self, ours: Ours) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Constant:
    """A field of theirs that has to be `value` (or absent), the only one our model computes."""

    theirs: str
    value: Any
    also: tuple = ()

    def read(self, theirs: Theirs, ours: Ours) -> None:
        found = theirs.take(self.theirs, None, self.value)
        if found not in (self.value, *self.also):
            raise MismatchError(
                f"{theirs.where}{self.theirs} = {shown(found)} is not supported, only "
                f"{self.value!r}"
            )

    def write(self, ours: Ours) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Divisible:
    """A width that is a multiple of the query heads, without which `transformers` opens nothing."""

    def read(self, theirs: Theirs, ours: Ours) -> None:
        if ours["width"] % ours["heads"]:
            raise MismatchError(
                f"config.json: the width (hidden_size, n_embd) is {ours['width']}, no multiple of "
                f"{ours['heads']} heads (num_attention_heads, n_head), which transformers asks of "
                "this family"
            )

    def write(self, ours: Ours) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Unsupported:
    """What the family needs and our model does not have yet; every config is refused for it."""

    what: str

    def read(self, theirs: Theirs, ours: Ours) -> None:
        raise MismatchError(f"config.json: {self.what} is not supported by our model yet")

    def write(self, ours: Ours) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class QueryScale:
    """Gemma's `query_pre_attn_scalar`: scores are divided by its square root.

    An integer, the only type that `transformers` accepts; 224.0 is read, as some files have it.
    """

    def read(self, theirs: Theirs, ours: Ours) -> None:
        scalar = theirs.take("query_pre_attn_scalar", float, 256.0)
        if not scalar.is_integer():
            raise MismatchError(
                f"config.json: query_pre_attn_scalar = {scalar} is not an integer, and no other "
                "number is accepted by transformers"
            )
        ours["attention_scale"] = 0.0 if scalar == ours["head_dim"] else scalar**-0.5

    def write(self, ours: Ours) -> dict[str, Any]:
        # The integer nearest to scale ** -2. Whether it gives this very scale again is checked by
        # `write_config`, as for every other field.
        scale = ours["attention_scale"]
        return {"query_pre_attn_scalar": round(scale**-2) if scale else ours["head_dim"]}


ROPE_KEYS = {
    "default": {},
    "linear": {"factor": ("factor", REQUIRED)},
    "llama3": {
        "factor": ("factor", REQUIRED),
        "low_freq_factor": ("low_frequency_factor", REQUIRED),
        "high_freq_factor": ("high_frequency_factor", REQUIRED),
        "original_max_position_embeddings": ("original_length", REQUIRED),
    },
    "yarn": {
        "factor": ("factor", REQUIRED),
        "beta_fast": ("beta_fast", 32.0),
        "beta_slow": ("beta_slow", 1.0),
        "original_max_position_embeddings": ("original_length", None),
    },
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding, its scaling, and where a family has one, the theta of local layers.

    `partial`: whether the family's code in `transformers` rotates a part of the head. The others
    ignore or fail on a `partial_rotary_factor`, so that only 1.0 is read.
    """

    theta: float = 10_000.0
    theta_name: str = "rope_theta"
    fraction: float = 1.0  # rotated part of the head when the config is silent
    fraction_name: str = "partial_rotary_factor"
    partial: bool = False
    local_theta: float = 0.0  # Gemma 3
    kinds: tuple[str, ...] = tuple(ROPE_KEYS)

    def read(self, theirs: Theirs, ours: Ours) -> None:
        given, where = self._given(theirs, ours)
        rope = Theirs(given, where)
        kind = rope.take("rope_type", str)
        if kind not in self.kinds:
            raise MismatchError(
                f"{rope.where}rope_type = {shown(kind)} is not supported; known: "
                f"{', '.join(self.kinds)}{nearest(kind[:60], self.kinds)}"
            )
        ours["rope.theta"] = rope.take("rope_theta", float, self.theta)
        fraction = rope.take("partial_rotary_factor", float, self.fraction)
        if fraction != 1.0 and not self.partial:
            raise MismatchError(
                f"config.json: {self.fraction_name} = {fraction} is not supported: transformers "
                "rotates the whole head in this family, whatever the config says"
            )
        ours["rope.fraction"] = fraction
        ours["rope.scaling"] = "none" if kind == "default" else kind
        for name, (own, default) in ROPE_KEYS[kind].items():
            if name == "original_max_position_embeddings":
                default = ours["max_length"] if default is None else default
                ours[f"rope.{own}"] = rope.take(name, int, default)
            else:
                ours[f"rope.{own}"] = rope.take(name, float, default)
        if kind == "yarn":
            factor = ours["rope.factor"]
            usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
            Constant("attention_factor", usual).read(rope, {})
            Constant("truncate", True).read(rope, {})
            if ours["rope.theta"] == 1.0:
                raise MismatchError(f"{rope.where}rope_theta = 1.0 has no logarithm to divide by")
        if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
            raise MismatchError(
                f"{rope.where}high_freq_factor = {given['high_freq_factor']} has to be more than "
                f"low_freq_factor = {given['low_freq_factor']}"
            )
        if kind != "default" and "original_max_position_embeddings" in given:
            rope.used.add("original_max_position_embeddings")
        rope.finish()

    def _given(self, theirs: Theirs, ours: Ours) -> tuple[dict[str, Any], str]:
        """Returns the rotary fields of a config in their newest spelling, and where they stand."""
        scaling = theirs.take("rope_scaling", dict, {})
        given = dict(theirs.take("rope_parameters", dict, {}))
        if scaling and given:
            raise MismatchError(
                "config.json: rope_scaling stands beside rope_parameters, and versions of "
                "transformers differ in which of them counts; remove one"
            )
        where, local = "rope_scaling" if scaling else "rope_parameters", 0.0
        if self.local_theta:
            local = theirs.take("rope_local_base_freq", float, self.local_theta)
            if "type" in scaling and "rope_type" not in scaling:
                raise MismatchError(
                    "config.json: rope_scaling.type is ignored by transformers in this family; "
                    "rope_type is its name"
                )
            both = Theirs(given, where)
            inner = Theirs(both.take("sliding_attention", dict, {}), f"{where}.sliding_attention")
            given = dict(both.take("full_attention", dict, {}))
            both.finish()  # what lies beside the two is ignored by transformers
            local = inner.take("rope_theta", float, local)
            Constant("rope_type", "default").read(inner, {})
            inner.finish()
        ours["rope.local_theta"] = local
        for name, value in {
            **scaling,
            "rope_theta": theirs.take(self.theta_name, float, None),
            "partial_rotary_factor": theirs.take(self.fraction_name, float, None),
        }.items():
            if value is not None and given.setdefault(name, value) != value:
                raise MismatchError(
                    f"config.json: {name} = {shown(value)}, but rope_parameters says "
                    f"{shown(given[name])}"
                )
        kind = given.pop("type", given.get("rope_type", "default"))
        if given.setdefault("rope_type", kind) != kind:
            raise MismatchError(
                f"config.json: {where} has rope_type = {shown(given['rope_type'])} beside type = "
                f"{shown(kind)}, and versions of transformers differ in which of them counts"
            )
        return given, where

    def write(self, ours: Ours) -> dict[str, Any]:
        kind = {"none": "default"}.get(ours["rope.scaling"], ours["rope.scaling"])
        scaling = {name: ours[f"rope.{own}"] for name, (own, _) in ROPE_KEYS[kind].items()}
        written = {self.theta_name: ours["rope.theta"]}
        written["rope_scaling"] = {"rope_type": kind, **scaling} if scaling else None
        if self.fraction != 1.0 or ours["rope.fraction"] != 1.0:
            written[self.fraction_name] = ours["rope.fraction"]
        if self.local_theta:
            written["rope_local_base_freq"] = ours["rope.local_theta"]
        return written


@dataclass(frozen=True)
class Windows:
    """Which layers see a window, from `layer_types` or from what older configs say instead.

    `default` gives the kinds when the config does not: "all" (local wherever there is a window),
    "alternate" (Gemma 2), "every sixth" (Gemma 3, or `sliding_window_pattern`), "upper" (Qwen, from
    `max_window_layers` on, if `use_sliding_window`).
    """

    default: str
    absent: Any = None  # what "all" takes for an absent sliding_window

    def read(self, theirs: Theirs, ours: Ours) -> None:
        count = ours["layers"]
        absent = {"all": self.absent, "upper": None}.get(self.default, 4096)
        window = theirs.take("sliding_window", int, absent, None)
        if self.default == "upper":
            first = theirs.take("max_window_layers", None, 28)
            if not theirs.take("use_sliding_window", bool, False):
                window = None
            if type(first) is not int or first < 0:
                raise MismatchError(f"config.json: max_window_layers = {shown(first)} is no layer")
        period = 2
        if self.default == "every sixth":
            theirs.used.add("_sliding_window_pattern")  # written, but never read, by transformers
            period = theirs.take("sliding_window_pattern", int, 6)
        local = {
            "all": lambda i: window is not None,
            "upper": lambda i: window is not None and i >= first,
        }.get(self.default, lambda i: (i + 1) % period != 0)
        usual = [
            "sliding_attention" if local(i) else "full_attention" for i in range(min(count, 2**16))
        ]
        kinds = theirs.take("layer_types", list, usual)
        if self.default == "all" and kinds != usual:
            raise MismatchError(
                f"config.json: layer_types = {shown(kinds)} is not supported: in this family "
                f"transformers gives every layer {usual[0]}, whatever layer_types says"
            )
        names = {"sliding_attention": "local", "full_attention": "global"}
        if len(kinds) != count or not all(isinstance(k, str) and k in names for k in kinds):
            raise MismatchError(
                f"config.json: layer_types = {shown(kinds)} does not name {count} layers as "
                f"{' or '.join(names)}"
            )
        pattern = tuple(names[k] for k in kinds)
        ours["pattern"] = _period(pattern)
        if "local" in pattern and window is None:
            raise MismatchError("config.json: sliding_window is missing, which layer_types needs")
        ours["window"] = window if "local" in pattern else 0

    def write(self, ours: Ours) -> dict[str, Any]:
        pattern, window = ours["pattern"], ours["window"] if "local" in ours["pattern"] else None
        kinds = [pattern[i % len(pattern)] for i in range(ours["layers"])]
        if self.default == "all":
            return {"sliding_window": window if set(kinds) == {"local"} else None}
        types = {"local": "sliding_attention", "global": "full_attention"}
        written = {"sliding_window": window, "layer_types": [types[k] for k in kinds]}
        if self.default == "upper":
            upper = kinds.index("local") if "local" in kinds else ours["layers"]
            written |= {"use_sliding_window": "local" in kinds, "max_window_layers": upper}
        return written


# ---------------------------------------------------------------- both ways


def read_config(config: dict[str, Any], fields: tuple, neutral: frozenset[str]) -> ModelConfig:
    """Returns the ModelConfig of a config.json.

    Raises:
      MismatchError: a field that is missing, unknown, or asks for what our model does not compute.
    """
    theirs, ours = Theirs(config), {}
    theirs.used |= neutral
    for field in fields:
        field.read(theirs, ours)
    theirs.finish()
    rope = {name[5:]: value for name, value in ours.items() if name.startswith("rope.")}
    plain = {name: value for name, value in ours.items() if "." not in name}
    model = ModelConfig(**plain, rope=RopeConfig(**rope))
    try:
        model.validate()
    except UsageError as error:
        raise MismatchError(f"config.json: {error}") from error
    return model


def write_config(model: ModelConfig, fields: tuple) -> dict[str, Any]:
    """Returns the config.json of a model; raises MismatchError if the family cannot express it."""
    ours, config = flat(model), {}
    for field in fields:
        config |= field.write(ours)
    try:
        back = flat(read_config(config, fields, frozenset()))
    except MismatchError as error:
        raise MismatchError(f"this family cannot express the model: {error}") from error
    free = (*COMPUTATION, "pad_vocab_to", *(f for f in ours if not _matters(f, ours)))
    for name, value in ours.items():
        if name not in free and back[name] != value:
            raise MismatchError(f"this family cannot express config.model.{name} = {value!r}")
    return config


def flat(model: ModelConfig) -> Ours:
    """Returns the fields of a ModelConfig as one level: "rope.theta" and so on."""
    ours = dataclasses.asdict(model)
    ours |= {f"rope.{name}": value for name, value in ours.pop("rope").items()}
    if ours["attention_scale"] == ours["head_dim"] ** -0.5:
        ours["attention_scale"] = 0.0  # two spellings of one scale
    ours["pattern"] = _period(model.kinds)
    return ours


def _period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the shortest beginning that, repeated, gives all layers."""
    count = len(kinds)
    periods = (kinds[:n] for n in range(1, count + 1))
    return next(p for p in periods if all(kinds[i] == p[i % len(p)] for i in range(count)))


def _matters(name: str, ours: Ours) -> bool:
    """Whether a field has any effect, given the others."""
    if name.startswith("rope."):
        keys = {own for own, _ in ROPE_KEYS.get(ours["rope.scaling"], {}).values()}
        always = {"rope.theta", "rope.fraction", "rope.scaling", "rope.local_theta"}
        return ours["position"] == "rope" and (name in always or name[5:] in keys)
    return name != "window" or "local" in ours["pattern"]
