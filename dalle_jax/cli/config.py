"""Prints a config: every field, or what it changes. Without arguments, lists the shipped configs.

  python -m dalle_jax config
  python -m dalle_jax config dalle:size=emoji
  python -m dalle_jax config dalle:size=emoji --diff
  python -m dalle_jax config dalle:size=emoji dalle:size=shapes

A config is a shipped name (`dalle`) or a file (`mine/big.py`), with its arguments after a colon.
"""

import argparse
import ast
import io
import json
import pathlib
import tokenize

_STARTS = ("cfg.sibling", "cfg.start_from")  # calls by which a config file starts from another

SUMMARY = "list the configs, or print one: every field, or what it changes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG[:ARGS]",
        help="e.g. dalle:size=emoji; any field can be changed with --config.SECTION.FIELD=VALUE",
    )
    parser.add_argument(
        "against", nargs="?", metavar="OTHER[:ARGS]", help="print only the differences from OTHER"
    )
    parser.add_argument(
        "--diff", action="store_true", help="print only the differences from base, or from OTHER"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the list, the config or its differences."""
    from dalle_jax import config as cfg
    from dalle_jax.types import UsageError

    if not args.config:
        if args.diff or args.overrides:
            raise UsageError("there is no config to print; name one, e.g. `config dalle --diff`.")
        names = cfg.shipped()
        configs = {name: {"about": _about(name), "sizes": cfg.sizes(name)} for name in names}
        print(json.dumps(configs, indent=2) if args.json else _listing(configs))
        return 0
    config = cfg.override(cfg.load(args.config), args.overrides)
    if args.diff or args.against:
        other = args.against or "base"
        changes = cfg.differences(cfg.load(other), config)
        if args.json:
            print(json.dumps({key: list(pair) for key, pair in changes.items()}, indent=2))
            return 0
        lines = [f"{key} = {_shown(new)}" for key, (_, new) in changes.items()]
        notes = [f"{other}: {_shown(old)}" for old, _ in changes.values()]
        print(_aligned(lines, notes) if lines else f"{args.config} equals {other}.")
        return 0
    comments = _comments(cfg.locate(args.config))
    print(cfg.to_json(config) if args.json else _text(config.to_dict(), comments))
    return 0


def _about(name: str) -> str:
    from dalle_jax import config as cfg

    source = cfg.locate(name).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


def _listing(configs: dict[str, dict]) -> str:
    lines = []
    for name, config in configs.items():
        lines.append(f"{name}\n    {config['about']}")
        if config["sizes"]:
            lines.append(f"    size={', '.join(config['sizes'])}")
    return "\n".join(lines)


def _text(config: dict, comments: dict[str, str]) -> str:
    """The config in sections, each field with its comment; fields without a section come first."""
    sections = [{key: value for key, value in config.items() if not isinstance(value, dict)}]
    for name, section in config.items():
        if isinstance(section, dict):
            sections.append({f"{name}.{key}": value for key, value in section.items()})
    parts = []
    for fields in sections:
        lines = [f"{key} = {value!r}" for key, value in fields.items()]
        parts.append(_aligned(lines, [comments.get(key, "") for key in fields]))
    return "\n\n".join(filter(None, parts))


def _shown(value) -> str:
    from dalle_jax import config as cfg

    return "absent" if value == cfg.ABSENT else repr(value)


def _aligned(lines: list[str], notes: list[str]) -> str:
    width = max((len(line) for line in lines if len(line) <= 40), default=0)
    pairs = zip(lines, notes, strict=True)
    return "\n".join(f"{line:<{width}}  # {note}" if note else line for line, note in pairs)


def _comments(file: pathlib.Path) -> dict[str, str]:
    """Dotted field -> the comment behind its default, from a file and those that it starts from."""
    from dalle_jax import config as cfg

    source = file.read_text(encoding="utf-8")
    behind = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.strip() != token.string
    }
    comments, parents = {}, {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in _STARTS:
            name = getattr(node.args[-1], "value", None)  # None: an expression
            if isinstance(name, str):
                beside = file.with_name(f"{name}.py")
                parents |= _comments(beside if beside.is_file() else cfg.locate(name))
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        field = ast.unparse(node.targets[0]).removeprefix("c.")
        fields = {field: node.value} | {
            f"{field}.{keyword.arg}": keyword.value
            for call in ast.walk(node.value)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "dict"
            for keyword in call.keywords
        }
        for key, value in fields.items():
            if value.end_lineno in behind:
                comments[key] = behind[value.end_lineno]
    return comments | parents
