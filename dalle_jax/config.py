"""Config helpers: files with `:args`, sizes, typed overrides, validation, sweeps, JSON.

A config is a locked `ml_collections.ConfigDict`, returned by the `get_config(arg)` of a Python
file: one of `configs/`, which the package ships, or a user's own. Only cli, tasks and engine see
it; a model gets its own frozen dataclass built by `build`. Nothing here knows a model, a dataset or
a flag.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from dalle_jax.types import UsageError

ConfigDict = ml_collections.ConfigDict
T = TypeVar("T")

# A link to configs/ in a checkout; setup.cfg puts the files themselves into the wheel.
SHIPPED = pathlib.Path(__file__).with_name("configs")

ABSENT = "<absent>"  # in `differences`: the config does not have the field


def parse_args(text: str | None, **defaults: Any) -> ConfigDict:
    """Values of a config file's `:size=smoke,fast` argument, typed like their defaults.

    Args:
      text: the part after the colon, or None. `name` alone means True for a bool default.
      **defaults: every argument the file takes, with its default.

    Raises:
      UsageError: for an argument that the file does not take or cannot be parsed.
    """
    values = dict(defaults)
    for item in filter(None, (text or "").split(",")):
        name, has_value, value = item.partition("=")
        if name not in defaults:
            raise UsageError(
                f"config argument {name!r} is unknown;{_suggest(name, defaults)} "
                f"this file takes {_listed(defaults)}."
            )
        values[name] = _parse(name, value if has_value else "true", defaults[name])
    return ConfigDict(values)


def size_overrides(
    args: ConfigDict, sizes: Mapping[str, dict[str, Any]], **fields: str
) -> dict[str, Any]:
    """The overrides that a config file's arguments ask for: those of the size, then the others.

    Args:
      args: values of `parse_args`; `args.size` is a key of `sizes`.
      sizes: the dotted overrides of each size.
      **fields: argument -> the dotted field that it sets; 0 leaves the field to the size.

    Raises:
      UsageError: for an unknown size, with the list of sizes.
    """
    if args.size not in sizes:
        raise UsageError(f"size={args.size!r} is unknown; use one of {', '.join(sizes)}.")
    given = {field: args[name] for name, field in fields.items() if args[name]}
    return {**sizes[args.size], **given}


def shipped() -> list[str]:
    """Names of the configs that the package ships, e.g. `dalle`, in alphabetical order."""
    return sorted(file.stem for file in SHIPPED.glob("*.py"))


def locate(path: str) -> pathlib.Path:
    """The file of a config: the one at `path` if it exists, otherwise the shipped one of that name.

    Args:
      path: a .py file or a shipped config, with or without arguments; `dalle`, `dalle.py` and
        `configs/dalle.py:size=smoke` all name the shipped configs/dalle.py.

    Raises:
      UsageError: if there is neither, with the nearest name.
    """
    file = pathlib.Path(path.split(":", 1)[0])
    if file.suffix == ".py" and file.is_file():
        return file
    name = file.as_posix().removeprefix("configs/").removesuffix(".py")
    if name in shipped():
        return SHIPPED / f"{name}.py"
    beside = [neighbour.name for neighbour in file.parent.glob("*.py")]
    near = _suggest(file.name, beside) or _suggest(name, shipped())
    raise UsageError(
        f"config {file} does not exist, neither as a .py file nor as a shipped config;{near} "
        f"shipped are {_listed(shipped())}."
    )


def load(path: str) -> ConfigDict:
    """The locked config that `path` describes: a file or a shipped name, as `dalle:size=smoke`.

    Raises:
      UsageError: as `locate`, and if the file has no get_config or refuses its arguments.
    """
    config = start_from(path)
    config.lock()
    return config


def start_from(path: str) -> ConfigDict:
    """Like `load`, but unlocked, for config files of one's own: `c = cfg.start_from("dalle")`."""
    return _module(locate(path)).get_config(_argument(path))


def sibling(file: str, name: str):
    """The module `name`.py beside a config file: `base = cfg.sibling(__file__, "base")`.

    Config files are loaded by path, so `import base` would depend on the working directory.
    """
    return _module(locate(str(pathlib.Path(file).with_name(f"{name}.py"))))


def sizes(path: str) -> list[str]:
    """The sizes of a config file: the keys of its `SIZES`, none for a file without."""
    return list(getattr(_module(locate(path)), "SIZES", ()))


def load_hyper(path: str) -> list[dict[str, Any]]:
    """The sweep of a config file: what its `get_hyper()` returns, a list of dotted overrides."""
    module = _module(locate(path))
    if not hasattr(module, "get_hyper"):
        raise UsageError(
            f"{path} has no get_hyper(); give the values with --sweep, or see configs/dvae.py."
        )
    return list(module.get_hyper())


def override(config: ConfigDict, overrides: dict[str, Any]) -> ConfigDict:
    """A locked copy of `config` with dotted fields replaced; see `apply`."""
    config = ConfigDict(config.to_dict())
    apply(config, overrides)
    config.lock()
    return config


def apply(config: ConfigDict, *overrides: dict[str, Any]) -> None:
    """Sets dotted fields of an unlocked config; where several dicts name a field, the last wins.

    Args:
      config: changed in place.
      *overrides: dotted field -> value, typed like what it replaces. A function is called with the
        config when all plain values are set: the field follows from others.

    Raises:
      UsageError: for an unknown field (with the nearest known one) or a value of another type.
    """
    merged = {key: value for values in overrides for key, value in values.items()}
    for key, value in sorted(merged.items(), key=lambda item: callable(item[1])):
        node, *path = config, *key.split(".")
        for i, name in enumerate(path):
            if not isinstance(node, ConfigDict) or name not in node:
                keys = list(node.keys()) if isinstance(node, ConfigDict) else []
                raise UsageError(
                    f"config has no field {key!r};{_suggest(name, keys)} "
                    f"{'.'.join(path[:i]) or 'the top level'} has {_listed(keys)}."
                )
            if i == len(path) - 1:
                value = value(config) if callable(value) else value
                node[name] = _parse(key, value, node[name])
            else:
                node = node[name]


def build(cls: type[T], values: ConfigDict, **extra: Any) -> T:
    """A frozen dataclass from a config section; its own __post_init__ validates the values.

    Raises:
      UsageError: naming fields that the class does not have.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    given = {**values.to_dict(), **extra}
    for name in given:
        if name not in names:
            raise UsageError(
                f"{cls.__name__} has no field {name!r};{_suggest(name, names)} "
                f"it has {_listed(names)}."
            )
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return cls(**given)


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaf values, tuples as lists: the form in which configs are compared."""
    flat = {}
    for key in sorted(config.keys()):
        value = config[key]
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, (tuple, list)) else value
    return flat


def differences(old: ConfigDict, new: ConfigDict, ignore: Iterable[str] = ()) -> dict[str, tuple]:
    """Fields whose values differ: dotted key -> (old, new), `ABSENT` for a field that one lacks.

    `ignore` holds prefixes of keys that are not compared.
    """
    ignore = tuple(ignore)
    a, b = flatten(old), flatten(new)
    return {
        key: (a.get(key, ABSENT), b.get(key, ABSENT))
        for key in sorted(a.keys() | b.keys())
        if a.get(key, ABSENT) != b.get(key, ABSENT) and not key.startswith(ignore)
    }


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON; `from_json` gives an equal config back."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """A locked config from `to_json`'s text."""
    config = ConfigDict(json.loads(text))
    config.lock()
    return config


def sweep(key: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    """One axis of a sweep: one override per value."""
    return [{key: value} for value in values]


def fixed(key: str, value: Any) -> list[dict[str, Any]]:
    """An axis of one value: an override that all units of a sweep share."""
    return [{key: value}]


def product(*axes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every combination of the axes."""
    return [{k: v for unit in units for k, v in unit.items()} for units in itertools.product(*axes)]


def zipped(*axes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The axes side by side.

    Raises:
      UsageError: if their lengths differ.
    """
    if len({len(axis) for axis in axes}) > 1:
        raise UsageError(f"zipped axes have lengths {[len(axis) for axis in axes]}; expected one.")
    return [{k: v for unit in units for k, v in unit.items()} for units in zip(*axes, strict=True)]


def _argument(path: str) -> str | None:
    return path.split(":", 1)[1] if ":" in path else None


def _module(file: pathlib.Path):
    spec = importlib.util.spec_from_file_location(f"dalle_jax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError(f"{file} has no get_config(arg=None); every config file needs one.")
    return module


def _parse(key: str, value: Any, like: Any) -> Any:
    """`value` (text from a command line, or already typed) as the type of `like`."""
    kind = type(like)
    try:
        if isinstance(like, bool):
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if isinstance(like, int):
            if float(value) != int(float(value)):
                raise ValueError
            return int(float(value))  # 1e5 is how people write step counts
        if isinstance(like, float):
            return float(value)
        if isinstance(like, (tuple, list)):
            items = value if isinstance(value, (tuple, list)) else _items(value)
            # An empty one does not say of what: 4,8 are numbers, row,conv are words.
            return kind(_parse(key, item, like[0]) if like else _literal(item) for item in items)
        if isinstance(like, str):
            return str(value)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"{key}={value!r} is not a valid {kind.__name__}; its default is {like!r}."
        ) from error
    return value


def _items(text: str) -> list[str]:
    return [item.strip(" '\"") for item in str(text).strip("()[]").split(",") if item.strip()]


def _literal(item: Any) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(item) if isinstance(item, str) else item
    return item


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [str(k) for k in known], n=1)
    return f" did you mean {near[0]!r}?" if near else ""


def _listed(names: Iterable[str]) -> str:
    names = sorted(str(name) for name in names)
    return ", ".join(names) if names else "nothing"
