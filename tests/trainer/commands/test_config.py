"""`torus config`: every field has a meaning, and the table says who set it."""

import dataclasses

import pytest

from sharding.errors import UsageError
from sharding.fields import field_types
from trainer.commands import config as command
from trainer.config import Experiment, leaves


def _groups(cls):
    yield cls
    for kind in field_types(cls).values():
        if dataclasses.is_dataclass(kind):
            yield from _groups(kind)


@pytest.mark.parametrize("cls", list(_groups(Experiment)), ids=lambda cls: cls.__name__)
def test_every_field_has_a_meaning_in_its_comment(cls):
    comments = command.field_comments(cls)
    values = [n for n, kind in field_types(cls).items() if not dataclasses.is_dataclass(kind)]
    assert {name for name in values if not comments[name]} == set()


def test_the_table_says_value_origin_and_meaning(capsys):
    arguments = ["--config", "quickstart", "--config.optimizer.peak_lr", "1e-3"]
    assert command.main(arguments) == 0
    lines = {line.split("=")[0]: line for line in capsys.readouterr().out.splitlines()}
    for field, expected in {
        "optimizer.peak_lr": "=0.001 command line highest learning rate, reached after the warm-up",
        "train.steps": "=700 file updates in the whole run; the schedule ends here",
        "train.seed": "=0 default of the first parameters, 0 to 2**32 - 1",
        "checkpoint.keep_last": "=2 default newest steps that stay; two, so that one damaged",
    }.items():
        assert " ".join(lines[f"--config.{field}"].split()).startswith(
            f"--config.{field}{expected}"
        )
    assert {f"--config.{path}" for path, _ in leaves(Experiment())} <= set(lines)
    assert max(len(line) for line in lines.values()) <= 120


def test_what_train_refuses_is_refused():
    with pytest.raises(UsageError, match="mean `layers`"):
        command.main(["--config=quickstart", "--config.model.layrs=3"])
