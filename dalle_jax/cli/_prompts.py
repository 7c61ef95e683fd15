"""What sampling commands share: prompts and their folders, progress, their command line."""

import argparse
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Callable

from dalle_jax.cli import _flags


def add_arguments(group) -> None:
    """Adds --prompt and --prompts_file."""
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    group.add_argument("--prompts_file", metavar="FILE", help="one prompt per line, UTF-8")


def given(args: argparse.Namespace) -> list[str]:
    """The prompts in order, each stripped, none empty.

    Raises:
      UsageError: without any, for an empty or endless one, or a file that cannot be read.
    """
    from dalle_jax.pipelines import reading
    from dalle_jax.types import UsageError

    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            lines = pathlib.Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--prompts_file={args.prompts_file} cannot be read ({error}); expected a UTF-8 "
                "text file with one prompt per line."
            ) from error
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise UsageError('there is nothing to sample; give --prompt="…" or --prompts_file=FILE.')
    return [reading.checked(prompt) for prompt in prompts]


def folders(out: pathlib.Path, prompts: list[str]) -> list[pathlib.Path]:
    """One folder name per prompt: its words, numbered where two would be the same."""
    names: list[str] = []
    for prompt in prompts:
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "prompt"
        number, name = 2, slug
        while name in names:
            number, name = number + 1, f"{slug}-{number}"
        names.append(name)
    return [out / name for name in names]


def command(
    name: str, add: Callable[[argparse.ArgumentParser], None], args: argparse.Namespace
) -> str:
    """The command line that does this again, by the flags that `add` declares."""
    parser = argparse.ArgumentParser()
    add(parser)
    skip = ("compilation_cache", "json", *_flags.DISTRIBUTED)
    words = ["python", "-m", "dalle_jax", name]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in skip or value in (None, action.default):
            continue
        flag = action.option_strings[0]
        if value is True:
            words.append(flag)
        else:
            words += [f"{flag}={v}" for v in (value if isinstance(value, list) else [value])]
    return shlex.join(words)


def progress(label: str, start: float, total: int, done: int) -> None:
    """A line on stderr per batch; on a terminal it replaces itself."""
    rate = done / max(time.monotonic() - start, 1e-9)
    text = f"{label}: {done}/{total} sampled, {rate:.1f}/s"
    if done < total:
        text += f", about {(total - done) / rate:.0f} s left"
    is_terminal = sys.stderr.isatty()
    end = "\r" if is_terminal and done < total else "\n"
    print(text.ljust(79) if is_terminal else text, end=end, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A line on stderr, by one process of several."""
    import jax

    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr)
