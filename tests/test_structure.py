"""The shape of the code itself: floors, sizes, and that nothing names a machine."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("sharding", "models", "checkpoint", "trainer", "configs")  # lowest first
LIGHT = (  # importable before JAX: what a refused command line needs
    "sharding/errors.py", "sharding/config.py", "models/config.py", "checkpoint/config.py",
    "checkpoint/steps.py", "trainer/data/config.py", "trainer/metrics.py", "trainer/config.py",
    "trainer/plan/recipe.py", "trainer/plan/calibration.py", "trainer/plan/screen.py",
    "trainer/plan/process.py", "trainer/commands/plan.py",
    "trainer/run.py", "trainer/lock.py", "trainer/packages.py", "trainer/commands/__init__.py",
    "trainer/commands/main.py", "trainer/commands/train.py", "trainer/commands/prepare.py",
    "trainer/data/prepare.py", "trainer/data/readers.py", "trainer/data/clean.py",
    "trainer/commands/convert.py",
    "trainer/commands/inspect.py", "trainer/commands/diff.py", "checkpoint/convert/formats.py",
    "checkpoint/convert/mapping.py", "checkpoint/convert/fields.py",
    "checkpoint/convert/families.py", "checkpoint/convert/safetensors.py",
    "checkpoint/convert/huggingface.py",
)  # fmt: skip
FILES = [p for floor in FLOORS for p in sorted((ROOT / floor).rglob("*.py"))]


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    above = {name for name in imports(path) if name.split(".")[0] in FLOORS[floor + 1 :]}
    assert not above, f"{path.relative_to(ROOT)} imports a higher floor: {sorted(above)}"


@pytest.mark.parametrize("name", LIGHT)
def test_what_refuses_early_imports_no_jax(name):
    heavy = {"jax", "flax", "optax", "orbax", "grain", "tensorstore", "matplotlib", "rich"}
    roots = {module.split(".")[0] for module in imports(ROOT / name, top_level_only=True)}
    assert not roots & heavy


def test_only_one_module_imports_orbax_and_one_the_private_parts_of_jax():
    orbax = [p for p in FILES if any(n.startswith("orbax") for n in imports(p))]
    assert [p.name for p in orbax] == ["storage.py"]
    private = [p for p in FILES if any(n.startswith("jax._src") for n in imports(p))]
    assert [p.name for p in private] == ["runtime.py"]
    at_import = imports(ROOT / "sharding/runtime.py", top_level_only=True)
    assert not any(n.startswith("jax._src") for n in at_import), "a JAX without it breaks all"


def test_the_loop_stays_short():
    lines = (ROOT / "trainer/loop.py").read_text().splitlines()
    assert len(lines) <= 180  # attempts, the lock and the order of refusals are in it to be seen
