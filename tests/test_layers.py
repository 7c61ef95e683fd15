"""The storeys of the house: who may import whom, and what nobody may import."""

import ast
import pathlib

import pytest

from dalle_jax import __main__

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dalle_jax"

WORDS = {"axes", "types", "config", "layout", "images", "chunks"}

# Room -> what it may import of the package, beside the words, nn (matter on which every storey
# stands) and itself. `engine.task` allows that one file of a room.
STOREYS = {
    # 1 matter: four siblings, none imports another
    "nn": set(),
    "diffusion": set(),
    "data": set(),
    "engine": set(),
    # 2 networks
    "models": set(),
    # 3 trained networks, opened from their folders
    "stages": {"models", "diffusion", "data.tokenizers", "engine.checkpoint", "engine.workdir"},
    # 4 samples of them
    "sampling": {"models", "diffusion", "stages"},
    # 5 what is done with all of it
    "tasks": {
        "models", "diffusion", "stages", "sampling", "engine.task", "engine.checkpoint",
    },
    "evaluation": {"models", "diffusion", "data", "engine", "stages", "sampling"},
    "importers": {"models", "stages", "data.tokenizers"},
    "planning": {"models", "engine", "stages", "tasks"},
    "pipelines": {"models", "diffusion", "data", "engine", "stages", "sampling", "tasks"},
    "sweeps": {"engine"},
    "benchmarks": {
        "models", "data", "engine", "stages", "sampling", "tasks", "planning",
    },
    # 6 what a person looks at
    "pages": {"evaluation", "engine.event_files"},
    # 7 commands
    "cli": {
        "models", "diffusion", "data", "engine", "stages", "sampling", "tasks", "evaluation",
        "importers", "planning", "pipelines", "sweeps", "benchmarks", "pages",
    },
    "__main__": {"cli"},
    "__init__": {"pipelines"},
}  # fmt: skip

# Module -> the rooms that may import it; an empty set is nobody.
BANNED = {
    "flax.nnx": set(),
    "flax.experimental.nnx": set(),
    "pickle": set(),
    "dill": set(),
    "cloudpickle": set(),
    "marshal": set(),
    "shelve": set(),
    "joblib": set(),
    "torch": {"benchmarks"},  # `bench --against` times other projects, where they are installed
    "einops": set(),
    "chex": set(),
    "clu": set(),
    "haiku": set(),
    "jax.experimental.pjit": set(),
    "tensorflow": {"data"},
    "absl.flags": {"cli"},
    "matplotlib": set(),
    "wandb": {"engine"},
}

MAX_LINES = 400
# File -> why it may be longer.
LONG_FILES: dict[str, str] = {}


def python_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*.py") if ".cache" not in path.parts)


def module_exists(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports(source: str):
    """(line, dotted name) of everything imported, at any depth: a late import is one too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def allowed(importer: str, dotted: str) -> bool:
    """May room `importer` import `dotted`, a name that starts with `dalle_jax.`?"""
    parts = dotted.split(".")[1:]
    if not parts or parts[0] == "__version__":
        return True
    room, file = parts[0], ".".join(parts[:2])
    if room in WORDS or room == importer:
        return True
    if importer in WORDS:
        return False
    return room == "nn" or bool({room, file} & STOREYS[importer])


def layer_faults(path: pathlib.Path, source: str) -> list[str]:
    importer = room_of(path)
    assert importer in WORDS | STOREYS.keys(), f"{path}: give room {importer!r} a storey here"
    return [
        f"{path}:{line} {importer} may not import {name}"
        for line, name in imports(source)
        if name.split(".")[0] == "dalle_jax" and not allowed(importer, name)
    ]


def banned_faults(path: pathlib.Path, room: str, source: str) -> list[str]:
    faults = []
    for line, name in imports(source):
        for banned, rooms in BANNED.items():
            if (name + ".").startswith(banned + ".") and room not in rooms:
                faults.append(f"{path}:{line} imports {name}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                faults.append(f"{path}:{node.value.lineno} allows pickles")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("eval", "exec"):
                faults.append(f"{path}:{node.lineno} calls {node.func.id}")
    return faults


def name_faults(path: pathlib.Path, source: str) -> list[str]:
    """`from dalle_jax.a import b` takes modules and types, so that a reader sees `b.f(…)`.

    The two words of nn.partition are the exception: they stand on every parameter.
    """
    return [
        f"{path}:{line} imports the name {name}; import its module"
        for line, name in imports(source)
        if name.startswith("dalle_jax.")
        and path != PACKAGE / "__init__.py"  # the public face
        and not module_exists(name)
        and not (name.split(".")[-1][0].isupper() and not name.split(".")[-1].isupper())
        and name != "dalle_jax.__version__"
        and not name.startswith("dalle_jax.nn.partition.")
    ]


def alias_faults(path: pathlib.Path, source: str) -> list[str]:
    """Imports of our own modules under another name; only `config as cfg` is allowed."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for alias in node.names:
            module = getattr(node, "module", None)
            name = alias.name if module is None else f"{module}.{alias.name}"
            if alias.asname and name.split(".")[0] == "dalle_jax":
                if (name, alias.asname) != ("dalle_jax.config", "cfg"):
                    faults.append(f"{path}:{node.lineno} imports {name} as {alias.asname}")
    return faults


@pytest.mark.parametrize("check", [layer_faults, name_faults])
def test_package_keeps_its_storeys(check):
    faults = [f for path in python_files(PACKAGE) for f in check(path, path.read_text())]
    assert not faults, "\n".join(faults)


def test_no_module_of_ours_is_imported_under_an_alias():
    folders = (PACKAGE, ROOT / "configs", ROOT / "tests", ROOT / "examples")
    files = [path for folder in folders for path in python_files(folder)]
    faults = [fault for path in files for fault in alias_faults(path, path.read_text())]
    assert not faults, "\n".join(faults)


def suffix_faults(names: set[str]) -> list[str]:
    """Names that are another name and a suffix: `plan_page` beside `plan`."""
    return [f"{n} beside {m}" for n in sorted(names) for m in names if n.startswith(f"{m}_")]


def test_no_file_is_named_by_a_suffix_of_its_neighbour():
    """A second idea has a name of its own."""
    faults = []
    for folder in {path.parent for path in python_files(PACKAGE)}:
        names = {path.stem for path in folder.glob("*.py")}
        names |= {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()}
        faults += [f"{folder.relative_to(ROOT)}: {fault}" for fault in suffix_faults(names)]
    assert not faults, "\n".join(faults)


def test_every_file_of_cli_is_a_command_or_begins_with_an_underscore():
    known = set(__main__.commands())
    files = {path.stem for path in (PACKAGE / "cli").glob("*.py") if path.stem[0] != "_"}
    assert files == known


def test_nobody_imports_what_is_banned():
    faults = []
    for folder in (PACKAGE, ROOT / "configs", ROOT / "tests", ROOT / "launch"):
        for path in python_files(folder):
            room = room_of(path) if folder == PACKAGE else folder.name
            faults += banned_faults(path, room, path.read_text())
    assert not faults, "\n".join(faults)


def test_configs_know_the_config_helpers_only():
    faults = [
        f"{path}:{line} imports {name}"
        for path in python_files(ROOT / "configs")
        for line, name in imports(path.read_text())
        if name.split(".")[0] in ("jax", "flax", "optax", "numpy")
        or (name.startswith("dalle_jax") and name != "dalle_jax.config")
    ]
    assert not faults, "\n".join(faults)


def test_a_file_holds_one_idea():
    folders = (PACKAGE, ROOT / "configs", ROOT / "tests", ROOT / "launch")
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for folder in folders
        for path in [*python_files(folder), *folder.rglob("*.sh")]
    }
    long = {name: n for name, n in lengths.items() if n > MAX_LINES and name not in LONG_FILES}
    assert not long, f"over {MAX_LINES} lines: {long}; split them, or give a reason in LONG_FILES"
    assert set(LONG_FILES) <= set(lengths), "LONG_FILES names a file that is gone"


@pytest.mark.parametrize(
    ("room", "source", "is_allowed"),
    [
        ("nn", "from dalle_jax.models import dalle", False),
        ("nn", "def f():\n    import dalle_jax.data.scenes", False),
        ("engine", "from dalle_jax import tasks", False),
        ("tasks", "from dalle_jax.engine.task import Task", True),
        ("tasks", "from dalle_jax.engine import loop", False),
        ("stages", "from dalle_jax.sampling import rerank", False),
        ("sampling", "from dalle_jax.stages import run", True),
        ("pages", "from dalle_jax.cli import sample", False),
        ("evaluation", "from dalle_jax.data import scenes", True),
        ("evaluation", "from dalle_jax.data import pipeline", True),
        ("evaluation", "from dalle_jax.pages import html", False),
        ("evaluation", "from dalle_jax import tasks", False),
        ("pages", "from dalle_jax.evaluation import results", True),
        ("pages", "from dalle_jax.sampling import dalle", False),
        ("images", "from dalle_jax import nn", False),
        ("cli", "from dalle_jax import tasks, images", True),
    ],
)
def test_the_layer_test_itself(room, source, is_allowed):
    path = PACKAGE / room / "x.py"
    assert bool(layer_faults(path, source)) != is_allowed


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from flax import nnx", "from absl import flags", "import tensorflow.data",
     "import numpy\nnumpy.load('x', allow_pickle=True)", "eval('1')"],
)  # fmt: skip
def test_the_ban_itself(source):
    assert banned_faults(PACKAGE / "nn" / "x.py", "nn", source)
    assert not banned_faults(PACKAGE / "nn" / "x.py", "nn", "import tensorflow_datasets")


def test_the_alias_and_suffix_rules_themselves():
    path = PACKAGE / "nn" / "x.py"
    assert alias_faults(path, "from dalle_jax.nn import kv_cache as cache")
    assert alias_faults(path, "import dalle_jax.models.clip as clip")
    assert not alias_faults(path, "from dalle_jax import config as cfg\nimport numpy as np")
    assert suffix_faults({"plan", "plan_page", "planner"}) == ["plan_page beside plan"]
