"""Compiles MaxText's train step for a TPU slice that is not there; run with MaxText's own Python.

`python maxtext_plan.py '{"program": FILE, "keys": ["compile_topology=v5e-256", …]}'` runs MaxText's
`train_compile` with these keys, keeps the program's text in FILE (gzipped) and ends with one JSON
line: mesh and peak bytes, or the compiler's error.
"""

import gzip
import json
import sys
from typing import NoReturn

KEYS = (
    "run_name=plan", "base_output_directory=plan", "enable_checkpointing=false",
    "dataset_type=synthetic", "compile_topology_num_slices=1",
)  # fmt: skip


def main() -> None:
    job = json.loads(sys.argv[1])
    import jax
    from maxtext.trainers.pre_train import train_compile

    whole = train_compile.jit_and_compile

    def kept(function, arguments, named, mesh, *rest):
        try:
            compiled = whole(function, arguments, named, mesh, *rest)
        except jax.errors.JaxRuntimeError as error:
            finish({"error": str(error)})
        with gzip.open(job["program"], "wt") as file:
            file.write(compiled.as_text())
        peak = compiled.memory_analysis().peak_memory_in_bytes
        finish({"mesh": dict(mesh.shape), "peak": peak})

    train_compile.jit_and_compile = kept
    train_compile.main(["", *KEYS, *job["keys"]])


def finish(answer: dict) -> NoReturn:
    """What MaxText would do with a compiled program is not needed."""
    print(json.dumps(answer), flush=True)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
