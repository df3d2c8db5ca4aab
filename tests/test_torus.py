"""Torus beside files and folders of a user that have the names of its packages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.errors import UsageError
from tests.processes import BESIDE, ROOT
from tests.test_structure import FILES
from torus import PACKAGES, module_command
from trainer.config import load_config


def python(*arguments: str, cwd: Path = BESIDE, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120,
        **options,
    )  # fmt: skip


def test_each_name_lies_beside():
    assert {path.stem for path in BESIDE.iterdir()} - {"__pycache__"} == set(PACKAGES)


def test_processes_of_torus_are_started_in_one_way():
    """`python -m` would search the working directory first."""
    starts = [path for path in FILES if "sys.executable" in path.read_text()]
    assert not starts, "use torus.module_command"


def test_a_process_of_torus_is_of_this_torus():
    """As `torus launch` starts one: it reads its command from standard input."""
    command = module_command("trainer.recovery.standby")
    done = subprocess.run(
        command, input='[["version"], {}]\n', cwd=BESIDE, capture_output=True, text=True,
        env={"PYTHONPATH": "."}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("torus "), done.stderr


def test_the_command_line_beside_a_users_folders():
    code = "import sys; sys.path.append(sys.argv.pop(1)); from torus import run; sys.exit(run())"
    done = python("-c", code, str(ROOT), "train", "--config=quikstart", "--workdir=x")
    assert done.returncode == 2 and "did you mean" in done.stderr, done.stderr


def test_workers_of_a_pool_are_of_this_torus(tmp_path):
    (tmp_path / "a.txt").write_text("some words of a text. " * 999)
    code = (
        "import sys; sys.path.append(sys.argv.pop(1)); import torus; "
        "from trainer.commands.main import main; sys.exit(main())"
    )
    done = python(
        "-c", code, str(ROOT), "prepare", f"--input={tmp_path}/a.txt", f"--out={tmp_path}/out",
        "--tokenizer=bytes", "--workers=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_notebook_is_told_which_of_its_folders_hides_a_package(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/__init__.py").touch()
    code = "import sys; sys.path.append(sys.argv[1]); {}"
    begin, last = "import trainer", "-c"
    done = python(last, code.format(begin), str(ROOT), cwd=tmp_path)
    assert re.search(f"ImportError: `import models` finds {tmp_path}/models.*import torus",
                     done.stderr)  # fmt: skip
    done = python(last, code.format(f"import torus; {begin}.config"), str(ROOT), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = python(last, code.format("import models, torus"), str(ROOT), cwd=tmp_path)
    assert f"ImportError: `models` was imported from {tmp_path}/models" in done.stderr


def test_a_folder_without_code_hides_nothing(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/weights.bin").touch()
    code = "import sys; sys.path.append(sys.argv[1]); import trainer.config"
    done = python("-c", code, str(ROOT), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_config_imports_modules_that_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_sizes.py").write_text("STEPS = 7\n")
    config = tmp_path / "mine.py"
    config.write_text(
        "import own_sizes\nfrom configs.quickstart import get_config as base\n"
        "def get_config():\n    e = base()\n    e.train.steps = own_sizes.STEPS\n    return e\n"
    )
    assert load_config(str(config)).train.steps == 7


@pytest.mark.parametrize("line", ["import models.mine", "from models import Mine"])
def test_a_config_whose_folder_has_the_name_of_a_package_is_told(tmp_path, monkeypatch, line):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(line)
    with pytest.raises(UsageError, match="`models` is a package of Torus, so yours needs another"):
        load_config(str(tmp_path / "mine.py"))
