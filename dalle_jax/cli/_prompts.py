"""What drawing commands share: prompts, their tokens and folders, progress, their command line.

No command itself; it has no SUMMARY.
"""

import argparse
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Callable

from dalle_jax.cli import _flags

MAX_CHARS = 1000  # 256 text slots at the paper's size hold about as many
_FIRST_PIECE = 260  # ids below are control ids and bytes: characters unseen in training


def add_arguments(group) -> None:
    """Adds --prompt and --prompts_file."""
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    group.add_argument("--prompts_file", metavar="FILE", help="one prompt per line, UTF-8")


def given(args: argparse.Namespace) -> list[str]:
    """The prompts in order, each stripped, none empty.

    Raises:
      UsageError: without any, for an empty or endless one, or a file that cannot be read.
    """
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
        raise UsageError('there is nothing to draw; give --prompt="…" or --prompts_file=FILE.')
    return [checked(prompt) for prompt in prompts]


def checked(prompt: str) -> str:
    """The prompt, stripped; UsageError if it is empty or endless."""
    from dalle_jax.types import UsageError

    if not prompt.strip():
        raise UsageError(f"prompt {prompt!r} is empty; expected a caption.")
    if len(prompt) > MAX_CHARS:
        raise UsageError(
            f"the prompt {short(prompt)!r} has {len(prompt):,} characters; at most "
            f"{MAX_CHARS:,} are taken: shorten it."
        )
    return prompt.strip()


def tokens(stage, prompts: list[str], name: str):
    """Ids [P, T] by the stage's own tokenizer; warns of what it will not read."""
    from dalle_jax.data import tokenizers
    from dalle_jax.types import UsageError

    own = stage.tokenizer
    data = stage.config.data
    for prompt, row in zip(prompts, own.pieces(prompts), strict=True):
        if not any(i >= _FIRST_PIECE and own.decode([i]).strip() for i in row):
            raise UsageError(
                f"{name} knows no character of the prompt {short(prompt)!r}; its training "
                "captions were of another script: describe the picture in their words."
            )
        unknown = [c for c in dict.fromkeys(prompt) if c.strip() and not _knows(own, c)]
        if unknown:
            warn(f"{name} never saw {' '.join(unknown)} in training; in {short(prompt)!r}.")
        if tokenizers.overlong(row, data.text_len, data.add_bos_eos):
            warn(
                f"{name} reads only the first {data.text_len - 2 * data.add_bos_eos} of "
                f"{len(row)} tokens of {short(prompt)!r}."
            )
    return own.encode(prompts, data.text_len, add_bos_eos=data.add_bos_eos)


def _knows(own, character: str) -> bool:
    return any(i >= _FIRST_PIECE and own.decode([i]).strip() for i in own.pieces([character])[0])


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
    text = f"{label}: {done}/{total} drawn, {rate:.1f}/s"
    if done < total:
        text += f", about {(total - done) / rate:.0f} s left"
    is_terminal = sys.stderr.isatty()
    end = "\r" if is_terminal and done < total else "\n"
    print(text.ljust(79) if is_terminal else text, end=end, file=sys.stderr, flush=True)


def short(prompt: str) -> str:
    """At most 60 letters of it."""
    return prompt if len(prompt) <= 60 else prompt[:57] + "…"


def warn(text: str) -> None:
    """A line on stderr, by one process of several."""
    import jax

    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr)
