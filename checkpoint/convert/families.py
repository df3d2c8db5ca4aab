"""The families: one table of tensors and one list of config fields each, in the form users write.

To add one, write a Python file with a `FAMILY = Family(...)` as below and name it on the command
line (`--family my_family.py`); docs/checkpoint.md has an example. Letters: L layers, D width,
N query heads, K KV heads, H head dim, F MLP width, V vocabulary, P positions, E experts.
"""

import dataclasses
import re
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.convert.fields import (
    REQUIRED,
    Constant,
    Divisible,
    Field,
    Fixed,
    QueryScale,
    Rope,
    Unsupported,
    Windows,
    read_config,
    write_config,
)
from checkpoint.convert.mapping import TIED, Row, Sizes, check, parse_rows
from models.config import ModelConfig
from sharding.errors import MismatchError, UsageError, nearest


@dataclass(frozen=True)
class Family:
    """How one architecture of theirs is stored and configured.

    `rows` is a table (see mapping.py); rows whose arrays a model does not have are left out.
    `prefix` begins their names and may be missing in files; `buffers` match names that hold no
    parameters; `letters` are sizes that ModelConfig does not know; `pad_token` is the
    `pad_token_id` that `transformers` assumes, which has to be a row of the embedding.
    """

    model_type: str
    architecture: str
    prefix: str
    table: str
    fields: tuple
    neutral: frozenset[str] = frozenset()
    buffers: str = r"rotary_emb\.inv_freq$"
    letters: dict[str, int] = field(default_factory=dict)
    pad_token: int = 0

    @property
    def rows(self) -> tuple[Row, ...]:
        return parse_rows(self.table)

    def sizes(self, config: ModelConfig) -> Sizes:
        """Returns the size of every letter for one model."""
        true = {
            "L": config.layers, "D": config.width, "N": config.heads, "K": config.kv_heads,
            "G": config.heads // config.kv_heads, "H": config.head_dim, "F": config.mlp,
            "V": config.vocab, "P": config.max_length, "c": 2, "R": config.head_dim // 2,
            **self.letters,
        }  # fmt: skip
        return Sizes(true, {"V": config.padded_vocab})

    def rows_for(self, config: ModelConfig) -> tuple[Row, ...]:
        """Returns the rows in force for one model, after proving them on a shrunken copy of it.

        Raises:
          TableError: the table does not fit the model.
        """
        shapes = parameter_shapes(config)
        rows = tuple(r for r in self.rows if all(o.name in shapes for o in r.ours))
        small = shrunk(config)
        check(rows, self.sizes(small), parameter_shapes(small))
        return rows

    def tied_name(self, config: ModelConfig) -> tuple[str, str] | None:
        """Returns (their name that may repeat a tied tensor, their name of the tensor)."""
        theirs = {o.name: row.theirs.name for row in self.rows for o in row.ours}
        for leaf, serves in TIED.items():
            if leaf in theirs and leaf not in parameter_shapes(config):
                return theirs[leaf], theirs[serves]
        return None

    def bare(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def is_buffer(self, name: str) -> bool:
        return re.search(self.buffers, name) is not None

    def read(self, config: dict[str, Any]) -> ModelConfig:
        """Returns the ModelConfig of a config.json; raises MismatchError naming the field."""
        return read_config(config, self.fields, self.neutral)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Returns the config.json of a model; raises MismatchError if it is not of this family."""
        head = {"architectures": [self.architecture], "model_type": self.model_type}
        return head | write_config(model, self.fields)

    def defaults(self, model: ModelConfig) -> dict[str, Any]:
        """Returns the neutral fields that have to be written where no source names them."""
        return {"pad_token_id": None} if self.pad_token >= model.vocab else {}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns name → shape of every parameter of a model."""
    import jax

    from models.decoder import param_specs  # imports JAX, which a refused command does not need
    from models.spec import is_spec, path_name

    leaves = jax.tree_util.tree_leaves_with_path(param_specs(config), is_leaf=is_spec)
    return {path_name(path): spec.shape for path, spec in leaves}


def shrunk(config: ModelConfig) -> ModelConfig:
    """Returns a model of the same structure, small enough for arrays of indices."""
    kv_heads = min(config.kv_heads, 2)
    return dataclasses.replace(
        config, vocab=5, layers=2, width=6, kv_heads=kv_heads, head_dim=4, mlp=10, max_length=3,
        heads=kv_heads * min(config.heads // config.kv_heads, 3), pad_vocab_to=4,
    )  # fmt: skip


# ---------------------------------------------------------------- tables

EMBEDDING = """
embedding: V D = model.embed_tokens.weight: V D
final_norm/scale: D = model.norm.weight: D
head: V D = lm_head.weight: V D
"""
ATTENTION = """
layers/attention/wq: L D N H = model.layers.{L}.self_attn.q_proj.weight: (N H) D
layers/attention/wk: L D K H = model.layers.{L}.self_attn.k_proj.weight: (K H) D
layers/attention/wv: L D K H = model.layers.{L}.self_attn.v_proj.weight: (K H) D
layers/attention/wo: L N H D = model.layers.{L}.self_attn.o_proj.weight: D (N H)
layers/attention/bq: L N H   = model.layers.{L}.self_attn.q_proj.bias: (N H)
layers/attention/bk: L K H   = model.layers.{L}.self_attn.k_proj.bias: (K H)
layers/attention/bv: L K H   = model.layers.{L}.self_attn.v_proj.bias: (K H)
"""
HEAD_NORMS = """
layers/attention/q_norm/scale: L H = model.layers.{L}.self_attn.q_norm.weight: H
layers/attention/k_norm/scale: L H = model.layers.{L}.self_attn.k_norm.weight: H
"""
GATED = """
layers/mlp/gate: L D F = model.layers.{L}.mlp.gate_proj.weight: F D
layers/mlp/up: L D F   = model.layers.{L}.mlp.up_proj.weight: F D
layers/mlp/down: L F D = model.layers.{L}.mlp.down_proj.weight: D F
"""
PRE_NORMS = """
layers/attention_norm/scale: L D = model.layers.{L}.input_layernorm.weight: D
layers/mlp_norm/scale: L D       = model.layers.{L}.post_attention_layernorm.weight: D
"""
POST_NORMS = """
layers/attention_post_norm/scale: L D = model.layers.{L}.post_attention_layernorm.weight: D
layers/mlp_post_norm/scale: L D       = model.layers.{L}.post_feedforward_layernorm.weight: D
"""
SANDWICH_NORMS = (
    POST_NORMS
    + """
layers/attention_norm/scale: L D = model.layers.{L}.input_layernorm.weight: D
layers/mlp_norm/scale: L D       = model.layers.{L}.pre_feedforward_layernorm.weight: D
"""
)
LLAMA = EMBEDDING + ATTENTION + PRE_NORMS + GATED
EXPERTS = """
layers/moe/router: L D E   = model.layers.{L}.block_sparse_moe.gate.weight: E D
layers/moe/gate: L E D F   = model.layers.{L}.block_sparse_moe.experts.{E}.w1.weight: F D
layers/moe/up: L E D F     = model.layers.{L}.block_sparse_moe.experts.{E}.w3.weight: F D
layers/moe/down: L E F D   = model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight: D F
"""
PHI3 = (
    EMBEDDING
    + PRE_NORMS
    + """
layers/attention/wq: L D N H & layers/attention/wk: L D K H & layers/attention/wv: L D K H \
    = model.layers.{L}.self_attn.qkv_proj.weight: [(N H) | (K H) | (K H)] D
layers/attention/wo: L N H D = model.layers.{L}.self_attn.o_proj.weight: D (N H)
layers/mlp/gate: L D F & layers/mlp/up: L D F = model.layers.{L}.mlp.gate_up_proj.weight: [F | F] D
layers/mlp/down: L F D       = model.layers.{L}.mlp.down_proj.weight: D F
"""
)
GPT2 = """
embedding: V D            = transformer.wte.weight: V D
positions: P D            = transformer.wpe.weight: P D
final_norm/scale: D       = transformer.ln_f.weight: D
final_norm/bias: D        = transformer.ln_f.bias: D
head: V D                 = lm_head.weight: V D
layers/attention_norm/scale: L D = transformer.h.{L}.ln_1.weight: D
layers/attention_norm/bias: L D  = transformer.h.{L}.ln_1.bias: D
layers/mlp_norm/scale: L D       = transformer.h.{L}.ln_2.weight: D
layers/mlp_norm/bias: L D        = transformer.h.{L}.ln_2.bias: D
layers/attention/wq: L D N H & layers/attention/wk: L D K H & layers/attention/wv: L D K H \
    = transformer.h.{L}.attn.c_attn.weight: D [(N H) | (K H) | (K H)]
layers/attention/bq: L N H & layers/attention/bk: L K H & layers/attention/bv: L K H \
    = transformer.h.{L}.attn.c_attn.bias: [(N H) | (K H) | (K H)]
layers/attention/wo: L N H D = transformer.h.{L}.attn.c_proj.weight: (N H) D
layers/attention/bo: L D     = transformer.h.{L}.attn.c_proj.bias: D
layers/mlp/up: L D F         = transformer.h.{L}.mlp.c_fc.weight: D F
layers/mlp/up_bias: L F      = transformer.h.{L}.mlp.c_fc.bias: F
layers/mlp/down: L F D       = transformer.h.{L}.mlp.c_proj.weight: F D
layers/mlp/down_bias: L D    = transformer.h.{L}.mlp.c_proj.bias: D
"""
NEOX = """
embedding: V D            = gpt_neox.embed_in.weight: V D
final_norm/scale: D       = gpt_neox.final_layer_norm.weight: D
final_norm/bias: D        = gpt_neox.final_layer_norm.bias: D
head: V D                 = embed_out.weight: V D
layers/attention_norm/scale: L D = gpt_neox.layers.{L}.input_layernorm.weight: D
layers/attention_norm/bias: L D  = gpt_neox.layers.{L}.input_layernorm.bias: D
layers/mlp_norm/scale: L D       = gpt_neox.layers.{L}.post_attention_layernorm.weight: D
layers/mlp_norm/bias: L D        = gpt_neox.layers.{L}.post_attention_layernorm.bias: D
layers/attention/wq: L D N H & layers/attention/wk: L D N H & layers/attention/wv: L D N H \
    = gpt_neox.layers.{L}.attention.query_key_value.weight: (N [H | H | H]) D
layers/attention/bq: L N H & layers/attention/bk: L N H & layers/attention/bv: L N H \
    = gpt_neox.layers.{L}.attention.query_key_value.bias: (N [H | H | H])
layers/attention/wo: L N H D = gpt_neox.layers.{L}.attention.dense.weight: D (N H)
layers/attention/bo: L D     = gpt_neox.layers.{L}.attention.dense.bias: D
layers/mlp/up: L D F         = gpt_neox.layers.{L}.mlp.dense_h_to_4h.weight: F D
layers/mlp/up_bias: L F      = gpt_neox.layers.{L}.mlp.dense_h_to_4h.bias: F
layers/mlp/down: L F D       = gpt_neox.layers.{L}.mlp.dense_4h_to_h.weight: D F
layers/mlp/down_bias: L D    = gpt_neox.layers.{L}.mlp.dense_4h_to_h.bias: D
"""

# ---------------------------------------------------------------- fields

HEADS = (
    Field("vocab_size", "vocab"),
    Field("num_hidden_layers", "layers"),
    Field("hidden_size", "width"),
    Field("num_attention_heads", "heads"),
)
SIZES = (
    *HEADS,
    Field("intermediate_size", "mlp"),
    Field("max_position_embeddings", "max_length"),
)
GROUPED = Field("num_key_value_heads", "kv_heads", null=lambda ours: ours["heads"])
GROUPED_OR_NOT = dataclasses.replace(GROUPED, default=GROUPED.null)
HEAD_DIM = Field("head_dim", "head_dim", default=lambda ours: ours["width"] // ours["heads"])
EQUAL_HEADS = Fixed({
    "kv_heads": lambda ours: ours["heads"],
    "head_dim": lambda ours: ours["width"] // ours["heads"],
})  # fmt: skip
EPS = Field("rms_norm_eps", "norm_eps", float)
GATES = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
SILU = Field("hidden_act", "activation", str, "silu", names=GATES)
UNTIED = Field("tie_word_embeddings", "tie_embeddings", bool, False)
NO_BIAS = (Constant("attention_bias", False), Constant("mlp_bias", False))
PLAIN = (*SIZES, GROUPED_OR_NOT, SILU, EPS, UNTIED)
GIVEN = (*SIZES, GROUPED, SILU, EPS, UNTIED)  # KV heads have to be told
GEMMA = (
    *SIZES, GROUPED, Field("head_dim", "head_dim", default=256), EPS, NO_BIAS[0],
    Field("tie_word_embeddings", "tie_embeddings", bool, True),
    Fixed({"norm": "rmsnorm_plus_one", "activation": "geglu", "scale_embeddings": True}),
)  # fmt: skip
GEMMA_ACT = Constant("hidden_activation", "gelu_pytorch_tanh")
NO_CAP = (Constant("final_logit_softcapping", None), Constant("attn_logit_softcapping", None))
NORMS = "norm_placement"


_ALL = (
    Family("llama", "LlamaForCausalLM", "model.", LLAMA,
           (*PLAIN, Divisible(), HEAD_DIM, *NO_BIAS, Constant("rope_interleaved", False), Rope())),
    Family("mistral", "MistralForCausalLM", "model.", LLAMA,
           (*GIVEN, HEAD_DIM, Windows("all", REQUIRED), Rope())),
    Family("qwen2", "Qwen2ForCausalLM", "model.", LLAMA,
           (*GIVEN, HEAD_DIM, Fixed({"qkv_bias": True}), Constant("use_mrope", False),
            Windows("upper"), Rope())),
    Family("qwen3", "Qwen3ForCausalLM", "model.", LLAMA + HEAD_NORMS,
           (*GIVEN, Field("head_dim", "head_dim", default=128), Fixed({"qk_norm": "head"}),
            NO_BIAS[0], Windows("upper"), Rope())),
    Family("gemma", "GemmaForCausalLM", "model.", LLAMA,
           (*GEMMA, Constant("hidden_act", "gelu_pytorch_tanh", ("gelu",)), GEMMA_ACT, Rope())),
    Family("gemma2", "Gemma2ForCausalLM", "model.",
           EMBEDDING + ATTENTION + SANDWICH_NORMS + GATED,
           (*GEMMA, Divisible(), GEMMA_ACT, Fixed({NORMS: "sandwich"}), QueryScale(),
            Windows("alternate"),
            Field("final_logit_softcapping", "final_softcap", float, null=0.0),
            Field("attn_logit_softcapping", "attention_softcap", float, null=0.0), Rope()),
           neutral=frozenset({"hidden_act"})),
    Family("gemma3_text", "Gemma3ForCausalLM", "model.",
           EMBEDDING + ATTENTION + HEAD_NORMS + SANDWICH_NORMS + GATED,
           (*GEMMA, Divisible(), GEMMA_ACT, Fixed({NORMS: "sandwich", "qk_norm": "head"}),
            QueryScale(),
            Windows("every sixth"), *NO_CAP, Rope(theta=1e6, local_theta=1e4))),
    Family("olmo2", "Olmo2ForCausalLM", "model.",
           EMBEDDING + ATTENTION + POST_NORMS + GATED + """
layers/attention/q_norm/scale: L N H = model.layers.{L}.self_attn.q_norm.weight: (N H)
layers/attention/k_norm/scale: L K H = model.layers.{L}.self_attn.k_norm.weight: (K H)
""",
           (*PLAIN, Fixed({"head_dim": EQUAL_HEADS.values["head_dim"], NORMS: "post",
                           "qk_norm": "full"}), NO_BIAS[0], Rope()), pad_token=1),
    Family("phi3", "Phi3ForCausalLM", "model.", PHI3,
           (*PLAIN, Fixed({"head_dim": EQUAL_HEADS.values["head_dim"]}), NO_BIAS[0],
            Windows("all"), Rope(kinds=("default",), partial=True)),
           neutral=frozenset({"original_max_position_embeddings"}), pad_token=32_000),
    Family("gpt2", "GPT2LMHeadModel", "transformer.", GPT2,
           (Field("vocab_size", "vocab"), Field("n_layer", "layers"), Field("n_embd", "width"),
            Field("n_head", "heads"), Field("n_positions", "max_length"),
            Field("n_inner", "mlp", default=lambda ours: 4 * ours["width"]), EQUAL_HEADS,
            Divisible(),
            Field("layer_norm_epsilon", "norm_eps", float, 1e-5),
            Field("activation_function", "activation", str, "gelu_new", names=GELUS),
            Field("tie_word_embeddings", "tie_embeddings", bool, True),
            Constant("scale_attn_weights", True),
            Constant("scale_attn_by_inverse_layer_idx", False),
            Constant("reorder_and_upcast_attn", False, (True,)),
            Fixed({"norm": "layernorm", "position": "learned", "qkv_bias": True,
                   "out_bias": True})),
           neutral=frozenset({"n_ctx", "summary_activation", "summary_first_dropout",
                              "summary_proj_to_labels", "summary_type", "summary_use_proj"}),
           buffers=r"attn\.(masked_)?bias$"),
    Family("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.", NEOX,
           (*SIZES, Divisible(), EQUAL_HEADS, Field("layer_norm_eps", "norm_eps", float, 1e-5),
            Field("hidden_act", "activation", str, "gelu", names=GELUS),
            UNTIED, Field("use_parallel_residual", "parallel_residual", bool, True),
            Constant("attention_bias", True),
            Fixed({"norm": "layernorm", "qkv_bias": True, "out_bias": True}),
            Rope(theta_name="rotary_emb_base", fraction=0.25, fraction_name="rotary_pct",
                 partial=True)),
           neutral=frozenset({"bos_token_id"}),
           buffers=r"(attention\.(masked_)?bias|rotary_emb\.inv_freq)$"),
    # The table alone: there is no mixture of experts in models/ yet.
    Family("mixtral", "MixtralForCausalLM", "model.",
           EMBEDDING + ATTENTION + PRE_NORMS + EXPERTS,
           (Unsupported("num_local_experts (mixture of experts)"),), letters={"E": 3}),
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


def find_family(model_type: Any) -> Family:
    """Returns the family of a model_type that a file names: a key of FAMILIES, never a path.

    Raises:
      MismatchError: there is no such family.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = isinstance(model_type, str | None)
        name = str(model_type)[:80] if named else type(model_type).__name__
        raise MismatchError(
            f"no table for model_type {name!r}; known: {', '.join(FAMILIES)}"
            f"{nearest(name, FAMILIES)} (--family FILE.py names a table of your own)"
        )
    return FAMILIES[model_type]


def chosen_family(name: str) -> Family:
    """Returns the family that the user chose on the command line: a model_type, or a Python file.

    The file is run. So `name` must never come from a checkpoint; that is what `find_family` is for.

    Raises:
      UsageError: there is no such family or file, or the file has no FAMILY.
    """
    if not name.endswith(".py"):
        return find_family(name)
    if not Path(name).is_file():
        raise UsageError(f"--family {name}: no such file")
    family = runpy.run_path(name).get("FAMILY")
    if not isinstance(family, Family):
        raise UsageError(f"--family {name}: the file defines no FAMILY = Family(...)")
    return family


def family_of(model: ModelConfig) -> Family:
    """Returns the first family that can express a model of ours; raises MismatchError if none."""
    reasons = []
    for family in FAMILIES.values():
        try:
            family.write(model)
        except MismatchError as error:
            reasons.append(f"{family.model_type}: {error}")
        else:
            return family
    raise MismatchError("no family can express this model — " + "; ".join(reasons))
