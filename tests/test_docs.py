"""Every command in README.md, docs/, the help screens and the configs is typed here, word by word.

A command of a code block is run in a folder that holds what it names, or, where it would take long
or needs a network, up to the point where its work would begin. Runs there are small: a file
`quickstart` shadows the shipped config, and steps 350 and 700 of it are called 2 and 4. `make soak`
types the quick start without these stand-ins. Commands inside of sentences are compared with the
help: command, options and fields have to exist. What is not known here fails.
"""

import contextlib
import io
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.convert.folders import shapes_of, tiny, write_folder
from tests.checkpoint.convert.foreign import unpack
from tests.checkpoint.convert.test_maxtext import runs as maxtext_runs  # noqa: F401
from trainer.commands import COMMANDS
from trainer.commands.main import main, usage
from trainer.config import _flag_type

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("torus", "make", "git", "cd", "source", "pip", "python", "bash", "sbatch", "zcat")
_ASSIGNMENTS = r"(?:[A-Z][A-Z_]*=\S+ )*"
_COMMAND = re.compile(rf"{_ASSIGNMENTS}(?:{'|'.join(PROGRAMS)}) ")
# Names of the documents that a reader replaces, and what the world has for them.
PLACES = {"RUN": "runs/a", "DATASET": "data/notes", "DIR": "data/notes", "/shared/run": "runs/c"}
STEPS = {"350": "2", "690": "3", "700": "4", "0:20": "0:4", "stop_at=100": "stop_at=2"}


def blocks(page: str) -> list[str]:
    """Returns the commands of a Markdown page's code blocks, indented or fenced with ```sh."""
    found = [line for body in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)
             for line in body.splitlines() if line.strip()]  # fmt: skip
    outside = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    indented = (line[4:] for line in outside.splitlines() if line.startswith("    "))
    return [*found, *filter(_COMMAND.match, indented)]


def examples() -> dict[str, str]:
    """Returns command → where it stands, of all code blocks, help screens and configs."""
    found: dict[str, str] = {}
    for path in PAGES:
        for line in blocks(path.read_text()):
            found.setdefault(line.strip(), path.name)
    screens = {name: help_of(name) for name in COMMANDS} | {"torus": usage()}
    for name, text in screens.items():
        for line in text.splitlines():
            if line.startswith("  ") and _COMMAND.match(line[2:]):
                found.setdefault(line.strip(), f"torus {name} --help")
    for path in sorted((ROOT / "configs").glob("*.py")):
        for line in blocks(path.read_text().split('"""')[1]):
            found.setdefault(line.strip(), path.name)
    once = {shlex.join(words_of(text)): text for text in reversed(found)}
    return {text: found[text] for text in reversed(once.values())}


def mentions() -> dict[str, str]:
    """Returns the commands that stand in sentences of the pages, between backticks."""
    spans = ((path.name, span) for path in PAGES
             for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", path.read_text(),
                                                         flags=re.M | re.S)))  # fmt: skip
    return {span: name for name, span in spans if _COMMAND.match(span)}


def help_of(name: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([name, "--help"]) == 0
    return out.getvalue()


def words_of(text: str) -> list[str]:
    """Returns the words as the shell splits them, without assignments, pipes and comments."""
    text = re.sub(rf"^{_ASSIGNMENTS}", "", text).replace("…", "1")
    return shlex.split(text, comments=True)


# ---------------------------------------------------------------- running


class Reached(Exception):
    """The command was understood: its work would begin now."""


def _reached(*_, **__):
    raise Reached


# Subcommand → what begins its work, where it is not done here.
WORK = {
    "train": ("trainer.loop.train",),
    "launch": ("trainer.recovery.supervisor.Supervisor.run",),
    "plan": ("trainer.commands.plan._compile", "trainer.commands.plan._search",
             "trainer.commands.plan._check_all"),
    "bench": ("trainer.commands.bench.measure", "sharding.topology.require_libtpu"),
    "doctor": ("trainer.commands.doctor.check_python",),
    "eval": ("trainer.restore.restore_params",),
    "sample": ("trainer.restore.restore_params",),
    "replay": ("trainer.commands.replay._redo",),
}  # fmt: skip
DONE = ("config", "convert", "data", "diff", "inspect", "prepare", "report", "verify")
WRITES = {"convert": 1, "prepare": "--out", "data": "--out", "train": "--workdir",
          "launch": "--workdir"}  # fmt: skip


def test_every_subcommand_has_a_treatment():
    assert {*WORK, *DONE} == set(COMMANDS)


@pytest.fixture(scope="module")
def world(tmp_path_factory, maxtext_runs):  # noqa: F811
    """A folder with everything that the commands name, made by the commands where they can."""
    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.restore.start_runtime", lambda: None)
        _write_texts(folder)
        smaller = """
    exp.train.steps, exp.checkpoint.every, exp.checkpoint.keep_last = 4, 1, 9
    exp.model.vocab, exp.model.max_length = 300, 1024
    return exp"""
        tiny_config = (ROOT / "tests/tiny.py").read_text().replace("    return exp", smaller)
        Path("quickstart").write_text(tiny_config)
        ours = ["--train-bpe", "300", "--held-out", "0.4", "--out", "data/notes"]
        assert main(["prepare", "--input", "notes/", *ours]) == 0
        tokens = np.arange(100, dtype=np.uint16)
        for split in ("train", "val"):
            tokens.tofile(f"{split}.bin")
        for place in ("gpt2", "llama"):
            shutil.copy("data/notes/tokenizer.json", place)
        assert main(["data", "import", "train=train.bin", "val=val.bin", "--from", "nanogpt",
                     "--tokenizer", "gpt2/", "--eot", "99", "--out", "data/owt"]) == 0  # fmt: skip
        export = ["data/notes", "--to", "arrayrecord", "--out", "records"]
        assert main(["data", "export", *export]) == 0
        run = ["--workdir=runs/a", "--config.data.path=data/notes"]
        assert main(["train", "--config=quickstart", *run]) == 0
        shutil.copytree("runs/a", "runs/b")
        shutil.copytree("runs/a", "runs/notes")
        unpack(ROOT / "tests/checkpoint/convert/deepspeed_runs.tar.xz", folder / "deepspeed")
        Path("deepspeed/zero3_world2").rename("zero3_run")
        unpack(ROOT / "tests/checkpoint/convert/megatron_runs.tar.xz", folder / "megatron")
        Path("megatron/llama/dist").rename("megatron_run")
        shutil.copytree(maxtext_runs / "llama", "maxtext/checkpoints")
        shutil.copytree(maxtext_runs / "llama", "Llama-3.1-8B")
        _write_models(folder)
        assert main(["convert", "./Llama-3.2-1B", "torus:./start"]) == 0
        assert main(["convert", "./start", "hf:./out"]) == 0
        assert main(["convert", "./zero3_run", "torus:./zero", "--with-optimizer"]) == 0
        assert main(["convert", "./zero", "ucp:./universal"]) == 0
    return folder


def _write_texts(folder: Path) -> None:
    import zstandard

    sources = [p.read_text() for p in sorted((ROOT / "trainer").glob("*.py"))]
    for name in ("notes", "crawl", "gpt2", "llama", "runs", "data"):
        (folder / name).mkdir()
    for index, text in enumerate(sources):
        (folder / f"notes/{index}.txt").write_text(text)
    lines = "".join(f'{{"content": "sentence {i} of a crawl, {i * i} long"}}\n' for i in range(200))
    (folder / "crawl/1.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))


def _write_models(folder: Path) -> None:
    tokenizer = folder / "data/notes/tokenizer.json"
    family, model = tiny("llama3.2-1b")
    model.vocab, model.max_length = 300, 1024
    shapes = shapes_of(family, model)
    tensors = {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}
    write_folder(folder / "Llama-3.2-1B", family.write(model), tensors)
    shutil.copy(tokenizer, folder / "Llama-3.2-1B")
    (folder / "pytorch_model_folder").mkdir()
    page = (ROOT / "docs/configs.md").read_text()
    config = re.search(r"^    from models.config.*?return exp$", page, re.M | re.S)[0]
    (folder / "mine.py").write_text(textwrap.dedent(config))


def _place(world: Path, tmp_path: Path, written: str) -> None:
    """Links all of the world into `tmp_path`, but what the command is to write."""
    for path in world.rglob("*"):
        name = path.relative_to(world)
        if len(name.parts) <= 2 and not name.is_relative_to(written or "\0"):
            if path.is_dir() and len(name.parts) == 1 and name.name in ("runs", "data"):
                (tmp_path / name).mkdir()
            elif not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(path)


def _arguments(text: str) -> list[list[str]]:
    """Returns the programs of one line and their arguments, with what the world has for names."""
    words = [PLACES.get(word, word) for word in words_of(text)]
    for name, place in PLACES.items():
        words = [word.replace(f"={name}", f"={place}") for word in words]
    for step, small in STEPS.items():
        words = [re.sub(rf"\b{step}\b", small, word) for word in words]
    parts = itertools.groupby(words, lambda word: word in ("&&", "|"))
    return [list(part) for between, part in parts if not between]


def _written(arguments: list[str]) -> str:
    """Returns the place in the world that a command makes anew, "" where it makes none."""
    how = WRITES.get(arguments[1])
    if how is None or arguments[2:3] == ["--help"]:
        return ""
    if isinstance(how, int):
        place = [a for a in arguments[2:] if not a.startswith("--")][how].partition(":")[2]
    else:
        joined = [*" ".join(arguments).replace("=", " ").split(" "), how, ""]
        place = joined[joined.index(how) + 1]
    return place.removeprefix("./")


def _type(arguments: list[str], world: Path, tmp_path: Path, stubs: tuple[str, ...]) -> int | None:
    """Runs one torus command; returns its status, or None where its work was about to begin."""
    _place(world, tmp_path, _written(arguments))
    with contextlib.chdir(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.restore.start_runtime", lambda: None)
        for stub in stubs:
            patch.setattr(stub, _reached)
        try:
            return main(arguments[1:])
        except Reached:
            return None


EXAMPLES = examples()


@pytest.mark.parametrize("text", [t for t in EXAMPLES if "torus " in re.sub("#.*", "", t)
                                  and not t.startswith(("git", "cd", "bash"))])  # fmt: skip
def test_torus_commands_of_code_blocks(text, world, tmp_path, monkeypatch, capsys):
    for index, arguments in enumerate(_arguments(text)):
        if arguments[0] == "grep":
            continue
        if arguments[0] == "zcat":
            stdin = io.TextIOWrapper(io.BytesIO(b"A line of the dump, long enough to be kept.\n"))
            monkeypatch.setattr("sys.stdin", stdin)
            continue
        assert arguments[0] == "torus" and arguments[1] in COMMANDS, f"{EXAMPLES[text]}: {text}"
        name, where = arguments[1], tmp_path / str(index)
        where.mkdir()
        stubs = WORK.get(name, ())
        if "://" in text or "pytorch_model_folder" in text:
            stubs = ("checkpoint.convert.formats.open_place",)
        if "--mesh" in arguments:  # the help says so of several hosts
            monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
            monkeypatch.setenv("JAX_PROCESS_ID", "0")
            monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
        status = _type(arguments, world, where, stubs)
        told = capsys.readouterr()
        accepted = (None,) if stubs else (0, 1) if name == "diff" else (0,)
        if "--against" in arguments:  # of runs that agree nothing is done again
            accepted = (0,)
        assert status in accepted, f"{EXAMPLES[text]}: {text}\n{told.out}{told.err}"


@pytest.mark.parametrize("text", [t for t in {**EXAMPLES, **mentions()}
                                  if not re.match(rf"{_ASSIGNMENTS}torus ", t)])  # fmt: skip
def test_commands_of_other_programs(text):
    words = words_of(text)
    if words[0] == "make":
        target = [word for word in words[1:] if "=" not in word]
        done = subprocess.run(["make", "-n", *target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "python":
        assert words[1] == "-m" and words[2].startswith("tests."), text
        module = ROOT / words[2].replace(".", "/")
        source = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        for option in (word for word in words[3:] if word.startswith("--")):
            assert f'"{option}"' in source.read_text(), f"{words[2]} has no {option}"
    elif words[0] in ("bash", "sbatch"):
        script = next(word for word in words[1:] if word.startswith("tpu_scripts/"))
        assert (ROOT / script).is_file(), text
    elif words[0] == "pip":
        project = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"\.\[(\w+)\]", text):
            assert re.search(rf"^{extra} = \[", project, re.M), text
        for name in re.findall(r"constraints/\S+", text):
            assert (ROOT / name).is_file(), text
        assert "torus-train" not in text
    elif words[0] == "zcat":
        pass  # typed with the torus command that reads from it
    else:
        known = ("git clone REPOSITORY torus", "cd torus", "source .venv/bin/activate")
        assert " ".join(words) in known, f"{text}: the test does not know this command"


@pytest.mark.parametrize("text", [t for t in mentions() if t.startswith("torus ")])
def test_commands_inside_of_sentences(text):
    name, *arguments = words_of(text)[1:]
    if name.startswith("-"):
        assert text == "torus --help"
        return
    assert name in COMMANDS, text
    screen = help_of(name)
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        if option.startswith("--config."):
            _flag_type(option.removeprefix("--"))
        else:
            assert option in (*re.findall(r"--[a-z-]+", screen), "--help"), (
                f"{name} has no {option}"
            )


def test_config_fields_in_help_screens_exist():
    for name in COMMANDS:
        for field in re.findall(r"--(config\.[a-z_.]+[a-z])[=, \n]", help_of(name)):
            _flag_type(field.rstrip("."))


# ---------------------------------------------------------------- without stand-ins


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_the_quick_start_as_a_user_types_it(tmp_path):
    """README's commands about runs/a and runs/b, one after the other, in processes of their own."""
    about = re.compile(r"torus .*(runs/[ab]|doctor)")
    lines = [t for t, place in EXAMPLES.items() if place == "README.md" and about.search(t)]
    assert len(lines) >= 7
    for line in lines:
        command = re.sub(r"\btorus\b", f"{sys.executable} -m trainer.commands.main", line)
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True,
                              env={**_environment(), "PYTHONPATH": str(ROOT)})  # fmt: skip
        expected = (0, 1) if "torus diff" in line else (0,)
        assert done.returncode in expected, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("text", [t for t in EXAMPLES if t.startswith("torus plan")])
def test_plans_as_a_user_types_them(text, tmp_path):
    words = words_of(text)[1:]
    if "--search" in words:
        words += ["--budget=120s", "--keep=1"]
    command = [sys.executable, "-m", "trainer.commands.main", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env={**_environment(), "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def _environment() -> dict[str, str]:
    """The environment of a user, without what the tests set."""
    import os

    dropped = ("XLA_FLAGS", "JAX_PLATFORMS", "TORUS_CACHE")
    return {name: value for name, value in os.environ.items() if name not in dropped}
