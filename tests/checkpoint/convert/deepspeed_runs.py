"""Makes tests/checkpoint/convert/deepspeed_runs.tar.xz, and checks that DeepSpeed reads our UCP.

Needs what `make test` does not: torch, transformers and deepspeed (a source package; no kernels are
built). In an environment that has them:

    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8
    python -m tests.checkpoint.convert.deepspeed_runs make FOLDER           # the archive
    python -m tests.checkpoint.convert.deepspeed_runs check UCP EXPECTED.npz

`make` trains a tiny Llama for three steps per run (ZeRO 1, 2, 3; two and three gloo processes, the
same batch in each; one run in bfloat16), saves, and takes one step more. Beside each run lie
`expected.npz` (logits, batch, the parameters after that step) and DeepSpeed's own universal
checkpoint of it, which is its reading of the weights and moments. `check` lets DeepSpeed load a
universal checkpoint that `torus convert` wrote, at every stage, take that step, and compares.
"""

import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

ARCHIVE = Path(__file__).with_suffix(".tar.xz")
RUNS = {f"zero{stage}_world{world}": (stage, world, "float32")
        for stage, world in itertools.product((1, 2, 3), (2, 3))}  # fmt: skip
RUNS["zero1_world2_bfloat16"] = (1, 2, "bfloat16")
STEPS = 3
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1
SIZES = dict(vocab_size=19, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
             num_key_value_heads=1, intermediate_size=12, max_position_embeddings=32,
             tie_word_embeddings=False, rms_norm_eps=1e-6)  # fmt: skip


def start(stage: int, dtype: str = "float32", *, universal: bool = False):
    """Returns a DeepSpeed engine of the tiny model, two parameter groups, and its batch."""
    import deepspeed
    import torch
    import transformers

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    named = list(model.named_parameters())
    groups = [{"params": [p for _, p in named if p.ndim > 1], "weight_decay": DECAY},
              {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "sub_group_size": 600},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": dtype == "bfloat16"},
        "checkpoint": {"load_universal": universal},
    }  # fmt: skip
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    batch = torch.randint(0, SIZES["vocab_size"], (2, 16), generator=torch.manual_seed(1))
    return engine, batch


def step(engine, batch) -> np.ndarray:
    """Takes one step on the mean loss of the next tokens; returns the logits before it."""
    import torch

    logits = engine(batch).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1),
                                             batch[:, 1:].flatten())  # fmt: skip
    engine.backward(loss)
    engine.step()
    return logits.detach().float().numpy()


def whole(engine) -> dict[str, np.ndarray]:
    """Returns the float32 parameters by name."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {n: safe_get_full_fp32_param(p).numpy().copy()
            for n, p in engine.module.named_parameters()}  # fmt: skip


def train(name: str, folder: str) -> None:
    stage, _, dtype = RUNS[name]
    engine, batch = start(stage, dtype)
    for _ in range(STEPS):
        step(engine, batch)
    state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
    engine.save_checkpoint(folder, client_state=state)
    logits = step(engine, batch)
    after = whole(engine)
    if engine.global_rank == 0:
        np.savez(Path(folder) / "expected.npz", logits=logits, batch=batch.numpy(), **after)
        config = engine.module.config.to_dict()
        (Path(folder) / "config.json").write_text(json.dumps(config))


def load(stage: str, ucp: str, out: str) -> None:
    engine, batch = start(int(stage), universal=True)
    engine.load_checkpoint(ucp, load_lr_scheduler_states=False)
    before = whole(engine)
    logits = step(engine, batch)
    after = whole(engine)
    if engine.global_rank == 0:
        arrays = {f"before/{n}": a for n, a in before.items()} | {
            f"after/{n}": a for n, a in after.items()}  # fmt: skip
        np.savez(out, logits=logits, steps=engine.global_steps, **arrays)


def spawn(world: int, *arguments: str) -> None:
    """Runs this module in `world` processes."""
    environment = os.environ | {
        "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": "29617",
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(world),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.checkpoint.convert.deepspeed_runs", *arguments]
    running = [subprocess.Popen(command, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)})
               for r in range(world)]  # fmt: skip
    if any([process.wait() for process in running]):
        raise SystemExit(f"{arguments} failed")


def make(folder: str) -> None:
    import deepspeed
    import torch
    import transformers

    for name, (_, world, _) in RUNS.items():
        spawn(world, "train", name, f"{folder}/{name}")
        tag = f"{folder}/{name}/global_step{STEPS}"
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        subprocess.run([*convert, "--input_folder", tag, "--output_folder", f"{tag}_universal",
                        "--num_extract_workers", "1", "--num_merge_workers", "1"],
                       check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})  # fmt: skip
    versions = {m.__name__: m.__version__ for m in (deepspeed, torch, transformers)}
    (Path(folder) / "versions.json").write_text(json.dumps(versions))
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.suffix != ".py":
                info = tarfile.TarInfo(str(path.relative_to(folder)))
                info.size = path.stat().st_size
                with path.open("rb") as file:
                    archive.addfile(info, file)


def check(ucp: str, out: str) -> None:
    """Loads a universal checkpoint at each stage; prints what differs from the run it came from."""
    source = np.load(Path(out))  # expected.npz of the run
    for stage, world in itertools.product((1, 2, 3), (1, 2)):
        spawn(world, "load", str(stage), ucp, f"{out}.loaded.npz")
        found = np.load(f"{out}.loaded.npz")
        names = [n for n in source.files if n not in ("logits", "batch")]
        step = max(float(np.abs(source[n] - found[f"after/{n}"]).max()) for n in names)
        logits = float(np.abs(source["logits"] - found["logits"]).max())
        print(f"stage {stage} world {world}: steps {found['steps']}, logits differ by "
              f"{logits:.2g}, parameters after one step by {step:.2g}")  # fmt: skip


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    {"make": make, "train": train, "load": load, "check": check}[command](*rest)
