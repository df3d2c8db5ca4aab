"""Makes tests/checkpoint/convert/megatron_runs.tar.xz: tiny runs of megatron-core, in both layouts.

Needs what `make test` does not: torch and megatron-core (no GPU, apex or Transformer Engine). In an
environment that has them:

    pip install megatron-core==0.16.1
    python -m tests.checkpoint.convert.megatron_runs FOLDER

Every run is a GPTModel of megatron-core in one or two gloo processes, trained for three steps with
megatron-core's optimizer. `RUN/dist` is what its `dist_checkpointing.save` writes (torch_dist).
`RUN/legacy` has the state dicts of the same modules and optimizers in the files that Megatron-LM
writes, which is no package: layout and arguments are spelled out here. `expected.npz` holds tokens,
the logits, and all tensors of the checkpoint as megatron-core itself loads them, before and after
one more step.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ARCHIVE = Path(__file__).with_suffix(".tar.xz")
STEPS = 3
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1
B, T = 2, 16
BASE = dict(
    num_layers=2, hidden_size=8, num_attention_heads=4, kv_channels=4, ffn_hidden_size=12,
    group_query_attention=False, num_query_groups=1, max_position_embeddings=T, vocab_size=19,
    padded_vocab_size=32, normalization="LayerNorm", norm_epsilon=1e-5, swiglu=False,
    bias_gelu_fusion=True, add_bias_linear=True, add_qkv_bias=False, qk_layernorm=False,
    untie_embeddings_and_output_weights=False, position_embedding_type="rope", rotary_base=10000,
    rotary_percent=1.0, use_rope_scaling=False, rope_scaling_factor=8.0, num_experts=None,
    use_distributed_optimizer=False, bf16=False, data_path=["corpus"], spec=None,
)  # fmt: skip
LLAMA = dict(
    normalization="RMSNorm", swiglu=True, bias_gelu_fusion=False, add_bias_linear=False,
    group_query_attention=True, num_query_groups=2,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Processes of a run, how they share it, and what its arguments change of BASE."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    args: dict = field(default_factory=dict)


RUNS = {
    "llama": Run(2, tensor=2, args=LLAMA | dict(
        untie_embeddings_and_output_weights=True, use_rope_scaling=True, rotary_base=500_000)),
    "qwen": Run(2, args=LLAMA | dict(
        add_qkv_bias=True, qk_layernorm=True, use_distributed_optimizer=True)),
    "bfloat16": Run(2, tensor=2, args=LLAMA | dict(bf16=True)),
    "gpt2": Run(1, args=dict(position_embedding_type="learned_absolute")),
    "neox": Run(2, pipeline=2, args=dict(
        untie_embeddings_and_output_weights=True, rotary_percent=0.5, bias_gelu_fusion=False)),
}  # fmt: skip


def on_cpu():
    """Returns a context in which what megatron-core asks of the GPU is done on the CPU."""
    import torch
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if str(kwargs.get("device")) == "cuda":
                kwargs["device"] = "cpu"
            if function is torch.Tensor.cuda:
                return args[0]
            made = function(*args, **kwargs)
            is_name = function is torch.Tensor.type and len(args) == 1
            return made.replace("torch.", "torch.cuda.") if is_name else made

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    # There is no dropout, so nothing is drawn.
    CudaRNGStatesTracker.fork = lambda self, *_: contextlib.nullcontext()
    return Mode()


def make_model(args: argparse.Namespace, run: Run):
    """Returns this process's part of the model."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    functional = torch.nn.functional
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, kv_channels=args.kv_channels,
        num_attention_heads=args.num_attention_heads, ffn_hidden_size=args.ffn_hidden_size,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        normalization=args.normalization, layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=functional.silu if args.swiglu else functional.gelu,
        add_bias_linear=args.add_bias_linear, add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm, bias_activation_fusion=args.bias_gelu_fusion,
        hidden_dropout=0.0, attention_dropout=0.0, bf16=args.bf16, params_dtype=dtype,
        pipeline_dtype=dtype, use_cpu_initialization=True,
        tensor_model_parallel_size=run.tensor, pipeline_model_parallel_size=run.pipeline,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(
        qk_layernorm=args.qk_layernorm, normalization=args.normalization
    )
    model = GPTModel(
        config, spec, args.padded_vocab_size, args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type, rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent, rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
    )  # fmt: skip
    generator = torch.manual_seed(2)  # norms and biases away from neutral
    for _, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def logits_of(model, rows) -> np.ndarray | None:
    """Returns all logits, in the process that has the last stage."""
    import torch
    from megatron.core import parallel_state

    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            hidden = torch.empty(T, B, model.config.hidden_size)
            torch.distributed.recv(hidden, 0)
            model.set_input_tensor(hidden)
        found = model(*rows)
        if not parallel_state.is_pipeline_last_stage():
            return torch.distributed.send(found, 1)
        group = parallel_state.get_tensor_model_parallel_group()
        parts = [torch.empty_like(found) for _ in range(group.size())]
        torch.distributed.all_gather(parts, found.contiguous(), group=group)
        return torch.cat(parts, -1).float().numpy()


def step(model, optimizer, rows) -> None:
    """Takes one step on the mean loss of the next tokens."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    model(*rows, labels=rows[0].roll(-1, 1))[:, :-1].mean().backward()
    model.finish_grad_sync()
    assert optimizer.step()[0]


def random_states() -> list[dict]:
    import torch

    return [{"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
             "torch_rng_state": torch.get_rng_state(), "cuda_rng_state": torch.get_rng_state(),
             "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()}}]  # fmt: skip


def save_dist(folder: Path, common: dict, model, optimizer) -> dict[str, np.ndarray]:
    """Saves as megatron-core does; returns every tensor as megatron-core loads it."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    ranks = (parallel_state.get_pipeline_model_parallel_rank(),
             parallel_state.get_tensor_model_parallel_rank())  # fmt: skip
    sizes = (parallel_state.get_pipeline_model_parallel_world_size(),
             parallel_state.get_tensor_model_parallel_world_size())  # fmt: skip
    replica = parallel_state.get_data_parallel_rank()
    metadata = {"chained_optim_avoid_prefix": True}
    if common["args"].use_distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = common | {
        "model": model.sharded_state_dict(metadata=metadata),
        "rng_state": ShardedObject("rng_state", random_states(), sizes, ranks, replica_id=replica),
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata)
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))
    torch.distributed.barrier()
    found = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: tensor.float().numpy() for name, tensor in found.items()
            if isinstance(tensor, torch.Tensor)}  # fmt: skip


def save_legacy(folder: Path, common: dict, model, optimizer, run: Run) -> None:
    """Saves this process's part as Megatron-LM does with `--ckpt-format torch`."""
    import torch
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if run.pipeline > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    state = common | {
        "model": model.state_dict_for_save_checkpoint(),
        "rng_state": random_states(),
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    if parallel_state.get_data_parallel_rank() == 0:
        (folder / name).mkdir(parents=True)
        torch.save(state, folder / name / "model_optim_rng.pt")


def train(name: str, folder: Path) -> None:
    """One process of a run."""
    import torch

    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    run = RUNS[name]
    args = argparse.Namespace(
        **BASE | run.args, tensor_model_parallel_size=run.tensor,
        pipeline_model_parallel_size=run.pipeline, params_dtype=torch.float32,
    )  # fmt: skip
    common = {"args": args, "checkpoint_version": 3.0, "iteration": STEPS}
    with on_cpu():
        parallel_state.initialize_model_parallel(run.tensor, run.pipeline)
        torch.manual_seed(0)
        model, optimizer = make_model(args, run), None
        tokens = torch.randint(0, args.vocab_size, (B, T), generator=torch.manual_seed(1))
        rows = tokens, torch.arange(T).expand(B, T), torch.ones(1, 1, T, T).tril() < 0.5
        if run.pipeline == 1:
            sharing = dict(use_distributed_optimizer=args.use_distributed_optimizer)
            parallel = DistributedDataParallel(
                model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, **sharing),
                model,
            )  # fmt: skip
            settings = OptimizerConfig(
                lr=LR, weight_decay=DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_eps=EPS,
                clip_grad=0.0, bf16=args.bf16, params_dtype=model.config.params_dtype, **sharing,
            )  # fmt: skip
            optimizer = get_megatron_optimizer(settings, [parallel])
            scheduler = OptimizerParamScheduler(
                optimizer, init_lr=LR, max_lr=LR, min_lr=LR, lr_warmup_steps=0, lr_decay_steps=9,
                lr_decay_style="constant", start_wd=DECAY, end_wd=DECAY, wd_incr_steps=0,
                wd_incr_style="constant",
            )  # fmt: skip
            for _ in range(STEPS):
                step(parallel, optimizer, rows)
            common["opt_param_scheduler"] = scheduler.state_dict()
        tag = f"iter_{STEPS:07d}"
        before = save_dist(folder / "dist" / tag, common, model, optimizer)
        save_legacy(folder / "legacy" / tag, common, model, optimizer, run)
        logits_BTV, after = logits_of(model, rows), {}
        if optimizer is not None:
            step(parallel, optimizer, rows)
            after = save_dist(folder / "after", common, model, optimizer)
        if logits_BTV is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            arrays = {f"before/{n}": a for n, a in before.items()} | {
                f"after/{n}": a for n, a in after.items()}  # fmt: skip
            np.savez(folder / "expected.npz", tokens=tokens.numpy(), logits=logits_BTV, **arrays)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def make(folder: Path) -> None:
    import megatron.core

    for name, run in RUNS.items():
        environment = os.environ | {"WORLD_SIZE": str(run.world), "MASTER_ADDR": "localhost",
                                    "MASTER_PORT": "29731", "OMP_NUM_THREADS": "1"}  # fmt: skip
        command = [sys.executable, "-m", "tests.checkpoint.convert.megatron_runs"]
        running = [subprocess.Popen([*command, str(folder / name), name],
                                    env=environment | {"RANK": str(r)})
                   for r in range(run.world)]  # fmt: skip
        if any([process.wait() for process in running]):
            raise SystemExit(f"{name} failed")
        for layout in ("dist", "legacy"):
            pointer = folder / name / layout / "latest_checkpointed_iteration.txt"
            pointer.write_text(str(STEPS))
    (folder / "version.txt").write_text(megatron.core.__version__)
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "after" not in path.parts:
                info = tarfile.TarInfo(str(path.relative_to(folder)))
                info.size = path.stat().st_size
                with path.open("rb") as file:
                    archive.addfile(info, file)


if __name__ == "__main__":
    place, *name = sys.argv[1:]
    train(*name, Path(place)) if name else make(Path(place))
