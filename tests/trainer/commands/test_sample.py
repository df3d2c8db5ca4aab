"""`torus sample` and `torus eval` on a run of untrained parameters: what they print and refuse."""

import shutil

import jax
import pytest

from checkpoint.manager import CheckpointManager
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from tests.buckets import google
from tests.tiny import get_config
from trainer.commands import eval as eval_command
from trainer.commands.sample import main
from trainer.data.config import DataConfig
from trainer.data.dataset import open_dataset, run_tokenizer
from trainer.data.shards import DatasetWriter
from trainer.data.tokenizer import ByteTokenizer, train_bpe
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


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Two datasets in the ids of one BPE, and a third one in bytes."""
    folder = tmp_path_factory.mktemp("data")
    bpe = train_bpe(iter(["some words and some more words"] * 9), 259)
    for name, tokenizer in (("a", bpe), ("b", bpe), ("bytes", ByteTokenizer())):
        with DatasetWriter(folder / name, tokenizer) as writer:
            for number in range(40):
                text = f"{name} {number} words"
                for split in ("train", "val"):
                    tokens = tokenizer.spec.document(tokenizer.encode(text))
                    writer.add(split, tokens, len(text))
    return folder


@pytest.fixture
def mixed(run, datasets, tmp_path, monkeypatch):
    """The run, as if it had been trained on a mixture; `data.path` still is the built-in text."""
    folder = shutil.copytree(run, tmp_path / "mixed")
    experiment = get_config()
    experiment.data.mixture = ((str(datasets / "a"), 2.0), (str(datasets / "b"), 1.0))
    write_experiment(str(folder), experiment)
    monkeypatch.setenv("TORUS_CACHE", str(tmp_path / "cache"))
    return folder, experiment.data


def test_a_run_on_a_mixture_is_sampled_with_its_tokenizer(mixed, capsys, tmp_path):
    folder, config = mixed
    assert run_tokenizer(str(folder), config).spec.kind == "huggingface"
    assert output(capsys, folder, "--prompt", "words", "--max-tokens", 4).startswith("words")
    assert not list(tmp_path.glob("cache/builtin*"))


def test_converted_weights_in_a_bucket_are_sampled_with_their_tokenizer(
    datasets, tmp_path, monkeypatch
):
    with google() as store:
        store.fill("bucket", datasets)
        objects = store.buckets["bucket"]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            objects[f"run/tokenizer/{name}"] = objects[f"a/{name}"]
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        monkeypatch.setenv("TORUS_CACHE", str(tmp_path))
        beside = run_tokenizer("gs://bucket/run", DataConfig())
        of_data = run_tokenizer("gs://bucket/other", DataConfig(path="gs://bucket/b"))
        del objects["run/tokenizer/tokenizer.json"]
        with pytest.raises(UsageError, match=r"gs://bucket/run/tokenizer: the folder has none of"):
            run_tokenizer("gs://bucket/run", DataConfig())
    local = run_tokenizer("nowhere", DataConfig(path=str(datasets / "a")))
    assert beside.spec == of_data.spec == local.spec


def test_eval_refuses_data_of_another_tokenizer(mixed, datasets, capsys):
    """Also a converted run on the text that its config names by default."""
    folder, _ = mixed
    message = r"dataset \S+ was written with another tokenizer \(bytes, 259 ids\) than \S+ was"
    with pytest.raises(UsageError, match=message):
        eval_command.main([str(folder), "--data", str(datasets / "bytes")])
    assert eval_command.main([str(folder), "--data", str(datasets / "b")]) == 0
    assert eval_command.main([str(folder)]) == 0
    assert capsys.readouterr().out.count("held-out tokens") == 2
    write_experiment(str(folder), get_config())
    (folder / "tokenizer").mkdir()
    for path in (datasets / "a").glob("tokenizer*"):
        shutil.copy(path, folder / "tokenizer")
    with pytest.raises(UsageError, match=r"another tokenizer .* than \S+ was .*\(huggingface, 259"):
        eval_command.main([str(folder)])


def test_eval_goes_on_without_the_data_of_the_run(mixed, datasets, capsys):
    folder, config = mixed
    config.mixture = (("gone", 1.0),)
    experiment = get_config()
    experiment.data = config
    write_experiment(str(folder), experiment)
    assert eval_command.main([str(folder), "--data", str(datasets / "b"), "--batches", "1"]) == 0
    assert "tokenizer cannot be compared with that of the dataset: " in capsys.readouterr().err


def test_eval_of_text_without_loss(mixed, monkeypatch, capsys):
    nothing = {"loss": None, "bits_per_byte": None, "tokens": 0}
    monkeypatch.setattr("trainer.evaluate.evaluate", lambda *_: nothing)
    assert eval_command.main([str(mixed[0])]) == 0
    assert "0 held-out tokens\n  no token carries loss\n" in capsys.readouterr().out
    for flag in ("--batches", "--batch-size"):
        with pytest.raises(UsageError, match=rf"{flag} -1: at least 0"):
            eval_command.main([str(mixed[0]), flag, "-1"])


def test_a_mixture_has_one_tokenizer(datasets):
    mixture = ((str(datasets / "a"), 1.0), (str(datasets / "bytes"), 1.0))
    for split in ("train", "val"):
        with pytest.raises(
            UsageError, match=r"bytes was written with another tokenizer than \S+a;"
        ):
            open_dataset(DataConfig(mixture=mixture, seq_len=32), split)
