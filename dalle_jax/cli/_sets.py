"""Flags that select a prepared set for a trained stage; the default is the stage's own set."""

import argparse

_KEYS = ("source", "data_dir", "image_key", "caption_key", "label_template")


def add_flags(parser: argparse.ArgumentParser, stage: str, verb: str) -> None:
    """Adds --source, --data_dir and the keys of a set."""
    parser.add_argument("--source", metavar="SET", help=f"set to {verb} (default: {stage}'s own)")
    parser.add_argument(
        "--data_dir", metavar="DIR", help=f"parent of the prepared sets (default: {stage}'s own)"
    )
    for key in _KEYS[2:]:
        parser.add_argument(f"--{key}", help=f"as data.{key} of a config")


def data_config(args: argparse.Namespace, stage_config):
    """A copy of the data section of the stage's config, with `add_flags`' flags applied."""
    from dalle_jax.config import ConfigDict

    config = ConfigDict(stage_config.data.to_dict())
    for key in _KEYS:
        if getattr(args, key) is not None:
            config[key] = getattr(args, key)
    return config
