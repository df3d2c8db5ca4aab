"""Makes tests/checkpoint/convert/maxtext_runs.tar.xz: tiny runs of MaxText and their logits.

Needs what `make test` does not: MaxText (made with 0.2.5, on Python 3.12). In an environment that
has it:

    python -m tests.checkpoint.convert.maxtext_runs

MaxText trains every variant for three steps and saves as it does; `expected.npz` holds tokens and
the logits that MaxText computes from what it loads of the checkpoint.
"""

import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

ARCHIVE = Path(__file__).with_suffix(".tar.xz")
STEPS = 3
SIZES = dict(vocab_size=19, base_emb_dim=4, base_num_query_heads=2, base_num_kv_heads=1, head_dim=4,
             base_mlp_dim=6, base_num_decoder_layers=2, max_target_length=16)  # fmt: skip
QWEN = dict(decoder_block="qwen3", use_qk_norm=True, logits_via_embedding=True,
            normalize_embedding_logits=False, rope_max_timescale=1_000_000)  # fmt: skip
RUNS = {
    "llama": dict(decoder_block="llama2"),
    "llama31": dict(decoder_block="llama2", rope_type="llama3.1", rope_max_timescale=500_000),
    "qwen3": QWEN,
    "gemma": dict(decoder_block="gemma", mlp_activations=["gelu", "linear"],
                  logits_via_embedding=True, normalize_embedding_logits=False,
                  normalization_layer_epsilon=1e-6, scan_layers=False, fused_qkv=True,
                  fused_mlp=True),
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Trains a variant in `folder` and leaves its checkpoint and `expected.npz` there."""
    import jax.numpy as jnp
    import maxtext
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train
    from maxtext.utils import model_creation_utils

    base = Path(maxtext.__file__).parent / "configs/base.yml"
    fields = dict(
        SIZES, base_output_directory=folder, run_name="run", steps=STEPS, per_device_batch_size=2,
        hardware="cpu", skip_jax_distributed_system=True, dataset_type="synthetic",
        dtype="float32", attention="dot_product", learning_rate=1e-2, async_checkpointing=False,
        enable_goodput_recording=False, monitor_goodput=False, normalization_layer_epsilon=1e-5,
        log_config=False,
    ) | RUNS[name]  # fmt: skip
    train.main(["maxtext", str(base), *(f"{k}={v}" for k, v in fields.items())])
    checkpoints = folder / "run/checkpoints"
    newest = max((p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    items = newest / "items"
    fields |= dict(load_parameters_path=items, enable_checkpointing=True)
    config = pyconfig.initialize(["maxtext", str(base), *(f"{k}={v}" for k, v in fields.items())])
    model = model_creation_utils.from_pretrained(config)
    model = model[0] if isinstance(model, tuple) else model
    tokens_BT = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 16)).astype(np.int32)
    positions_BT = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    logits_BTV = model(
        decoder_input_tokens=jnp.asarray(tokens_BT), decoder_positions=jnp.asarray(positions_BT),
        decoder_segment_ids=jnp.ones_like(tokens_BT), enable_dropout=False,
    )  # fmt: skip
    shutil.move(newest, folder / str(STEPS))
    shutil.rmtree(folder / "run")
    logits_BTV = np.asarray(logits_BTV, np.float32)
    np.savez(folder / "expected.npz", tokens=tokens_BT, logits=logits_BTV)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        for name in sys.argv[1:] or RUNS:
            make(name, Path(place) / name)
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            for path in sorted(Path(place).iterdir()):
                archive.add(path, path.name)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main()
