"""Our train step and MaxText's, compiled for the same TPU slices and read by the same walk.

Run in an environment that has MaxText and libtpu, so that JAX and the compiler are the same:
`PYTHONPATH=. MAXTEXT/bin/python -m tests.benchmarks.maxtext_plan [SHAPE …]` (how to make it:
step_cpu.py). 2 to 4 CPU minutes a program. Every time is a compiler's estimate.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from sharding.topology import compiler_environment, parse_slice
from trainer.config import Experiment, parse_flags
from trainer.plan.compile import parse_refusal
from trainer.plan.cost import time_step
from trainer.plan.forecast import setting_of
from trainer.plan.hlo import parse
from trainer.plan.process import Compilation

ONE_B = {"width": 2048, "layers": 16, "heads": 16, "kv_heads": 8, "head_dim": 128, "mlp": 8192,
         "vocab": 32768}  # fmt: skip
# Shape → slice, rows of a chip, their length, our config, MaxText's name of the model.
SHAPES = {
    "1b": ("v5e-16", 4, 2048, "llama3_8b", "default"),
    "llama2-7b": ("v5e-256", 1, 2048, "llama2_7b", "llama2-7b"),
    "llama3-8b": ("v5e-256", 1, 2048, "llama3_8b", "llama3-8b"),
    "llama3-8b-v5p": ("v5p-128", 4, 2048, "llama3_8b", "llama3-8b"),
    "llama3-8b-v5p-8k": ("v5p-128", 2, 8192, "llama3_8b", "llama3-8b"),
}
# All that MaxText can keep for the backward pass so that no matmul is made twice; then less.
ATTENTION = ("query_proj", "key_proj", "value_proj", "context")
NAMES = {
    "all": (*ATTENTION, "out_proj", "mlpwi_0", "mlpwi_1"),
    "attention": (*ATTENTION, "out_proj"),
    "nothing": (),
}


def ours(shape: str) -> Experiment:
    name, rows, length, config, _ = SHAPES[shape]
    batch = rows * parse_slice(name).devices
    flags = [f"--config={config}", f"--config.data.seq_len={length}"]
    flags.append(f"--config.train.batch_size={batch}")
    if shape == "1b":
        flags += [f"--config.model.{field}={value}" for field, value in ONE_B.items()]
    return parse_flags(flags)[0]


def theirs(shape: str, kept: str, options: dict[str, str], folder: str) -> tuple[dict, str]:
    """Returns the answer of peers/maxtext_plan.py and the program's text."""
    name, rows, length, _, model = SHAPES[shape]
    keys = [f"compile_topology={name}", f"per_device_batch_size={rows}"]
    keys += [f"max_target_length={length}", f"model_name={model}"]
    if shape == "1b":
        fields = ("base_emb_dim", "base_num_decoder_layers", "base_num_query_heads",
                  "base_num_kv_heads", "head_dim", "base_mlp_dim", "vocab_size")  # fmt: skip
        keys += [f"{f}={value}" for f, value in zip(fields, ONE_B.values(), strict=True)]
    if NAMES[kept]:
        keys += ["remat_policy=custom", *(f"{tensor}=device" for tensor in NAMES[kept])]
    if options:  # nothing at all is no text to MaxText
        written = " ".join(f"--{option}={value}" for option, value in options.items())
        keys.append(f"compile_xla_flags={written}")
    program = Path(folder, "program.gz")
    script = Path(__file__).with_name("peers") / "maxtext_plan.py"
    done = subprocess.run(
        [sys.executable, script, json.dumps({"program": str(program), "keys": keys})],
        env={**os.environ, **compiler_environment()}, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"MaxText failed: {done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer, gzip.open(program, "rt").read() if "error" not in answer else ""


def row(what: str, seconds: dict[str, float], peak: float) -> None:
    times = " | ".join(f"{seconds[model]:.3f}" for model in ("roofline", "estimate", "cycles"))
    print(f"| {what} | {times} | {peak / 2**30:.2f} |", flush=True)


def main() -> None:
    for shape in sys.argv[1:] or SHAPES:
        experiment, target = ours(shape), parse_slice(SHAPES[shape][0])
        with Compilation(experiment, target) as compilation:
            _, plan, log = compilation.result()
        if plan is None or "refused" in plan:
            raise SystemExit(str(plan or log[-2000:]))
        print(f"\n{shape}, {SHAPES[shape][:3]}, {plan['versions']}, {plan['mesh']}")
        row(f"Torus, {plan['remat']}", plan["forecast"]["seconds"], plan["needed"])
        setting = setting_of(experiment, target, plan["mesh"])
        with tempfile.TemporaryDirectory() as folder:
            for kept, flags in (("nothing", False), ("all", True), ("all", False),
                                ("nothing", True), ("attention", True)):  # fmt: skip
                what = f"MaxText, {kept} kept{', our options' * flags}"
                answer, text = theirs(shape, kept, plan["options"] if flags else {}, folder)
                if "error" in answer:
                    need = parse_refusal(answer["error"])
                    said = f"{need[0] / 2**30:.2f} GiB" if need else answer["error"][:300]
                    print(f"| {what} | refused: {said}", flush=True)
                    continue
                timing = time_step(parse(text), replace(setting, mesh=answer["mesh"]))
                row(what, timing.seconds, answer["peak"])
                for note in timing.notes:
                    print(f"  ({note})")


if __name__ == "__main__":
    main()
