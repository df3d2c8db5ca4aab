"""Training on from the weights of another run, or from converted ones: its model, its parameters.

    torus convert ./Llama-3.2-1B torus:./start
    torus train --config=from_run:./start --config.data.path=data/mine --workdir=runs/a

Data, schedule and everything else are the defaults; set them on the command line.
"""

from sharding.errors import UsageError
from trainer.config import Experiment
from trainer.run import read_experiment


def get_config(run: str = "") -> Experiment:
    """Returns an experiment that starts from the newest parameters of `run`."""
    if not run:
        raise UsageError("--config=from_run:FOLDER: name the run to start from")
    exp = Experiment(name="from_run", model=read_experiment(run).model)
    exp.train.init_from = run
    return exp
