"""Attention kernels for TPUs that are not there: estimates from bundle counts, and memory.

    python -m tests.benchmarks.attention_tpu compare [CHIP ...] [--shape=TEXT] [--results=FILE]
    python -m tests.benchmarks.attention_tpu tune [CHIP ...] [--head=SIZE] [--results=FILE]
    python -m tests.benchmarks.attention_tpu memory

compare: Torus beside splash (its backward fused and split), flash and, where it is installed,
tokamax (Python 3.12), each at the best of several block sizes per direction, at five shapes or
those whose name has TEXT. tune: the candidates for models/attention/blocks.py. memory: temporaries
of both passes at 131,072 tokens. FILE keeps what was compiled, so that a run can be continued.

Every figure is made on a CPU by libtpu's compiler: cycles = sum over the parts of the grid loop of
bundles times how often the part runs, a body counting at least what its products keep the matrix
units busy. Memory waits and stalls are not counted; nothing here was timed on a TPU.
"""

# ruff: noqa: I001 (the first import sets the environment that JAX reads)

from tests.benchmarks import absent_tpu
import sys
from functools import partial

from models.attention import blocks as table
from models.attention.estimate import DIRECTIONS, SLICES, Shape, compile_torus, estimate
from tests.benchmarks import attention_peers
from tests.benchmarks.absent_tpu import SHAPES, Results


def torus(chip: str, shape: Shape, directions: tuple[str, ...] = DIRECTIONS) -> dict[str, float]:
    """Returns seconds of the forward and of the backward kernel."""
    return estimate(chip, shape, absent_tpu.DUMP, directions)


def compare(chips: list[str], only: str, results: Results) -> None:
    for chip in chips:
        for shape in (shape for shape in SHAPES if only in str(shape)):
            ours = results.get(f"{chip} {shape} torus", partial(torus, chip, shape))
            both = sum(ours.values())
            print(f"{chip} {shape}: {1e6 * ours['forward']:.0f} us, both {1e6 * both:.0f} us")
            for name, measure, candidates in attention_peers.peers(shape):
                found = [
                    results.get(
                        f"{chip} {shape} {name} {sizes}", partial(measure, chip, shape, sizes)
                    )
                    for sizes in candidates
                ]
                parts = [part for part in found if part]
                if not parts:
                    print(f"    {name}: compiles at none of its block sizes")
                    continue
                forward, backward = (min(p[d] for p in parts) for d in ("forward", "backward"))
                print(
                    f"    {name}: {forward / ours['forward']:.2f} x Torus, "
                    f"both {(forward + backward) / both:.2f} x",
                    flush=True,
                )


CANDIDATES = {
    "forward": [(b, s, r, c) for b in (1024, 2048) for s in (256, 512) for r in (256, 512, 1024)
                for c in (512, 1024)],
    "backward": [(b, s, r, c) for b in (1024,) for s in (256, 512) for r in (256, 512, 1024)
                 for c in (256, 512)],
}  # fmt: skip


def tune(chips: list[str], head_dim: int, results: Results) -> None:
    """Prints every candidate, best first, beside the table's entry."""
    for chip in chips:
        for direction, candidates in CANDIDATES.items():
            key = chip, direction, table.limit_of(head_dim)
            entry, found = table.TABLE[key], {}
            for sizes in dict.fromkeys((entry, *candidates)):
                table.TABLE[key] = sizes
                shape = Shape(8, 8, 4096, head_dim)
                name = f"{chip} {shape} {direction} {sizes}"
                if parts := results.get(name, partial(torus, chip, shape, (direction,))):
                    found[sizes] = parts[direction]
            table.TABLE[key] = entry
            for sizes in sorted(found, key=found.get):
                ratio = found[sizes] / found[entry] if entry in found else float("nan")
                mark = " in the table" if sizes == entry else ""
                print(f"{key} {sizes}: {1e6 * found[sizes]:.0f} us, {ratio:.3f}{mark}", flush=True)


def memory() -> None:
    for auto_layout in (True, False):
        shape = Shape(16, 16, 131_072)
        analysis = compile_torus("v5e", shape, "both", auto_layout).memory_analysis()
        layout = "chosen by the compiler" if auto_layout else "(batch, token, head, size)"
        print(
            f"v5e {shape}, arguments laid out {layout}: "
            f"{analysis.temp_size_in_bytes / 2**30:.2f} GiB of temporaries"
        )


def main(arguments: list[str]) -> int:
    command, *rest = arguments or ["help"]
    options = dict(option.removeprefix("--").split("=") for option in rest if "=" in option)
    chips = [word for word in rest if not word.startswith("--")] or list(SLICES)
    results = Results(options.get("results", ""))
    if command == "compare":
        compare(chips, options.get("shape", ""), results)
    elif command == "tune":
        tune(chips, int(options.get("head", "128")), results)
    elif command == "memory":
        memory()
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
