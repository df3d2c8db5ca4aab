"""Every shipped config, resolved, against tests/golden: a diff there shows what an edit changed.

After an intended change run `TORUS_UPDATE_GOLDEN=1 pytest tests/configs` and commit the files.
"""

import importlib
import json
import os
from pathlib import Path

import pytest

from models.presets import LADDER, PRESETS
from sharding.errors import UsageError
from trainer.config import ROOT, from_dict, parse_flags, to_json, validate

GOLDEN = Path(__file__).parent.parent / "golden"
UPDATE = os.environ.get("TORUS_UPDATE_GOLDEN") == "1"
FILES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
PLAIN = [f for f in FILES if f not in ("ladder", "from_run")]  # these two take an argument
REFERENCES = PLAIN + [f"ladder:{size}" for size in LADDER]


# ml_collections loads a config file with a function that Python deprecates.
loads_file = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def load(reference: str):
    name, _, argument = reference.partition(":")
    get_config = importlib.import_module(f"configs.{name}").get_config
    return get_config(argument) if argument else get_config()


@pytest.mark.parametrize("reference", REFERENCES)
def test_resolved_config_equals_the_golden_file(reference):
    path = GOLDEN / f"{reference.replace(':', '-')}.json"
    experiment = load(reference)
    validate(experiment)
    text = to_json(experiment)
    if UPDATE:
        path.write_text(text)
    assert path.is_file(), f"{path.name} is missing; see this file's docstring"
    assert text == path.read_text(), f"{path.name} differs; see this file's docstring"


def test_golden_files_are_those_of_shipped_configs():
    assert {p.stem for p in GOLDEN.glob("*.json")} == {r.replace(":", "-") for r in REFERENCES}


def test_every_preset_has_a_config():
    by_name = {experiment.name: experiment for experiment in map(load, REFERENCES)}
    for name, preset in PRESETS.items():
        assert by_name[name].model == preset()


@loads_file
def test_ladder_is_chosen_on_the_command_line():
    experiment, _ = parse_flags(["--config=ladder:20m", "--config.train.steps=900"])
    assert experiment.name == "ladder-20m"
    assert (experiment.model.layers, experiment.model.width) == LADDER["20m"]
    assert experiment.train.steps == 900


@loads_file
def test_bad_ladder_size_is_refused_with_the_choices():
    with pytest.raises(UsageError, match=r"no model of size '100'; choose 10m, .*1b; did you mean"):
        parse_flags(["--config=ladder:100"])


def test_json_form_gives_the_same_experiment():
    for reference in REFERENCES:
        experiment = load(reference)
        assert from_dict(json.loads(to_json(experiment))) == experiment
