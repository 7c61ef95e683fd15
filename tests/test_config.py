"""Configs: files and shipped names, sizes, typed overrides, refused typos, JSON and sweeps."""

import dataclasses

import pytest

from dalle_jax import config as cfg
from dalle_jax.types import UsageError


@pytest.fixture
def base():
    c = cfg.ConfigDict(
        dict(
            task="dalle",
            optim=dict(lr=1e-3, steps=10, is_on=False, kinds=("row", "column")),
            deep=dict(er=dict(width=64)),
        )
    )
    c.lock()
    return c


def test_overrides_are_typed_like_what_they_replace(base):
    got = cfg.override(
        base,
        {
            "optim.lr": "3e-4",
            "optim.steps": "1e5",
            "optim.is_on": "true",
            "optim.kinds": "row,conv",
            "deep.er.width": 128,
            "task": "clip",
        },
    )
    assert got.optim.lr == 3e-4 and got.optim.steps == 100_000
    assert isinstance(got.optim.steps, int) and got.optim.is_on is True
    assert tuple(got.optim.kinds) == ("row", "conv")
    assert got.deep.er.width == 128 and got.task == "clip"
    assert base.optim.lr == 1e-3, "the original must not change"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4", (4,)),
        ("4,8", (4, 8)),
        ("0.5,1", (0.5, 1)),
        ("(row,conv)", ("row", "conv")),
        ("()", ()),
    ],
)
def test_an_empty_tuple_takes_numbers_and_words(text, expected):
    got = cfg.override(
        cfg.ConfigDict({"model": {"attention_px": ()}}), {"model.attention_px": text}
    )
    assert tuple(got.model.attention_px) == expected
    assert [type(x) for x in got.model.attention_px] == [type(x) for x in expected]


def test_a_result_is_locked(base):
    with pytest.raises((AttributeError, KeyError)):
        cfg.override(base, {}).optim.learning_rate = 1


@pytest.mark.parametrize(
    "key, value, text",
    [
        ("optim.lrr", 1, "did you mean 'lr'"),
        ("optin.lr", 1, "did you mean 'optim'"),
        ("optim.lr.x", 1, "no field"),
        ("optim.steps", "1.5", "not a valid int"),
        ("optim.steps", "many", "not a valid int"),
        ("optim.is_on", "maybe", "not a valid bool"),
    ],
)
def test_bad_overrides_are_refused(base, key, value, text):
    with pytest.raises(UsageError, match=text):
        cfg.override(base, {key: value})


def test_arguments_of_a_config_file():
    args = cfg.parse_args("size=smoke,fast,steps=7", size="base", fast=False, steps=1, lr=0.1)
    assert (args.size, args.fast, args.steps, args.lr) == ("smoke", True, 7, 0.1)
    assert cfg.parse_args(None, size="base").size == "base"
    with pytest.raises(UsageError, match="did you mean 'size'"):
        cfg.parse_args("sise=smoke", size="base")


def test_a_function_follows_from_the_other_overrides(base):
    """Whatever their order, also from the values of a later dict; a later dict may replace it."""
    changes = {"deep.er.width": lambda c: c.optim.steps // 4, "optim.steps": 40}
    got = cfg.ConfigDict(base.to_dict())
    cfg.apply(got, changes, {"optim.steps": 80})
    assert (got.optim.steps, got.deep.er.width) == (80, 20)
    cfg.apply(got, changes, {"deep.er.width": 7})
    assert (got.optim.steps, got.deep.er.width) == (40, 7)
    with pytest.raises(UsageError, match="did you mean 'lr'"):
        cfg.apply(got, {"optim.lrr": lambda c: 1.0})


def test_a_size_is_overridden_by_the_other_arguments():
    sizes = {"smoke": {"train.steps": 60, "model.width": 8}, "big": {"model.width": 512}}
    args = cfg.parse_args("size=smoke,steps=7", size="big", steps=0, width=0)
    fields = dict(steps="train.steps", width="model.width")
    assert cfg.size_overrides(args, sizes, **fields) == {"train.steps": 7, "model.width": 8}
    assert sizes["smoke"]["train.steps"] == 60
    with pytest.raises(UsageError, match="size='huge' is unknown; use one of smoke, big."):
        cfg.size_overrides(cfg.parse_args("size=huge", size="big"), sizes)


@pytest.mark.parametrize("path", ["dalle", "dalle.py", "configs/dalle.py", "./configs/dalle.py"])
def test_a_shipped_config_is_named_from_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cfg.locate(path) == cfg.SHIPPED / "dalle.py"
    assert cfg.load(f"{path}:size=emoji").data.source == "emoji"


def test_a_file_at_the_path_comes_before_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "configs" / "dalle.py"
    file.parent.mkdir()
    file.write_text(
        "from dalle_jax import config as cfg\n"
        "def get_config(arg=None):\n"
        "    c = cfg.start_from('dalle:size=emoji')\n"
        "    c.data.source = 'mine'\n"
        "    c.extra = cfg.ConfigDict(dict(width=1))\n"
        "    return c\n"
    )
    config = cfg.load("configs/dalle.py")
    assert config.is_locked
    shipped = cfg.load("dalle:size=emoji")
    assert cfg.differences(shipped, config) == {
        "data.source": ("emoji", "mine"),
        "extra.width": (cfg.ABSENT, 1),
    }


@pytest.mark.parametrize(
    "path, near",
    [
        ("dale:size=emoji", "did you mean 'dalle'"),
        ("configs/dalle_13b.py", "did you mean 'dalle_12b'"),
        ("elsewhere/dalle.py", "shipped are base, "),
        ("mine", "did you mean 'mine.py'"),
        ("mien.py", "did you mean 'mine.py'"),
    ],
)
def test_a_config_that_does_not_exist_is_refused_with_the_nearest_name(
    path, near, tmp_path, monkeypatch
):
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "mine").write_text("")  # not a .py file
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"{path.split(':')[0]} does not exist, .*{near}"):
        cfg.load(path)


def test_load_finds_siblings_whatever_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "base.py").write_text(
        "from dalle_jax import config as cfg\n"
        "def get_config(arg=None):\n"
        "    return cfg.ConfigDict(dict(width=cfg.parse_args(arg, width=4).width, lr=0.1))\n"
    )
    (tmp_path / "child.py").write_text(
        "from dalle_jax import config as cfg\n"
        "base = cfg.sibling(__file__, 'base')\n"
        "def get_config(arg=None):\n"
        "    return base.get_config(arg)\n"
        "def get_hyper():\n"
        "    return cfg.product(cfg.sweep('lr', [1, 2]), cfg.sweep('width', [8]))\n"
    )
    monkeypatch.chdir("/")
    assert cfg.load(f"{tmp_path}/child.py:width=16").width == 16
    assert cfg.load_hyper(f"{tmp_path}/child.py") == [{"lr": 1, "width": 8}, {"lr": 2, "width": 8}]
    with pytest.raises(UsageError, match="get_hyper"):
        cfg.load_hyper(f"{tmp_path}/base.py")
    with pytest.raises(UsageError, match="does not exist, .* did you mean 'base.py'"):
        cfg.load(f"{tmp_path}/bse.py")


def test_json_round_trip_and_differences(base):
    again = cfg.from_json(cfg.to_json(base))
    assert cfg.differences(base, again) == {}, "tuples come back as lists and are equal"
    changed = cfg.override(base, {"optim.lr": 2e-3, "deep.er.width": 1})
    assert cfg.differences(base, changed) == {
        "optim.lr": (1e-3, 2e-3),
        "deep.er.width": (64, 1),
    }
    assert list(cfg.differences(base, changed, ignore=["deep."])) == ["optim.lr"]


def test_build_names_unknown_fields():
    @dataclasses.dataclass(frozen=True)
    class Net:
        width: int
        kinds: tuple = ()

    built = cfg.build(Net, cfg.ConfigDict(dict(kinds=["row"])), width=3)
    assert built == Net(3, ("row",))
    with pytest.raises(UsageError, match="Net has no field 'widht'; did you mean 'width'"):
        cfg.build(Net, cfg.ConfigDict(dict(widht=3)))


def test_sweeps():
    a, b = cfg.sweep("a", [1, 2]), cfg.sweep("b", [3, 4])
    assert len(cfg.product(a, b)) == 4
    assert cfg.product(a, cfg.fixed("c", 0)) == [{"a": 1, "c": 0}, {"a": 2, "c": 0}]
    assert cfg.zipped(a, b) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(UsageError, match="lengths"):
        cfg.zipped(a, cfg.sweep("c", [1]))
