"""What commands share: configs with overrides, the compilation cache, lists of names."""

import argparse
import difflib
import os
from collections.abc import Iterable, Sequence

DEFAULT_CACHE = "~/.cache/dalle_jax/jax"

# Flags of `add_distributed`: they say how a command was started and not what it does.
DISTRIBUTED = (
    "distributed", "coordinator", "process_id", "process_count", "start_timeout_s",
    "heartbeat_timeout_s",
)  # fmt: skip


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --config; `--config.a.b=value` overrides are collected by `__main__`."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE[:ARGS]",
        help="shipped config or file, e.g. dalle:size=smoke. Any field can be changed with "
        "--config.SECTION.FIELD=VALUE, e.g. --config.optim.lr=3e-4",
    )


def add_workdir(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds a required --workdir."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help=help)


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Adds --compilation_cache."""
    parser.add_argument(
        "--compilation_cache",
        metavar="DIR",
        default=os.environ.get("JAX_COMPILATION_CACHE_DIR", DEFAULT_CACHE),
        help="compiled programs that took over 1 s are kept here and reused; '' = off "
        "(default: $JAX_COMPILATION_CACHE_DIR or %(default)s)",
    )


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """Adds the flags by which one of several processes finds the others."""
    group = parser.add_argument_group("many processes (the same command on every host)")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="ask SLURM, TPU metadata, Open MPI or Kubernetes for the other processes",
    )
    group.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="or by hand: where process 0 is,"
    )
    group.add_argument("--process_id", type=int, metavar="I", help="the number of this one,")
    group.add_argument("--process_count", type=int, metavar="N", help="and how many there are")
    group.add_argument(
        "--start_timeout_s",
        type=int,
        default=300,
        metavar="S",
        help="wait so long for all of them (default: %(default)s)",
    )
    group.add_argument(
        "--heartbeat_timeout_s",
        type=int,
        default=100,
        metavar="S",
        help="a process that is silent for so long is dead, and ends all (default: %(default)s)",
    )


def job(args: argparse.Namespace, *, takes_notice: bool = False):
    """`distributed.job` as `add_distributed`'s flags describe it; nothing without them.

    Raises:
      UsageError: for flags that do not fit together.
    """
    from dalle_jax.engine import distributed

    given = (args.coordinator or None, args.process_id, args.process_count)
    start = None
    if args.distributed or given != (None, None, None):
        start = distributed.Start(
            coordinator=args.coordinator,
            process_id=args.process_id,
            process_count=args.process_count,
            timeout_s=args.start_timeout_s,
            heartbeat_timeout_s=args.heartbeat_timeout_s,
        )
    return distributed.job(start, takes_notice=takes_notice)


def use_cache(args: argparse.Namespace) -> None:
    """Turns the persistent compilation cache on where `add_cache`'s flag says."""
    import jax

    if args.compilation_cache:
        folder = os.path.expanduser(args.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def quiet_libtpu() -> None:
    """Keeps libtpu, where `plan` has it installed, quiet on a machine without a TPU."""
    from dalle_jax.planning import libtpu_env

    libtpu_env.set_environment()


def load_config(args: argparse.Namespace):
    """The locked config of --config with the --config.* overrides applied.

    Raises:
      UsageError: for a missing file, an unknown field or a value of the wrong type.
    """
    from dalle_jax import config

    return config.override(config.load(args.config), args.overrides)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.a.b=value` (or `--config.a.b value`) from the other arguments.

    Raises:
      UsageError: for an override without a value.
    """
    rest, overrides = [], {}
    items = iter(argv)
    for item in items:
        if not item.startswith("--config."):
            rest.append(item)
            continue
        key, has_value, value = item.removeprefix("--config.").partition("=")
        if not has_value:
            value = next(items, None)
            if value is None or value.startswith("--"):
                from dalle_jax.types import UsageError

                raise UsageError(f"--config.{key} has no value; write --config.{key}=VALUE.")
        overrides[key] = value
    return rest, overrides


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'train'?` or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
