"""MaxText: the tree of its scanned llama2 block, for configs of Hugging Face's Llama.

Nothing is scaled on the way: MaxText keeps 1/sqrt(head size) inside of its query weights, so our
model is told not to apply it.
"""

import dataclasses

from checkpoint.convert.families import Family
from models.config import ModelConfig
from sharding.errors import MismatchError

NAME = "maxtext"
TABLE = """
embedding: V D        = token_embedder.embedding: V D
final_norm/scale: D   = decoder.decoder_norm.scale: D
head: V D             = decoder.logits_dense.kernel: D V
layers/attention/wq: L D N H = decoder.layers.self_attention.query.kernel[_,{L}]: D N H
layers/attention/wk: L D K H = decoder.layers.self_attention.key.kernel[_,{L}]: D K H
layers/attention/wv: L D K H = decoder.layers.self_attention.value.kernel[_,{L}]: D K H
layers/attention/wo: L N H D = decoder.layers.self_attention.out.kernel[_,{L}]: N H D
layers/attention_norm/scale: L D = decoder.layers.pre_self_attention_layer_norm.scale[_,{L}]: D
layers/mlp_norm/scale: L D   = decoder.layers.post_self_attention_layer_norm.scale[_,{L}]: D
layers/mlp/gate: L D F       = decoder.layers.mlp.wi_0.kernel[_,{L}]: D F
layers/mlp/up: L D F         = decoder.layers.mlp.wi_1.kernel[_,{L}]: D F
layers/mlp/down: L F D       = decoder.layers.mlp.wo.kernel[_,{L}]: F D
"""


def adapted(family: Family, model: ModelConfig) -> tuple[Family, ModelConfig]:
    """Returns the family of a checkpoint of MaxText, and the model whose weights it holds.

    Args:
      family, model: of the config.json that goes with it.

    Raises:
      MismatchError: MaxText's tree of this family is not known.
    """
    if family.model_type != "llama" or model.tie_embeddings:
        tied = " with tied embeddings" if model.tie_embeddings else ""
        raise MismatchError(
            f"maxtext: model_type {family.model_type!r}{tied} is not covered; covered is llama "
            "with a head of its own"
        )
    rows = TABLE.strip().splitlines()
    if model.rope.scaling == "llama3":  # MaxText turns pairs of neighbours there
        rows = [_paired(row) for row in rows]
    family = dataclasses.replace(family, prefix="", table="\n".join(rows))
    return family, dataclasses.replace(model, attention_scale=1.0)


def _paired(row: str) -> str:
    ours, theirs = row.split(" = ")
    if not theirs.partition("[")[0].endswith(("query.kernel", "key.kernel")):
        return row
    return f"{ours.rstrip().removesuffix('H')}(c R) = {theirs.removesuffix('H')}(R c)"
