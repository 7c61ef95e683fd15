"""Every config file, in every size: it loads, locks, fits its model, and refuses what it must."""

import ast
import configparser
import pathlib
import re

import jax
import ml_collections
import pytest

from dalle_jax import config as cfg
from dalle_jax import tasks
from dalle_jax.models import build, unet
from dalle_jax.types import UsageError

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
FIXED = {"base", "dalle_12b"}  # shared defaults; one exact model


def path_of(name: str) -> str:
    return str(ROOT / "configs" / f"{name}.py")


CASES = [
    f"{name}:size={size}" if size else name
    for name in FILES
    for size in cfg.sizes(path_of(name)) or [""]
]


def load(case: str) -> cfg.ConfigDict:
    name, colon, argument = case.partition(":")
    return cfg.load(path_of(name) + colon + argument)


@pytest.mark.parametrize("case", CASES)
def test_it_loads_locked_and_survives_json(case):
    config = load(case)
    assert config.is_locked
    with pytest.raises((AttributeError, KeyError)):
        config.optim.learning_rate = 1.0
    assert cfg.flatten(cfg.from_json(cfg.to_json(config))) == cfg.flatten(config)


@pytest.mark.parametrize("case", CASES)
def test_every_field_of_base_is_there_with_its_type(case):
    """What engine and data read has one place and one type; a file adds sections, never renames."""
    base, own = cfg.flatten(load("base")), cfg.flatten(load(case))
    missing = [key for key in base if key not in own]
    assert not missing
    for key, value in base.items():
        assert type(own[key]) is type(value), f"{key} is {own[key]!r}; base has {value!r}"
    sections = set(load("base").keys()) | {"loss"}
    assert set(load(case).keys()) <= sections


@pytest.mark.parametrize("case", CASES)
def test_a_misspelt_field_is_refused_with_the_nearest_name(case):
    with pytest.raises(UsageError, match="'optim.lrr'.*did you mean 'lr'"):
        cfg.override(load(case), {"optim.lrr": "1e-3"})
    with pytest.raises(UsageError, match="train.steps='many'"):
        cfg.override(load(case), {"train.steps": "many"})


@pytest.mark.parametrize("name", FILES)
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(UsageError, match="'sise'"):
        cfg.load(f"{path_of(name)}:sise=smoke")


@pytest.mark.parametrize("name", [name for name in FILES if name not in FIXED])
def test_a_smoke_size_exists(name):
    assert load(f"{name}:size=smoke").train.steps <= 500
    listed = ", ".join(cfg.sizes(path_of(name)))
    with pytest.raises(UsageError, match=f"'no_such_size' is unknown; use one of {listed}."):
        load(f"{name}:size=no_such_size")


def test_the_package_ships_the_configs():
    """Through a link in a checkout; package_data names each file for the wheel."""
    assert cfg.shipped() == FILES
    for name in FILES:
        assert cfg.locate(name).resolve() == pathlib.Path(path_of(name))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["dalle_jax"].split()
    packaged = {path for pattern in patterns for path in (ROOT / "dalle_jax").glob(pattern)}
    assert set(cfg.SHIPPED.glob("*.py")) <= packaged


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith(("prior", "decoder"))])
def test_captions_have_the_form_that_the_clip_reads(case):
    config = load(case)
    clip = cfg.load(config.stages.clip_config)
    fields = ["text_len", "vocab_size", "add_bos_eos"]
    if config.task == "prior":
        fields += ["image_px", "crop"]  # it reads the CLIP's pictures too
    assert {f: config.data[f] for f in fields} == {f: clip.data[f] for f in fields}


# A prior has the shape of its CLIP too: test_every_config_can_be_planned_without_weights_or_data.
@pytest.mark.parametrize("case", [c for c in CASES if c != "base" and not c.startswith("prior")])
def test_the_model_of_every_config_has_shapes(case):
    """Fields fit their dataclass, sizes fit one another; nothing is computed, 12B included."""
    config = load(case)
    assert config.task in tasks.TASKS
    key, px = jax.random.key(0), config.data.image_px
    picture = jax.ShapeDtypeStruct((1, px, px, 3), "float32")
    text = jax.ShapeDtypeStruct((1, config.data.text_len), "int32")
    if config.task == "autoencode":
        variables = jax.eval_shape(build.autoencoder(config).init, key, picture)
    elif config.task == "clip":
        variables = jax.eval_shape(build.clip(config).init, key, picture, text)
    elif config.task == "diffusion":
        # Tracing the paper's takes seconds; tests/models/test_unet.py counts them.
        made = build.unet(config, 0 if config.loss.low_res_px else 64).config
        assert unet.flops(made, px) > 1e6
        return
    else:
        grid = {32: 8, 64: 16, 256: 32}[px]
        codes = jax.ShapeDtypeStruct((1, grid * grid), "int32")
        model = build.dalle(config, grid, 512)
        variables = jax.eval_shape(model.init, key, text, codes)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) > 10_000


@pytest.mark.parametrize("name", FILES)
def test_it_tells_how_to_run_it(name):
    text = ast.get_docstring(ast.parse(pathlib.Path(path_of(name)).read_text()))
    if name != "base":
        assert f"--config=configs/{name}.py" in text, "a config's docstring has its command"


def commands() -> list[str]:
    """`--config=…` as the documents write it."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.md")]
    found = set()
    for path in texts:
        found |= set(re.findall(r"--config=(configs/[\w.]+(?::[\w=,]+)?)", path.read_text()))
    return sorted(found)


@pytest.mark.parametrize("argument", commands())
def test_configs_named_in_documents_load(argument, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert isinstance(cfg.load(argument), ml_collections.ConfigDict)


def test_commands_named_in_documents_exist():
    from dalle_jax import __main__

    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/*.py")]
    texts += [*ROOT.glob("dalle_jax/**/*.py"), *ROOT.glob("launch/*")]
    known = __main__.commands()
    unknown = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        if path.is_file()
        for name in re.findall(r"python -m dalle_jax ([a-z_]+)", path.read_text())
        if name not in known
    ]
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize("case", [case for case in CASES if case != "base"])
def test_every_config_can_be_planned_without_weights_or_data(case, tmp_path, monkeypatch):
    """`plan` and dry runs make the task by shape, from any folder."""
    monkeypatch.chdir(tmp_path)
    config = load(case)
    task = tasks.make(config, shapes_only=True)
    assert all(spec.shape[0] == config.data.batch for spec in task.batch_spec.values())
    for leaf in jax.tree.leaves(task.frozen):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
    encodes = config.task == "dalle" and not config.stages.from_codes
    embeds = config.task == "prior" or (config.task == "diffusion" and not config.loss.low_res_px)
    assert (task.frozen is not None) == (encodes or embeds) and task.flops > 0


def test_training_still_demands_the_codec():
    config = load("dalle_12b")
    with pytest.raises(UsageError, match="stages.dvae is empty"):
        tasks.make(config)
