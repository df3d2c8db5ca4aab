"""The GPU formula against published runs: `python -m tests.benchmarks.gpus` (seconds).

Each row is a run that others published with model, mesh, batch, length and what was kept; the
formula's seconds for the same settings stand beside. No number of the formula was fitted to them.
`transfers` counts, in Torus's own step compiled for 8 CPU devices, how often a layer's tokens cross
the tensor axis: `TRANSFERS` of trainer/plan/analytic.py.
"""

import os
import re
import sys
from dataclasses import replace

from models.presets import PRESETS
from sharding.topology import parse_slice
from trainer.config import Experiment
from trainer.plan.analytic import TRANSFERS, step_seconds
from trainer.plan.forecast import setting_of

MAXTEXT = "NVIDIA/dgxc-benchmarking, maxtext/README_70b.md and configure.sh, release"
TITAN = "pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, table"
CUSTOM = "rotated_qk,v,residual"
NEAREST = "rotated_qk,v,attention,residual"
# model, GPUs, fsdp, rows, length, kept, published seconds a step, source
ROWS = (
    # MaxText's custom policy: q, k, v, output and down projection kept; gate, up, attention again.
    ("llama2-70b", "8x8xH100", 64, 128, 4096, CUSTOM, 6.999, f"{MAXTEXT} v25.01"),
    ("llama2-70b", "16x8xH100", 128, 256, 4096, CUSTOM, 7.072, f"{MAXTEXT} v25.01"),
    # save_qkv_proj: the output projection again too.
    ("llama3-70b", "16x8xH100", 128, 256, 8192, "rotated_qk,v", 15.563, f"{MAXTEXT} v25.02"),
    # 96 GB of HBM2e (2.4 TB/s), held at 500 W; FSDP and torch.compile, tokens/s per GPU published.
    # Selective checkpointing makes every second matmul again: no names of ours are quite that.
    ("llama3-8b", "8xH100", 8, 16, 8192, NEAREST, 16384 / 6667, f"{TITAN} 1"),
    ("llama3-8b", "16x8xH100", 128, 256, 8192, NEAREST, 16384 / 6514, f"{TITAN} 3"),
)  # fmt: skip


def estimate(model: str, name: str, fsdp: int, rows: int, length: int, kept: str) -> float:
    """Returns the formula's seconds of a step."""
    # Not all of them publish in which dtype gradients were reduced: the faster is taken, so that
    # the formula stays a lower bound.
    exp = Experiment(model=replace(PRESETS[model](), remat=kept, reduce_dtype="bfloat16"))
    exp.data.seq_len, exp.train.batch_size = length, rows
    sizes = {"data": 1, "fsdp": fsdp, "seq": 1, "tensor": 1}
    return sum(step_seconds(exp, setting_of(exp, parse_slice(name), sizes)).values())


def compare() -> None:
    print("| run | GPUs, fsdp | rows × tokens per GPU | published s | formula s | ratio | source |")
    print("|---|---|---|---|---|---|---|")
    for *settings, published, source in ROWS:
        model, name, fsdp, rows, length, _ = settings
        seconds = estimate(*settings)
        print(
            f"| {model} | {name}, {fsdp} | {rows // fsdp} × {length:,} | {published:.2f} "
            f"| {seconds:.2f} | {seconds / published:.2f} | {source} |"
        )


def transfers(remat: str) -> int:
    """Returns how many whole arrays of tokens one more layer sends over tensor."""
    import jax

    from configs.quickstart import get_config
    from sharding.mesh import make_mesh
    from trainer.plan.compile import abstract_batch
    from trainer.state import abstract_state, make_layout
    from trainer.step import jit_train_step

    counts = []
    for layers in (3, 4):
        exp = get_config()
        exp.mesh = replace(exp.mesh, fsdp=4, tensor=2)
        exp.model = replace(exp.model, layers=layers, heads=4, kv_heads=4, remat=remat)
        mesh = make_mesh(exp.mesh)
        with jax.set_mesh(mesh):
            layout = make_layout(exp, mesh)
            step, _ = jit_train_step(exp, layout)
            lowered = step.lower(abstract_state(exp, layout), abstract_batch(exp, mesh))
        rows = exp.train.batch_size // 4
        tokens = rf"\[{rows},{exp.data.seq_len},{exp.model.width}\]\S* (all-gather|all-reduce)\("
        counts.append(len(re.findall(tokens, lowered.compile().as_text())))
    return counts[1] - counts[0]


if __name__ == "__main__":
    if sys.argv[1:] == ["transfers"]:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        for remat in ("full", "rotated_qk,v,attention,residual,gate,up"):
            print(f"{remat}: {transfers(remat)}, taken to be {TRANSFERS}")
    else:
        compare()
