"""Times MaxText's own training loop at given dimensions; run by MaxText's Python, not by ours.

`python maxtext_step.py '{"size": {...}, "dtype": "float32", "remat": "full", "steps": 8}'` prints
one JSON line with the wall and processor seconds of every step. Times are taken where MaxText
reports a step complete: the seconds that it prints itself measure dispatch for the first steps.
"""

import itertools
import json
import logging
import os
import sys
import tempfile
import time

WARM_UP = 3  # intervals not counted: compilation, and the steps that were queued behind it


class StepClock(logging.Handler):
    """Notes wall and processor time whenever a step is reported complete."""

    def __init__(self) -> None:
        super().__init__()
        self.wall: list[float] = []
        self.processor: list[float] = []
        self.loss = float("nan")

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("completed step"):
            self.wall.append(time.perf_counter())
            self.processor.append(time.process_time())
            self.loss = float(message.split("loss: ")[1].split(",")[0])


def arguments(job: dict, folder: str) -> list[str]:
    """Returns MaxText's command line for one job."""
    size = job["size"]
    return [
        "train",
        "run_name=benchmark",
        f"base_output_directory={folder}",
        "hardware=cpu",
        "skip_jax_distributed_system=true",
        "enable_checkpointing=false",
        "dataset_type=synthetic",
        f"steps={job['steps'] + WARM_UP + 1}",
        f"per_device_batch_size={size['batch']}",
        f"max_target_length={size['seq']}",
        f"base_emb_dim={size['width']}",
        f"base_num_query_heads={size['heads']}",
        f"base_num_kv_heads={size['heads']}",
        f"head_dim={size['head_dim']}",
        f"base_mlp_dim={size['mlp']}",
        f"base_num_decoder_layers={size['layers']}",
        f"vocab_size={size['vocab']}",
        f"dtype={job['dtype']}",
        f"remat_policy={job['remat']}",
    ]


def main() -> None:
    job = json.loads(sys.argv[1])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"
    from absl import app
    from absl import logging as absl_logging
    from maxtext.trainers.pre_train import train

    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:

        def run(argv: list[str]) -> None:
            absl_logging.set_verbosity(absl_logging.INFO)
            absl_logging.get_absl_logger().addHandler(clock)
            train.main(argv)

        try:
            app.run(run, argv=arguments(job, folder))
        except SystemExit as end:
            if end.code:
                raise
    ends = list(zip(clock.wall, clock.processor, strict=True))[WARM_UP:]
    pairs = list(itertools.pairwise(ends))
    print(
        json.dumps(
            {
                "seconds": [b[0] - a[0] for a, b in pairs],
                "processor_seconds": [b[1] - a[1] for a, b in pairs],
                "loss": clock.loss,
            }
        )
    )


if __name__ == "__main__":
    main()
