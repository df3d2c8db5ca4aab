"""The shape of a decoder and how it is computed. Imports nothing heavy.

A model family is a value of `ModelConfig`; no family has code of its own. `models/presets.py`
holds the published ones.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

from sharding.errors import UsageError, nearest
from sharding.fields import Fields

# Activations that a remat policy may keep, in the order in which keeping them pays
# (each costs memory for every layer and saves its recomputation in the backward pass).
SAVEABLE = ("rotated_qk", "v", "attention", "residual", "gate", "up")

# Fields that may differ between two runs of the same experiment.
COMPUTATION = (
    "attention", "barriers", "dtype", "loss_chunks", "reduce_dtype", "remat", "scan_layers",
    "seq_head_devices", "seq_order", "seq_strategy",
)  # fmt: skip

# How attention is spread over the `seq` mesh axis: models/attention/sequence_plan.py.
SEQ_STRATEGIES = ("auto", "gather", "ulysses", "ring", "bidirectional", "hybrid")
SEQ_ORDERS = ("auto", "contiguous", "zigzag", "striped")

CHOICES = {
    "norm": ("rmsnorm", "rmsnorm_plus_one", "layernorm"),
    "norm_placement": ("pre", "post", "sandwich"),
    "position": ("rope", "learned", "none"),
    "qk_norm": ("none", "head", "full"),
    "activation": ("swiglu", "geglu", "gelu", "gelu_exact"),
    "dtype": ("float32", "bfloat16"),
    "reduce_dtype": ("float32", "bfloat16"),
    "seq_strategy": SEQ_STRATEGIES,
    "seq_order": SEQ_ORDERS,
    "rope.scaling": ("none", "linear", "llama3", "yarn"),
}


@dataclass
class RopeConfig(Fields, at="config.model.rope"):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split layout."""

    theta: float = 10_000.0  # base of the wavelengths
    local_theta: float = 0.0  # theta of "local" layers, unscaled; 0 = the same as the others
    fraction: float = 1.0  # part of the head that is rotated
    scaling: str = "none"  # none | linear | llama3 | yarn
    factor: float = 1.0  # context extension factor of the scaling
    original_length: int = 8192  # context length before the extension
    low_frequency_factor: float = 1.0  # llama3: below it wavelengths are scaled in full
    high_frequency_factor: float = 4.0  # llama3: above it they are not scaled
    beta_fast: float = 32.0  # yarn: rotations above which nothing is scaled
    beta_slow: float = 1.0  # yarn: rotations below which all is scaled


@dataclass
class ModelConfig(Fields, at="config.model"):
    """One decoder-only transformer. Sizes use the letters of the code: D, L, N, K, H, F, V."""

    # Shape.
    vocab: int = 384  # V, ids of the tokenizer
    layers: int = 4  # L
    width: int = 256  # D, of the residual stream
    heads: int = 4  # N, query heads
    kv_heads: int = 4  # K, key and value heads; divides heads
    head_dim: int = 64  # H
    mlp: int = 768  # F, hidden width of the MLP
    max_length: int = 2048  # longest sequence; the size of the table for learned positions

    # Family.
    norm: str = "rmsnorm"  # rmsnorm | rmsnorm_plus_one (scale is 1 + w) | layernorm (with bias)
    norm_eps: float = 1e-5  # added to the variance in norms
    norm_placement: str = "pre"  # pre | post (on the branch output) | sandwich (both)
    position: str = "rope"  # rope | learned | none
    rope: RopeConfig = field(default_factory=RopeConfig)
    pattern: tuple[str, ...] = ("global",)  # kinds of layers, repeated: "global" or "local"
    window: int = 0  # keys that a "local" layer sees, its own position included
    qkv_bias: bool = False  # biases of queries, keys and values
    out_bias: bool = False  # bias of the attention output and of the MLP
    qk_norm: str = "none"  # none | head (over each head) | full (over all heads)
    attention_scale: float = 0.0  # 0 = head_dim ** -0.5
    attention_softcap: float = 0.0  # 0 = none
    final_softcap: float = 0.0  # 0 = none
    activation: str = "swiglu"  # swiglu | geglu | gelu, gelu_exact (two matrices; tanh form, erf)
    parallel_residual: bool = False  # attention and MLP both read the layer's input
    tie_embeddings: bool = False  # the head is the embedding table
    scale_embeddings: bool = False  # multiply embeddings by sqrt(width)

    # Computation: changes speed and memory, never the function (beyond rounding).
    dtype: str = "bfloat16"  # of matmuls; parameters, norms, softmax and loss stay float32
    # float32 | bfloat16: in which gradients of weights are summed over tokens and devices; bfloat16
    # moves half the bytes and holds half a layer's gradient (docs/models.md)
    reduce_dtype: str = "float32"
    # none | full | auto (what fits: trainer/plan/recipe.py) | names from SAVEABLE joined by ",",
    # "@host" offloads one
    remat: str = "auto"
    scan_layers: bool = True  # compile one layer and loop over it, instead of all of them
    barriers: bool = False  # no fusion of norms and activations into matmuls; train steps choose
    attention: str = "auto"  # backend; models/attention/dispatch.py lists them
    seq_strategy: str = "auto"  # over seq: gather | ulysses | ring | bidirectional | hybrid
    seq_order: str = "auto"  # of columns over seq: contiguous | zigzag | striped
    seq_head_devices: int = 0  # of seq, those that exchange heads in a hybrid; 0 = chosen
    loss_chunks: int = 0  # token chunks of the cross-entropy; 0 = chosen by size
    pad_vocab_to: int = 128  # stored vocabulary is rounded up to a multiple of this

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table as stored."""
        return -(-self.vocab // self.pad_vocab_to) * self.pad_vocab_to

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer, "global" or "local"."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.layers))

    def remat_names(self) -> tuple[list[str], list[str]] | None:
        """Returns (kept on device, offloaded to host), or None when nothing is rematerialised.

        Raises:
          UsageError: a name that is not in SAVEABLE.
        """
        if self.remat == "none":
            return None
        kept, offloaded = [], []
        # "auto" is full until a train step is made for a chip; no other pass goes backward.
        names = [] if self.remat in ("full", "auto") else [n.strip() for n in self.remat.split(",")]
        for name in names:
            base, _, where = name.partition("@")
            if base not in SAVEABLE or where not in ("", "host"):
                raise UsageError(
                    f"config.model.remat = {self.remat!r}: {name!r} is not auto, none, full or a "
                    f"name of {', '.join(SAVEABLE)} (each may end in @host)"
                    f"{nearest(base, (*SAVEABLE, 'auto', 'none', 'full'))}"
                )
            (offloaded if where else kept).append(base)
        return kept, offloaded

    def _value(self, path: str) -> Any:
        return functools.reduce(getattr, path.split("."), self)

    def validate(self) -> None:
        """Raises UsageError, naming the field, its value and the choices."""
        for path, choices in CHOICES.items():
            if (value := self._value(path)) not in choices:
                raise UsageError(
                    f"config.model.{path} = {value!r}: choose {', '.join(choices)}"
                    f"{nearest(value, choices)}"
                )
        if self.dtype == "float32" and self.reduce_dtype != "float32":
            raise UsageError(
                f"config.model.reduce_dtype = {self.reduce_dtype!r} is narrower than "
                f"config.model.dtype = {self.dtype!r}; choose float32"
            )
        for path, least in {
            "vocab": 1, "layers": 1, "width": 1, "heads": 1, "kv_heads": 1, "head_dim": 1, "mlp": 1,
            "max_length": 1, "pad_vocab_to": 1, "norm_eps": 0, "window": 0, "attention_scale": 0,
            "attention_softcap": 0, "final_softcap": 0, "loss_chunks": 0, "seq_head_devices": 0,
            "rope.local_theta": 0,
        }.items():  # fmt: skip
            if (value := self._value(path)) < least:
                raise UsageError(f"config.model.{path} = {value}: at least {least}")
        for path in ("rope.theta", "rope.factor"):
            if (value := self._value(path)) <= 0:
                raise UsageError(f"config.model.{path} = {value}: must be above 0")
        if self.heads % self.kv_heads:
            raise UsageError(
                f"config.model.kv_heads = {self.kv_heads} does not divide heads = {self.heads}"
            )
        if not self.pattern:
            raise UsageError("config.model.pattern is empty: name the kinds of layers")
        for kind in self.pattern:
            if kind not in ("global", "local"):
                raise UsageError(
                    f"config.model.pattern: {kind!r} is not a kind of layer; choose global, local"
                    f"{nearest(kind, ('global', 'local'))}"
                )
        if "local" in self.pattern and self.window < 1:
            raise UsageError(
                f"config.model.window = {self.window}: local layers need a window of at least 1"
            )
        rotated = self.rope.fraction * self.head_dim
        if self.position == "rope" and (rotated % 2 or not 0 < rotated <= self.head_dim):
            raise UsageError(
                f"config.model.rope.fraction = {self.rope.fraction}: rotates {rotated:g} of "
                f"{self.head_dim} head dimensions; an even number is needed"
            )
        if self.parallel_residual and self.norm_placement != "pre":
            raise UsageError(
                f"config.model.parallel_residual needs norm_placement = 'pre', not "
                f"{self.norm_placement!r}"
            )
        self.remat_names()
