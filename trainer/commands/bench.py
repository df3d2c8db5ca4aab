"""`torus bench`: times parts of Torus on the device at hand; so far the backends of attention.

Owns the shapes and masks of the command line, the timing in turns and the table. For a TPU that is
not there the kernels are compiled and counted by models/attention/estimate.py, in a process of its
own.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import product

from sharding.errors import UsageError, nearest
from torus import module_command
from trainer.commands.parser import CommandParser
from trainer.commands.progress import progress

USAGE = """\
usage: torus bench attention [--shape SHAPES] [--mask MASKS] [--backends NAMES] [--dtype TYPE]
                             [--rounds N] [--json]
       torus bench attention --on CHIP [--shape SHAPES] [--mask MASKS] [--json]

Times forward and backward of attention on one device. The backends take turns, so that whatever
else the machine does hits all of them. A line has the median time, the median of the ratios to the
first backend, and the temporary memory by the compiler's own count. Lists have commas.

  --shape SHAPES     rows x tokens x heads x head size; heads may be heads/KV heads (1x1024x8x64)
  --mask MASKS       all, causal, window:N, chunk:N or documents:N, which is N equal ones to a row
                     under a causal mask (causal)
  --backends NAMES   of models/attention/dispatch.py (all that are meant for this device)
  --dtype TYPE       bfloat16, float16 or float32 (bfloat16)
  --rounds N         turns that count; one more goes before them (9)
  --json             one JSON object per line, in seconds and bytes

--on v4, v5e, v5p, v6e or tpu7x estimates the Pallas kernels for one such device that is not there:
the compiler's instruction bundles, counted, in bfloat16 and under causal, window and documents.
Waits for memory are not in it. Needs libtpu; 10 to 60 seconds a line.

  torus bench attention --dtype=float32
  torus bench attention --shape=2x4096x32/8x128,1x32768x32/8x128 --mask=causal,window:1024
  torus bench attention --on=v5e --shape=1x8192x16x128
"""

_DTYPES = ("bfloat16", "float16", "float32")
_MASKS = ("all", "causal", "window", "chunk", "documents")


def main(argv: list[str]) -> int:
    """Prints a line per shape, mask and backend; raises UsageError for what cannot be timed."""
    parser = CommandParser("bench")
    parser.add_argument("subject")
    parser.add_argument("--shape", default="1x1024x8x64")
    parser.add_argument("--mask", default="causal")
    parser.add_argument("--backends")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--on")
    args = parser.parse(argv)
    _choose("benchmark", args.subject, ["attention"])
    _choose("--dtype", args.dtype, _DTYPES)
    if args.rounds < 1:
        raise UsageError(f"--rounds {args.rounds}: at least 1")
    cases = list(product(args.shape.split(","), args.mask.split(",")))
    for shape, mask in cases:
        parse_case(shape, mask)
    if args.on:
        return _estimate(args.on, cases, args)

    from models.attention.dispatch import BACKENDS, target
    from sharding.runtime import start_runtime

    start_runtime()
    here = [backend.name for backend in BACKENDS if backend.platform in (None, target()[0])]
    names = args.backends.split(",") if args.backends else here
    for name in names:
        _choose("--backends on this device", name, here)
    for shape, mask in cases:
        if not args.json:
            print(f"{shape} {args.dtype}, {mask}")
        for record in measure(shape, mask, args.dtype, names, args.rounds):
            head = {"shape": shape, "mask": mask, "dtype": args.dtype}
            print(json.dumps(head | record) if args.json else _line(**record), flush=True)
    return 0


def _estimate(chip: str, cases: list[tuple[str, str]], args: Namespace) -> int:
    """Prints what the kernels would take on an absent chip; returns 3 if the compiler failed."""
    from models.attention.bundles import environment
    from sharding.topology import FAMILIES, require_libtpu

    _choose("--on", chip, tuple(FAMILIES))
    if args.dtype != "bfloat16" or args.backends:
        raise UsageError("--on: estimated are the Pallas kernels in bfloat16")
    shapes = []
    for shape, mask in cases:
        (rows, length, heads, kv_heads, size), name, number = parse_case(shape, mask)
        if name not in ("causal", "window", "documents"):
            raise UsageError(f"--on: `{name}` is not estimated, but causal, window and documents")
        shapes.append({
            "heads": rows * heads, "kv_heads": rows * kv_heads, "length": length,
            "head_dim": size, "window": number if name == "window" else None,
            "documents": [length // number] * number if name == "documents" else [],
        })  # fmt: skip
    require_libtpu()
    request = json.dumps({"chip": chip, "shapes": shapes})
    left = list(cases)
    with (
        tempfile.TemporaryDirectory(prefix="torus-bench-") as folder,
        open(f"{folder}/log", "w+") as log,
        progress(f"compiling for {chip}", len(cases)) as advance,
        subprocess.Popen(
            module_command("models.attention.estimate"), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            env={**os.environ, **environment(f"{folder}/bundles")},
        ) as process,
    ):  # fmt: skip
        try:
            process.stdin.write(request)
            process.stdin.close()
            for line in process.stdout:
                shape, mask = left.pop(0)
                advance(1)
                found = {"on": chip, "shape": shape, "mask": mask, **json.loads(line)}
                print(json.dumps(found) if args.json else _estimated(**found), flush=True)
            if left:
                log.seek(0)
                print(log.read(), "torus: error: compiling failed", sep="\n", file=sys.stderr)
        finally:
            process.kill()  # an interrupted compilation would run to its end first
    return 3 if left else 0


def _estimated(on, shape, mask, seconds=None, share_of_peak=None, refused="") -> str:
    if seconds is None:
        return f"{on} {shape}, {mask}  cannot: {refused}"
    parts = [f"{d} {1e6 * seconds[d]:.0f} us, {share_of_peak[d]:.0%} of peak" for d in seconds]
    return f"{on} {shape}, {mask}  estimated: {'; '.join(parts)}"


def _choose(what: str, value: str, choices: list[str] | tuple[str, ...]) -> None:
    if value not in choices:
        hint = nearest(value, choices)
        raise UsageError(f"{what}: no `{value}`; choose from {', '.join(choices)}{hint}")


def parse_case(shape: str, mask: str) -> tuple[tuple[int, ...], str, int]:
    """Returns (rows, tokens, heads, KV heads, head size), the mask's name and its number, or 1."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:/(\d+))?x(\d+)", shape)
    sizes = [int(size) for size in match.groups(default=match[3])] if match else [0]
    if min(sizes) < 1 or sizes[2] % sizes[3]:
        raise UsageError(
            f"--shape {shape}: write rows x tokens x heads x head size, each above 0, as "
            "1x1024x8x64, or 1x1024x8/2x64 with KV heads, which must divide the heads"
        )
    name, colon, number = mask.partition(":")
    _choose("--mask", name, _MASKS)
    wanted = "" if name in ("all", "causal") else r":0*[1-9]\d*"
    if not re.fullmatch(wanted, colon + number):
        raise UsageError(f"--mask {mask}: write {name}{':256' if wanted else ''}")
    if name == "documents" and sizes[1] % int(number):
        raise UsageError(f"--mask {mask}: does not divide {sizes[1]} tokens")
    return tuple(sizes), name, int(number or 1)


def measure(
    shape: str, mask: str, dtype: str, names: list[str], rounds: int
) -> Iterator[dict[str, object]]:
    """Yields {backend, seconds, ratio, temp_bytes}, or {backend, refused}, which is the reason."""
    import jax

    steps, refused, seconds = {}, {}, {name: [] for name in names}
    with progress(f"{shape} {mask}", len(names) + rounds + 1) as advance:
        for name in names:
            function, arguments = _step(*parse_case(shape, mask), dtype, name)
            try:
                steps[name] = jax.jit(function).lower(*arguments).compile()
            except UsageError as error:
                refused[name] = re.sub(r".*cannot do this call: |; backends that.*", "", str(error))
            advance(1)
        for _ in range(rounds + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                jax.block_until_ready(step(*arguments))
                seconds[name].append(time.perf_counter() - start)
            advance(1)
    for name in names:
        if name in refused:
            yield {"backend": name, "refused": refused[name]}
            continue
        first = seconds[next(iter(steps))]
        ratios = [own / base for own, base in zip(seconds[name], first, strict=True)]
        yield {
            "backend": name,
            "seconds": statistics.median(seconds[name][1:]),
            "ratio": statistics.median(ratios[1:]),
            "temp_bytes": steps[name].memory_analysis().temp_size_in_bytes,
        }


def _step(
    sizes: tuple[int, ...], name: str, number: int, dtype: str, backend: str
) -> tuple[Callable, list]:
    """Returns (a function that makes out and the gradients of q, k and v, its arguments)."""
    import jax
    import jax.numpy as jnp

    from models.attention.dispatch import attention
    from models.attention.mask import Mask

    B, T, N, K, H = sizes
    length = T // number if name == "documents" else T
    mask = Mask(name != "all", **({name: number} if name in ("window", "chunk") else {}))

    def step(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, token_BT):
        positions_BT, segments_BT = token_BT % length, token_BT // length + 1

        def call(q_BTNH, k_BTKH, v_BTKH):
            return attention(
                q_BTNH, k_BTKH, v_BTKH, mask, q_positions_BT=positions_BT,
                k_positions_BS=positions_BT, q_segments_BT=segments_BT, k_segments_BS=segments_BT,
                scale=H**-0.5, rows_aligned=True, one_document=length == T, needs_lse=False,
                backend=backend,
            )[0]  # fmt: skip

        out_BTNH, pull = jax.vjp(call, q_BTNH, k_BTKH, v_BTKH)
        return out_BTNH, *pull(dout_BTNH)

    keys = jax.random.split(jax.random.key(0), 4)
    heads = zip(keys, (N, K, K, N), strict=True)
    arrays = [jax.random.normal(key, (B, T, count, H), dtype) for key, count in heads]
    return step, [*arrays, jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))]


def _line(backend, seconds=0.0, ratio=0.0, temp_bytes=0, refused=None) -> str:
    if refused is not None:
        return f"  {backend:<10} cannot: {refused}"
    return f"  {backend:<10}{1e3 * seconds:10.3f} ms{ratio:8.2f} x{temp_bytes / 2**20:10.1f} MiB"
