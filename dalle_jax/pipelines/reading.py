"""Prompts as a stage reads them: refused if nothing is read, with warnings if part is lost."""

from collections.abc import Callable, Sequence

import numpy as np

from dalle_jax.data import tokenizers
from dalle_jax.stages.run import Stage
from dalle_jax.types import UsageError

MAX_CHARS = 1000  # 256 text positions at the paper's size hold about as many
_FIRST_PIECE = 260  # ids below are control ids and bytes: characters unseen in training


def checked(prompt: str) -> str:
    """The prompt, stripped.

    Raises:
      UsageError: if it is empty or longer than MAX_CHARS.
    """
    if not prompt.strip():
        raise UsageError(f"prompt {prompt!r} is empty; expected a caption.")
    if len(prompt) > MAX_CHARS:
        raise UsageError(
            f"the prompt {short(prompt)!r} has {len(prompt):,} characters; at most "
            f"{MAX_CHARS:,} are taken: shorten it."
        )
    return prompt.strip()


def read(
    stage: Stage, prompts: Sequence[str], name: str, warn: Callable[[str], None]
) -> np.ndarray:
    """Ids int32 [P, T] of prompts, by the stage's own tokenizer.

    Args:
      stage: that reads them.
      prompts: P captions.
      name: of the stage, for messages.
      warn: called with what the stage does not read: unseen characters, tokens beyond its length.

    Raises:
      UsageError: for a prompt that is empty or endless, or of which no character is known.
    """
    tokenizer, data = stage.tokenizer, stage.config.data
    prompts = [checked(prompt) for prompt in prompts]
    for prompt, row in zip(prompts, tokenizer.pieces(prompts), strict=True):
        if not any(_is_known(tokenizer, i) for i in row):
            raise UsageError(
                f"{name} knows no character of the prompt {short(prompt)!r}; its training "
                "captions were of another script: describe the picture in their words."
            )
        unknown = [
            c
            for c in dict.fromkeys(prompt)
            if c.strip() and not any(_is_known(tokenizer, i) for i in tokenizer.pieces([c])[0])
        ]
        if unknown:
            warn(f"{name} never saw {' '.join(unknown)} in training; in {short(prompt)!r}.")
        if tokenizers.overlong(row, data.text_len, data.add_bos_eos):
            warn(
                f"{name} reads only the first {data.text_len - 2 * data.add_bos_eos} of "
                f"{len(row)} tokens of {short(prompt)!r}."
            )
    return stage.tokenize(prompts)


def short(prompt: str) -> str:
    """At most 60 letters of a prompt."""
    return prompt if len(prompt) <= 60 else prompt[:57] + "…"


def _is_known(tokenizer: tokenizers.Tokenizer, piece: int) -> bool:
    return piece >= _FIRST_PIECE and bool(tokenizer.decode([piece]).strip())
