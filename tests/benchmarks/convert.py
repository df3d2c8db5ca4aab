"""Memory and speed of `torus convert` on a synthetic model, both ways, beside `cp`.

    python -m tests.benchmarks.convert --gib 2 --rounds 2
    python -m tests.benchmarks.convert --gib 1 --rounds 2 --maxtext PYTHON
    python -m tests.benchmarks.convert --gib 1 --bucket

Prints the peak of resident memory above the imports, the limit of 1.5 × the largest tensor +
300 MB, and the time as a multiple of `cp` and `sync` of the source's files, taken in turns. A
conversion writes and reads back; `cp` only writes. Nothing is deleted between rounds: freed memory
goes back to the host of a virtual machine, and getting it again takes seconds for each GiB.

With --maxtext, the interpreter of an environment that has MaxText, its own converter takes turns
with ours on the same folder instead: seconds of the whole process and its largest resident memory,
imports included on both sides.

With --bucket, seconds of each way to and from a stand-in for a bucket that answers every request
after 80 ms.
"""

import argparse
import dataclasses
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHILD = """
import json, sys
from trainer.commands.main import main
import trainer.commands.convert, checkpoint.convert.native, checkpoint.convert.engine, rich.progress
import jax, numpy
jax.numpy.zeros(1)

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
status = main(sys.argv[1:])
print(json.dumps({"status": status, "peak": memory("VmHWM") - before}))
"""

# MaxText knows models by name: its Llama 3.1 is given the sizes of the folder. No network is asked.
MAXTEXT = """
import json, sys
from pathlib import Path
import jax, maxtext
jax.config.update("jax_default_prng_impl", "unsafe_rbg")
from maxtext.checkpoint_conversion import to_maxtext
from maxtext.checkpoint_conversion.utils.hf_model_configs import HF_MODEL_CONFIGS

source, target, devices = sys.argv[1:]
config = json.loads((Path(source) / "config.json").read_text())
HF_MODEL_CONFIGS["llama3.1-8b"].update({k: config[k] for k in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim")})
sizes = dict(vocab_size=config["vocab_size"], base_emb_dim=config["hidden_size"],
    base_mlp_dim=config["intermediate_size"], base_num_decoder_layers=config["num_hidden_layers"],
    base_num_query_heads=config["num_attention_heads"], head_dim=config["head_dim"],
    base_num_kv_heads=config["num_key_value_heads"])
fields = dict(sizes, model_name="llama3.1-8b", override_model_config=True, scan_layers=True,
    base_output_directory=target, run_name="run", hardware="cpu", skip_jax_distributed_system=True)
base = Path(maxtext.__file__).parent / "configs/base.yml"
to_maxtext.main(["", str(base), *(f"{k}={v}" for k, v in fields.items())],
    hf_model_path=source, simulated_cpu_devices_count=int(devices))
"""


def make_source(folder: Path, gib: float, vocab: int = 128256) -> int:
    """Writes a Llama of about `gib` GiB in bfloat16; returns the bytes of its largest tensor."""
    import ml_dtypes

    from checkpoint.convert import huggingface
    from checkpoint.convert.families import find_family
    from checkpoint.convert.mapping import to_theirs
    from checkpoint.convert.safetensors import Tensors
    from models.presets import PRESETS

    model = dataclasses.replace(PRESETS["llama3.2-1b"](), tie_embeddings=False, vocab=vocab)
    per_layer = 2 * (2048 * 2048 * 2 + 2 * 2048 * 512 + 3 * 2048 * 8192)
    head = 2 * 2 * vocab * 2048
    layers = max(1, round((gib * 2**30 - head) / per_layer))
    model = dataclasses.replace(model, layers=layers)
    family = find_family("llama")
    sizes = family.sizes(model)
    kind = np.dtype(ml_dtypes.bfloat16)
    entries = [
        (e.name, kind, e.shape) for row in family.rows_for(model) for e in to_theirs(row, sizes)
    ]
    folder.mkdir()
    files: Tensors = huggingface.create_folder(folder, family.write(model), entries, 5 * 10**9)
    rng = np.random.default_rng(0)
    for name, _, shape in entries:
        files.put(name, (), rng.integers(0, 2**16, shape, np.uint16).view(kind))
    files.close()
    return max(2 * int(np.prod(shape)) for _, _, shape in entries)


def convert(*arguments: str) -> tuple[float, int]:
    """Returns (seconds, peak bytes above the imports) of one conversion in a fresh process."""
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD, "convert", *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds = time.perf_counter() - start
    facts = json.loads(out.splitlines()[-1])
    assert facts["status"] == 0, out
    return seconds, facts["peak"]


def whole(command: list[str], **environment: str) -> tuple[float, int]:
    """Returns (seconds, largest resident bytes) of a process, imports and all."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **environment}
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            log.seek(0)
            raise RuntimeError(log.read().decode()[-3000:])
    return time.perf_counter() - start, used.ru_maxrss * 1024


def beside_maxtext(folder: Path, python: str, devices: int) -> None:
    """Converts the folder by both, in turns, and prints what it took."""
    ours = [sys.executable, "-m", "trainer.commands.main", "convert"]
    theirs = [python, "-c", MAXTEXT, f"{folder}/hf", f"{folder}/maxtext", str(devices)]
    flags = f"--xla_force_host_platform_device_count={devices}"
    for name, found in (
        ("ours", whole([*ours, f"{folder}/hf", f"torus:{folder}/start"])),
        ("MaxText's", whole(theirs, XLA_FLAGS=flags, JAX_PLATFORMS="cpu", PYTHONPATH="")),
    ):
        print(f"  {name}: {found[0]:.1f} s, {found[1] / 1e6:.0f} MB")
    shutil.rmtree(folder / "start")
    shutil.rmtree(folder / "maxtext")


def with_bucket(folder: Path) -> None:
    """Converts to a bucket, from there and back into it, verifies, and prints the seconds."""
    from tests.buckets import google

    with google() as store:
        store.buckets["bucket"], store.pause = {}, 0.08
        store.fill("bucket", folder)
        place = {"TENSORSTORE_GCS_HTTP_URL": store.url, "TORUS_CACHE": f"{folder}/cache"}
        for arguments in (
            ["convert", "gs://bucket/hf", f"torus:{folder}/start"],
            ["convert", f"{folder}/hf", "torus:gs://bucket/start"],
            ["verify", "gs://bucket/start"],
            ["convert", "gs://bucket/start", f"hf:{folder}/out"],
            ["convert", f"{folder}/start", "hf:gs://bucket/out"],
        ):
            seconds, _ = whole([sys.executable, "-m", "trainer.commands.main", *arguments], **place)
            print(f"  {seconds:.1f} s: {' '.join(arguments).replace(str(folder), '')}")


def copy(source: Path, target: Path) -> float:
    """Returns the seconds of `cp` of a folder, until the bytes are on the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", "-f", target], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", default=None, help="needs 1 + 3 × rounds times GIB")
    parser.add_argument("--maxtext", default=None, help="a Python that has MaxText")
    parser.add_argument("--bucket", action="store_true", help="a stand-in for one, 80 ms away")
    parser.add_argument("--devices", type=int, default=16, help="that MaxText simulates (its 16)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        folder = Path(work)
        largest = make_source(
            folder / "hf", args.gib, 32_768 if args.maxtext or args.bucket else 128_256
        )
        size = sum(p.stat().st_size for p in (folder / "hf").iterdir())
        limit = 1.5 * largest + 300e6
        print(
            f"{size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, limit {limit / 1e6:.0f}"
        )
        if args.bucket:
            return with_bucket(folder)
        for _ in range(args.rounds if args.maxtext else 0):
            beside_maxtext(folder, args.maxtext, args.devices)
        for n in range(0 if args.maxtext else args.rounds):
            base = copy(folder / "hf", folder / f"copy{n}")
            there = convert(f"{folder}/hf", f"torus:{folder}/start{n}")
            back = convert(f"{folder}/start{n}", f"hf:{folder}/out{n}")
            same = all(
                filecmp.cmp(p, folder / f"out{n}" / p.name, shallow=False)
                for p in (folder / "hf").glob("*.safetensors")
            )
            print(f"cp {base:.1f} s ({size / base / 1e6:.0f} MB/s); bytes equal: {same}")
            for way, (seconds, peak) in (("to torus", there), ("to hf", back)):
                print(
                    f"  {way}: {seconds:.1f} s, {seconds / base:.2f} × cp, peak {peak / 1e6:.0f} MB"
                )


if __name__ == "__main__":
    main()
