"""Trains one config many times, on this machine or a cluster, and ranks the results.

  python -m dalle_jax sweep --config=configs/dvae.py:size=smoke --workdir=runs/sweep \\
      --sweep optim.lr=1e-3,3e-3 --sweep seed=0,1

Without --sweep, the config file's get_hyper() defines the units. Each unit is an ordinary run in
WORKDIR/XID/WID. The same command continues a stopped sweep; it does not repeat units that are done
or have failed (--retry repeats failed ones). WORKDIR/XID gets results.json, index.html and best.py,
a config file of the best unit. On a cluster, every machine must see WORKDIR.
"""

import argparse
import contextlib
import pathlib
import shutil
import subprocess
import sys
import time

from dalle_jax.cli import _flags

_METRIC, _MODE = "eval/loss", "min"

SUMMARY = "train a config many times, locally, on SLURM or on GKE, and rank the results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _flags.add_config(parser, required=False)
    _flags.add_workdir(parser, "folder of sweeps; the runs are in DIR/XID/WID")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=V1,V2",
        help="values of a config field; repeated: every combination (instead of get_hyper())",
    )
    parser.add_argument(
        "--xid",
        default="",
        help="name of the sweep (default: the name of an equal sweep, or a new number)",
    )
    parser.add_argument(
        "--metric", help=f"metric that ranks units (default: {_METRIC}, or that of --xid)"
    )
    parser.add_argument(
        "--mode", choices=("min", "max"), help=f"which is better (default: {_MODE})"
    )
    parser.add_argument("--runner", choices=("local", "slurm", "gke"), default="local")
    parser.add_argument(
        "--jobs", type=int, default=0, help="simultaneous runs (default: local one per GPU or core)"
    )
    parser.add_argument("--retry", action="store_true", help="run failed units again")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print commands or script; write nothing, run nothing, read no bucket",
    )
    parser.add_argument(
        "--table", action="store_true", help="write the results so far; run nothing"
    )
    parser.add_argument(
        "--unit", type=int, metavar="WID", help="run one unit of --xid in this process"
    )
    cluster = parser.add_argument_group("clusters")
    cluster.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="slurm: further options, e.g. --sbatch=--gres=gpu:1 --sbatch=--time=8:00:00",
    )
    cluster.add_argument("--image", default="", help="gke: container image with this package")
    cluster.add_argument(
        "--accelerator",
        default="",
        metavar="NAME:SIZE",
        help="gke: per unit, e.g. nvidia-h100-80gb:1 or tpu-v5-lite-podslice:2x4",
    )


def run(args: argparse.Namespace) -> int:
    """Runs, submits, prints or tabulates the sweep; returns the exit code."""
    from dalle_jax.sweeps import results, units
    from dalle_jax.types import UsageError

    if args.jobs < 0:
        raise UsageError(f"--jobs={args.jobs}; expected 1 or more, or 0 for one per GPU or core.")
    # A dry run works without a network: it does not read a bucket.
    is_blind = bool(args.dry_run and args.config and "://" in args.workdir)
    sweep = _sweep(args, is_blind)
    if args.unit is not None:
        return _run_unit(sweep, args.unit)
    if args.table:
        wids = []
    else:
        wids = list(sweep.wids) if is_blind else units.to_run(sweep, retry=args.retry)
    if args.dry_run:
        return _dry_run(args, sweep, wids)
    sweep.save()
    code = 0
    if wids:
        runner = {"local": _run_here, "slurm": _submit, "gke": _submit}[args.runner]
        code = runner(args, sweep, wids)
    ranked, page = _write(sweep)
    print(f"\n{results.table(ranked)}\n\n{page}")
    if missing := results.missing_metric(ranked):
        raise UsageError(f"--metric={sweep.metric}: {missing}")
    failed = any(row["state"] == units.FAILED for row in ranked["units"])
    return code or int(failed and args.runner == "local")


def _write(record) -> tuple[dict, str]:
    """Writes results and page of a sweep; returns the results and the page's file."""
    from etils import epath

    from dalle_jax.pages import sweep
    from dalle_jax.sweeps import results

    ranked = results.write(record)
    file = epath.Path(record.folder) / sweep.PAGE
    file.write_text(sweep.page(ranked, results.curves(ranked, sweep.MAX_CURVES)).html())
    return ranked, str(file)


def _sweep(args, is_blind: bool):
    """The sweep that the flags define, or that --xid names."""
    import dataclasses

    from etils import epath

    from dalle_jax import config as cfg
    from dalle_jax.sweeps import units
    from dalle_jax.types import UsageError

    if args.config:
        overrides = units.from_text(args.sweep) if args.sweep else cfg.load_hyper(args.config)
        metric, mode = args.metric or _METRIC, args.mode or _MODE
        definition = (args.workdir, args.config, args.overrides, overrides, metric, mode, args.xid)
        return units.define(*definition, is_blind=is_blind)
    if not args.xid:
        raise UsageError("the sweep is not named: give --config=FILE, or the --xid of an old one.")
    if args.sweep or args.overrides:
        raise UsageError("--sweep and --config.* define a new sweep: give --config=FILE too.")
    sweep = units.load(str(epath.Path(args.workdir) / args.xid))
    metric, mode = args.metric or sweep.metric, args.mode or sweep.mode
    return dataclasses.replace(sweep, metric=metric, mode=mode)


def _run_unit(sweep, wid: int) -> int:
    """Trains one unit in this process and records its exit code."""
    from dalle_jax.cli import train
    from dalle_jax.sweeps import units
    from dalle_jax.types import UsageError

    if wid not in sweep.wids:
        raise UsageError(f"--unit={wid}; sweep {sweep.folder} has units 1 to {len(sweep.units)}.")
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args([f"--config={sweep.config}", f"--workdir={sweep.workdir(wid)}"])
    args.overrides = sweep.overrides(wid)
    began, code, error = time.monotonic(), 1, "see the log"
    with _only_one(sweep.workdir(wid)):
        try:
            code, error = train.run(args), error
        except KeyboardInterrupt:
            code = 130
            raise
        except Exception as problem:
            code = 2 if isinstance(problem, UsageError) else 1
            error = f"{type(problem).__name__}: {problem}".splitlines()[0]
            raise
        finally:
            units.record(sweep, wid, code, time.monotonic() - began, error)
    return code


@contextlib.contextmanager
def _only_one(workdir: str):
    """Locks the unit: two processes in one workdir would overwrite each other's checkpoints."""
    from dalle_jax.types import UsageError

    if "://" in workdir:  # a bucket has no locks
        yield
        return
    import fcntl

    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{workdir} is being trained by another process; wait for it, or stop it."
            ) from None
        yield


def _run_here(args, sweep, wids: list[int]) -> int:
    from dalle_jax.sweeps import local
    from dalle_jax.types import UsageError

    if "://" in sweep.folder:
        raise UsageError(f"--runner=local writes its logs to --workdir={args.workdir}: use a disk.")
    shares = local.shares(args.jobs, *local.hardware())[: len(wids)]
    print(
        f"sweep {sweep.folder}: {len(wids)} of {len(sweep.units)} units to run, "
        f"{len(shares)} at a time"
    )
    try:
        local.run(sweep, wids, shares, lambda: _write(sweep))
    except local.Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    return 0


def _submit(args, sweep, wids: list[int]) -> int:
    """Writes the script into the sweep's folder and submits it to the cluster."""
    from etils import epath

    from dalle_jax.types import UsageError

    program, name, command = {
        "slurm": ("sbatch", "sweep.sbatch", ["sbatch"]),
        "gke": ("kubectl", "sweep.yaml", ["kubectl", "apply", "-f"]),
    }[args.runner]
    text = _script(args, sweep, wids)
    if not shutil.which(program):
        raise UsageError(
            f"--runner={args.runner} needs {program}, which is not on PATH; install it, "
            "or print the script with --dry_run."
        )
    (epath.Path(sweep.folder) / name).write_text(text)
    stdin = text if "://" in sweep.folder else None  # neither program reads from a bucket
    file = [f"{sweep.folder}/{name}"] if stdin is None else ["-"] * (program == "kubectl")
    done = subprocess.run([*command, *file], input=stdin, text=True)
    if done.returncode == 0:
        print(
            f"{len(wids)} units submitted; results so far: python -m dalle_jax sweep "
            f"--workdir={args.workdir} --xid={sweep.xid} --table"
        )
    return int(done.returncode != 0)


def _dry_run(args, sweep, wids: list[int]) -> int:
    if args.runner != "local":
        print(_script(args, sweep, wids), end="")
        return 0
    from dalle_jax.sweeps import local

    for cores, gpus in local.shares(args.jobs, *local.hardware())[: len(wids)]:
        print(f"# cores {cores}" + (f", GPUs {gpus}" if gpus else ""))
    for wid in wids:
        print(sweep.command(wid))
    return 0


def _script(args, sweep, wids: list[int]) -> str:
    from dalle_jax.sweeps import scripts

    if args.runner == "slurm":
        return scripts.slurm(sweep, wids, args.jobs, args.sbatch)
    return scripts.gke(sweep, wids, args.jobs, args.image, args.accelerator)
