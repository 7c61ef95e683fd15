"""`python -m dalle_jax COMMAND …`, or `dalle-jax COMMAND …`: finds cli/COMMAND.py and runs it.

A command is a module of `dalle_jax.cli` with `SUMMARY`, `add_arguments(parser)` and `run(args)`.
Nothing heavy is imported here or at the top of a command, so that --help answers at once.

Exit codes: 0 done · 1 failed · 2 bad input (the text says what to do) · 130 Ctrl-C · 143 SIGTERM.
"""

import argparse
import ast
import importlib
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

DESCRIPTION = "DALL-E in JAX: prepare data, train the stages, sample pictures from text."


def commands() -> dict[str, str]:
    """Command name -> its one-line summary, read from the source without importing it."""
    summaries = {}
    for file in sorted((pathlib.Path(__file__).parent / "cli").glob("[a-z]*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            is_assign = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if is_assign and node.targets[0].id == "SUMMARY":
                summaries[file.stem] = ast.literal_eval(node.value)
    return summaries


def program() -> NoReturn:
    """The process: `main` after what concerns the whole process; the console script's entry."""
    from dalle_jax.cli import _malloc

    _malloc.keep_freed_memory()
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview(known))
        return 0
    name, rest = argv[0], argv[1:]
    if name == "--version":
        from importlib import metadata

        print(f"dalle-jax {metadata.version('dalle-jax')}")
        return 0
    if name not in known:
        from dalle_jax.cli import _flags

        near = _flags.nearest(name, known)
        print(f"error: no command {name!r}{near}.\n\n{_overview(known)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"dalle_jax.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"{_invocation()} {name}",
        description=module.__doc__ or module.SUMMARY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --config.optim.lr must not be taken for an abbreviation
    )
    module.add_arguments(parser)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        from dalle_jax.cli import _flags

        rest, overrides = _flags.split_overrides(rest)
        args = parser.parse_args(rest)
        args.overrides = overrides
        if overrides and not hasattr(args, "config"):
            parser.error(f"{name} takes no --config, so no --config.* either")
        _flags.quiet_libtpu()
        return module.run(args) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `… | head` closed the pipe
        sys.stderr.close()
        return 1
    except ImportError as error:
        # fsspec's words for gs://, s3:// and the like: the package is the extra's or the user's.
        if not str(error).startswith("Please install"):
            raise
        print(f"error: {error}: e.g. `pip install gcsfs` for gs://.", file=sys.stderr)
        return 2
    except ValueError as error:
        from dalle_jax.types import UsageError  # imports jax

        if not isinstance(error, UsageError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _overview(known: dict[str, str]) -> str:
    width = max(map(len, known), default=0)
    lines = [f"  {name:<{width}}  {summary}" for name, summary in known.items()]
    return (
        f"{DESCRIPTION}\n\nusage: {_invocation()} COMMAND [arguments]\n\ncommands:\n"
        + "\n".join(lines)
        + f"\n\n`{_invocation()} COMMAND --help` explains a command's arguments."
    )


def _invocation() -> str:
    """How this program was started, as a shell takes it again."""
    is_script = pathlib.Path(sys.argv[0]).stem == "dalle-jax"
    return "dalle-jax" if is_script else "python -m dalle_jax"


if __name__ == "__main__":
    program()
