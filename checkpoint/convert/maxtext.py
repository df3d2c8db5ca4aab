"""MaxText: its decoder's tree, scanned or not, fused or not, for configs of Hugging Face.

One table holds the rows of all; those whose tensor a checkpoint has are in force. Nothing is scaled
on the way: where MaxText keeps 1/sqrt(head size) inside of its query weights, our model is told
not to apply it, and Gemma's norms keep the 1 that they hold there.
"""

import dataclasses
from typing import Any

from checkpoint.convert.families import Family
from checkpoint.convert.sources import PARAMS, Source
from models.config import ModelConfig
from sharding.errors import MismatchError

NAME = "maxtext"
SCALED = {"qwen2", "qwen3"}  # families whose queries MaxText scales as we do
BLOCKS = {"llama", "mistral", "gemma", *SCALED}
LAYER = "decoder.layers."
TABLE = """
embedding: V D        = token_embedder.embedding: V D
final_norm/scale: D   = decoder.decoder_norm.scale: D
head: V D             = decoder.logits_dense.kernel: D V
layers/attention/wq: L D N H = decoder.layers.self_attention.query.kernel[_,{L}]: D N H
layers/attention/wk: L D K H = decoder.layers.self_attention.key.kernel[_,{L}]: D K H
layers/attention/wv: L D K H = decoder.layers.self_attention.value.kernel[_,{L}]: D K H
layers/attention/wq: L D N H & layers/attention/wk: L D K H & layers/attention/wv: L D K H \
    = decoder.layers.self_attention.qkv_proj.kernel[_,{L}]: D [N | K | K] H
layers/attention/wo: L N H D = decoder.layers.self_attention.out.kernel[_,{L}]: N H D
layers/attention/bq: L N H   = decoder.layers.self_attention.query.bias[_,{L}]: N H
layers/attention/bk: L K H   = decoder.layers.self_attention.key.bias[_,{L}]: K H
layers/attention/bv: L K H   = decoder.layers.self_attention.value.bias[_,{L}]: K H
layers/attention/q_norm/scale: L H = decoder.layers.self_attention.query_norm.scale[_,{L}]: H
layers/attention/k_norm/scale: L H = decoder.layers.self_attention.key_norm.scale[_,{L}]: H
layers/attention_norm/scale: L D = decoder.layers.pre_self_attention_layer_norm.scale[_,{L}]: D
layers/mlp_norm/scale: L D   = decoder.layers.post_self_attention_layer_norm.scale[_,{L}]: D
layers/attention_norm/scale: L D = decoder.layers.pre_self_attention_norm.scale[_,{L}]: D
layers/mlp_norm/scale: L D   = decoder.layers.pre_ffw_norm.scale[_,{L}]: D
layers/mlp/gate: L D F       = decoder.layers.mlp.wi_0.kernel[_,{L}]: D F
layers/mlp/up: L D F         = decoder.layers.mlp.wi_1.kernel[_,{L}]: D F
layers/mlp/gate: L D F & layers/mlp/up: L D F = decoder.layers.mlp.wi.kernel[_,{L}]: D [ | ] F
layers/mlp/down: L F D       = decoder.layers.mlp.wo.kernel[_,{L}]: F D
"""


def adapted(family: Family, model: ModelConfig, found: Source) -> tuple[Family, ModelConfig]:
    """Returns the family of a checkpoint of MaxText, and the model whose weights it holds.

    Args:
      family, model: of the config.json that goes with it.

    Raises:
      MismatchError: MaxText's tree of this family is not known.
    """
    if family.model_type not in BLOCKS:
        raise MismatchError(
            f"maxtext: model_type {family.model_type!r} is not covered; "
            f"known: {', '.join(sorted(BLOCKS))}"
        )
    names = found.parts[PARAMS].facts
    lines = [line.strip() for line in TABLE.replace("\\\n", " ").splitlines() if line]
    if not any(LAYER in name for name in names):
        lines = [x.replace(LAYER, "decoder.layers_{L}.").replace("[_,{L}]", "") for x in lines]
    rows = [line for line in lines if _there(line, names)]
    changes: dict[str, Any] = {}
    if family.model_type not in SCALED:
        changes["attention_scale"] = 1.0
    if family.model_type == "gemma":
        changes["norm"] = "rmsnorm"
    if model.rope.scaling == "llama3":  # MaxText turns pairs of neighbours there
        if any("qkv_proj" in row for row in rows):
            raise MismatchError(
                "maxtext: fused_qkv with the rotary order of llama3.1 is not covered"
            )
        rows = [_paired(row) for row in rows]
    family = dataclasses.replace(family, prefix="", table="\n".join(rows))
    return family, dataclasses.replace(model, **changes)


def _there(line: str, names: dict[str, Any]) -> bool:
    theirs = line.split(" = ")[1].partition(":")[0].partition("[")[0].replace("{L}", "0")
    return any(f".{name}".endswith(f".{theirs}") for name in names)


def _paired(row: str) -> str:
    ours, theirs = row.split(" = ")
    if not theirs.partition("[")[0].endswith(("query.kernel", "key.kernel", "query.bias",
                                              "key.bias")):  # fmt: skip
        return row
    return f"{ours.rstrip().removesuffix('H')}(c R) = {theirs.removesuffix('H')}(R c)"
