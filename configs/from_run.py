"""Training on from the weights of another run, or from converted ones: its model, its parameters.

    torus convert ./Llama-3.2-1B torus:./start
    torus train --config=from_run:./start --config.data.path=data/mine --workdir=runs/a

Adam's b1, b2 and eps are that run's too, as moments that were converted need them (`torus convert
--with-optimizer`). Data, schedule and everything else are the defaults; set them on the command
line.
"""

from sharding.errors import UsageError
from trainer.config import Experiment
from trainer.run import read_experiment


def get_config(run: str = "") -> Experiment:
    """Returns an experiment that starts from the newest parameters of `run`."""
    if not run:
        raise UsageError("--config=from_run:FOLDER: name the run to start from")
    source = read_experiment(run)
    exp = Experiment(name="from_run", model=source.model)
    for name in ("b1", "b2", "eps"):
        setattr(exp.optimizer, name, getattr(source.optimizer, name))
    exp.train.init_from = run
    return exp
