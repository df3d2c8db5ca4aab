"""`torus sample` on a run of untrained parameters: what it prints, and what it refuses."""

import jax
import pytest

from checkpoint.manager import CheckpointManager
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from tests.tiny import get_config
from trainer.commands.sample import main
from trainer.run import CHECKPOINTS, write_experiment
from trainer.state import init_state, make_layout, to_stored


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with steps 3 and 5, which hold other values."""
    folder = str(tmp_path_factory.mktemp("run"))
    experiment = get_config()
    write_experiment(folder, experiment)
    mesh = make_mesh(experiment.mesh)
    with (
        jax.set_mesh(mesh),
        CheckpointManager(f"{folder}/{CHECKPOINTS}", experiment.checkpoint) as checkpoints,
    ):
        for step in (3, 5):
            experiment.train.seed = step
            state = to_stored(init_state(experiment, make_layout(experiment, mesh)))
            checkpoints.save(step, state, {}, force=True)
    return folder


@pytest.fixture(autouse=True)
def no_global_state(monkeypatch):
    monkeypatch.setattr("trainer.restore.start_runtime", lambda: None)


def output(capsys, *argv) -> str:
    assert main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


def test_prints_prompts_with_continuations(run, capsys):
    arguments = (run, "--prompt", "one", "--prompt=a longer two", "--max-tokens", 6, "--seed=4")
    text = output(capsys, *arguments)
    first, second = text.split("--- 2 of 2\n")
    assert first.startswith("--- 1 of 2\none") and second.startswith("a longer two")
    assert len(second) > len("a longer two\n")
    assert output(capsys, *arguments[:-1], "--seed=5") != text


def test_step_and_greedy(run, capsys):
    greedy = (run, "--greedy", "--max-tokens", 6, "--prompt", "word")
    newest = output(capsys, *greedy)
    assert newest.startswith("word")
    assert output(capsys, *greedy, "--step", 3) != newest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "4"], r"step 4"),
        (["--top-p", "1.5"], r"top-p = 1.5: above 0 and at most 1"),
        (["--temperature", "-1"], r"temperature = -1.0: at least 0"),
        (["--max-tokens", "60", "--prompt", "hello"], r"a prompt of 6 tokens and 60 new .* 64$"),
        (["--max-tokens", "0"], r"max-tokens = 0: at least 1"),
        (["--seed", "-1"], r"--seed -1: at least 0"),
        (["--max-token", "5"], r"does not take `--max-token`; did you mean `--max-tokens`\?"),
    ],
)
def test_mistakes_are_refused(run, arguments, message):
    with pytest.raises(UsageError, match=message):
        main([run, *arguments])


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"is not a run: it has no experiment\.json"):
        main([str(tmp_path)])
