"""The search's pick against meshes that a person would choose: compiled estimates side by side.

Run: `python -m tests.benchmarks.search [--jobs=N] [--keep=N] MODEL …`; 2 to 4 CPU minutes a mesh
the first time, with libtpu and no TPU. Every time is a compiler's estimate.
"""

import sys

from sharding.topology import parse_slice
from trainer.config import parse_flags
from trainer.plan.process import Compilation
from trainer.plan.search import overrides, search

# Config and slice → data, fsdp, seq, tensor, microbatches. Microbatches keep the activations of a
# device alike, as one does by hand.
BY_HAND = {
    "llama3_8b": (
        "v5e-256",
        ((1, 256, 1, 1, 1), (1, 256, 1, 1, 2), (2, 128, 1, 1, 1), (4, 64, 1, 1, 1),
         (16, 16, 1, 1, 1), (1, 128, 2, 1, 1), (1, 64, 4, 1, 1), (1, 128, 1, 2, 2),
         (1, 64, 1, 4, 4), (1, 32, 1, 8, 8), (2, 64, 1, 2, 2), (8, 16, 1, 2, 2)),
    ),
    "ladder:100m": (
        "v5e-16",
        ((1, 16, 1, 1, 1), (16, 1, 1, 1, 1), (4, 4, 1, 1, 1), (2, 8, 1, 1, 1), (8, 2, 1, 1, 1),
         (1, 16, 1, 1, 2), (1, 8, 2, 1, 1), (1, 8, 1, 2, 1), (4, 2, 1, 2, 1), (1, 4, 4, 1, 1),
         (1, 4, 1, 4, 1), (2, 4, 2, 1, 1)),
    ),
    "llama32_1b": (
        "v5p-32",
        ((1, 16, 1, 1, 1), (16, 1, 1, 1, 1), (4, 4, 1, 1, 1), (2, 8, 1, 1, 1), (8, 2, 1, 1, 1),
         (1, 16, 1, 1, 2), (1, 8, 2, 1, 1), (1, 8, 1, 2, 1), (4, 2, 1, 2, 1), (1, 4, 4, 1, 1),
         (1, 4, 1, 4, 1), (2, 4, 2, 1, 1)),
    ),
}  # fmt: skip


def main() -> None:
    numbers = {"jobs": 1, "keep": 8}
    for argument in sys.argv[1:]:
        name, _, value = argument.removeprefix("--").partition("=")
        if name in numbers:
            numbers[name] = int(value)
    models = [a for a in sys.argv[1:] if not a.startswith("--")] or list(BY_HAND)
    for model in models:
        target, best = parse_slice(BY_HAND[model][0]), 0.0
        experiment, _ = parse_flags([f"--config={model}"])
        for *sizes, accumulation in BY_HAND[model][1]:
            axes = zip(("data", "fsdp", "seq", "tensor"), sizes, strict=True)
            flags = [f"--config.mesh.{axis}={size}" for axis, size in axes]
            flags.append(f"--config.train.accumulation={accumulation}")
            one, _ = parse_flags([f"--config={model}", *flags])
            with Compilation(one, target) as compilation:
                _, plan, log = compilation.result()
            if plan is None or not plan.get("fits"):
                need = plan and plan.get("needed")
                print(f"{model} {sizes} {accumulation}: {need and need / 2**30} GiB {log[-200:]}")
                continue
            speed = plan["forecast"]["tokens_per_second"]
            best = max(best, speed)
            print(f"{model} {sizes} {accumulation} {plan['remat']}: {speed:,.0f}", flush=True)
        found = search(experiment, target, numbers["keep"], 3600.0, numbers["jobs"])
        for candidate, plan in found.ranked():
            speed = plan["forecast"]["tokens_per_second"]
            line = overrides(experiment, candidate.experiment)
            print(f"{model} searched: {speed:,.0f} ({speed / best:.3f} of the best by hand) {line}")


if __name__ == "__main__":
    main()
