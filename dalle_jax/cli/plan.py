"""Plans a training run on a cluster that is not here: memory, time and traffic, by compiling.

  python -m dalle_jax plan --config=configs/dalle_12b.py --topology=v5e:16x16
  python -m dalle_jax plan --config=configs/decoder_paper.py --topology=v5e:16x16 --quick
  python -m dalle_jax plan --config=configs/dalle_12b.py --topology v4:4x4x8 h100:16x8 --batch=2048
  python -m dalle_jax plan --config=configs/clip.py:size=l14 --topology=v6e:8x8 --search
  python -m dalle_jax plan --config=configs/dalle_12b.py --topology=v5p:2x2x1 --sample
  python -m dalle_jax plan --config=configs/dalle_12b.py --topology=v5e:16x16 \
      --attention dense structured splash

`plan` compiles the training step for the topology as `train` would, and reads its cost from the
executable. It needs no data, no trained codec and no accelerator, but one core and about 2 GiB: a
small model takes seconds, 12 billion parameters take minutes. All figures come from the compiler or
from arithmetic, and none is measured; the table names their source.

Topologies: TPU slices v4:4x4x8, v5e:16x16, v5p:4x4x8, v6e:16x16 and several of them, 2*v5e:16x16
(pip install 'dalle_jax[plan]'); h100:HOSTSxGPUS (pip install 'dalle_jax[cuda12]'); cpu:8, eight
faked devices on this machine.

If the config does not fit, `plan` exits with 1 and names the nearest config that fits.
"""

import argparse
import itertools
import pathlib
import sys

from dalle_jax.cli import _flags

SUMMARY = "compile a training step for a TPU or GPU cluster that is not here, and print its cost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _flags.add_config(parser, required=False)
    parser.add_argument(
        "--topology", nargs="+", metavar="NAME", help="v5e:16x16, 2*v5e:16x16, h100:16x8, cpu:8, …"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, metavar="N", help="global batch; several with --search"
    )
    parser.add_argument(
        "--mesh",
        nargs="+",
        type=_mesh,
        metavar="DATA,FSDP,TENSOR",
        help="devices along each axis, -1 = the rest; several with --search",
    )
    parser.add_argument(
        "--remat", nargs="+", metavar="NAME", help="recomputation policy; several with --search"
    )
    parser.add_argument(
        "--attention",
        nargs="+",
        metavar="NAME",
        help="model.attention_impl: dense, structured, splash, cudnn; several are compared",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="stop before the compiler makes code: memory and traffic in a fraction of the time, "
        "but seconds are the floor, without an estimate",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--search",
        action="store_true",
        help="try mesh x batch x remat; print those that nothing beats in time and memory",
    )
    mode.add_argument(
        "--sample",
        action="store_true",
        help="plan sampling instead of training: weights, caches, candidates that fit",
    )
    mode.add_argument(
        "--docs",
        metavar="FILE",
        help="write the plans of all shipped configs as a page; continues an interrupted one",
    )
    parser.add_argument(
        "--no_nearest",
        action="store_true",
        help="if the config does not fit, do not search for one that does",
    )


def run(args: argparse.Namespace) -> int:
    """Plans; returns 1 if something does not fit."""
    import os

    # jax reads both variables once, at import. XLA warns of every array that it copies whole to
    # reshard it; the table of traffic lists them.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Loading a program from the cache would need the machine that it is compiled for.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    from dalle_jax.types import UsageError

    if args.docs:
        return _update_ledger(args.docs, is_quick=args.quick)
    if not args.config or not args.topology:
        raise UsageError(
            "plan needs a config and a topology: --config=configs/dalle_12b.py "
            "--topology=v5e:16x16, or --docs=FILE for all shipped ones."
        )
    if not args.search:
        for name in ("batch", "mesh", "remat"):
            if len(getattr(args, name) or ()) > 1:
                raise UsageError(f"several values of --{name} need --search.")
    if args.attention and (args.search or args.sample):
        raise UsageError(
            "--attention compares plans of a training step; with --search or --sample give "
            "--config.model.attention_impl=NAME."
        )
    action = _search if args.search else _sample if args.sample else _plan
    return action(args)


def _plan(args: argparse.Namespace) -> int:
    from dalle_jax.pages import plan
    from dalle_jax.planning import search
    from dalle_jax.planning.plan import Plan

    records = []
    configs = {name: _config(args, name) for name in args.attention or ("",)}
    for topology, (attention, config) in itertools.product(_topologies(args), configs.items()):
        result = Plan.compile(config, _task(config), topology, is_quick=args.quick)
        record = {"config": args.config, **result.record()}
        if not result.fits:
            nearest = None
            if not args.no_nearest:
                print("does not fit; searching for a config that does", file=sys.stderr, flush=True)
                nearest = search.nearest(config, _task, topology, result)
            record["nearest"] = nearest.record() if nearest else None
        title = args.config
        if attention:
            record["attention"] = attention
            title += f", {attention} attention"
        records.append(record)
        if not args.json:
            print(plan.table(title, record), flush=True)
    if args.json:
        _print_json(records)
    elif len(configs) > 1:
        print(plan.comparison(records), flush=True)
    return 0 if all(record["fits"] for record in records) else 1


def _search(args: argparse.Namespace) -> int:
    from dalle_jax.pages import plan
    from dalle_jax.planning import search

    config = _config(args)
    records, fits = [], True
    for topology in _topologies(args):
        compiled = []
        candidates = search.search(
            config,
            _task,
            topology,
            meshes=args.mesh or search.default_meshes(config, len(topology.devices)),
            batches=args.batch or search.default_batches(config),
            remats=args.remat or search.default_remats(config),
            is_quick=args.quick,
        )
        for candidate in candidates:
            compiled.append(candidate)
            print(plan.line(candidate.record()), file=sys.stderr, flush=True)
        best = [
            {"config": args.config, **candidate.plan.record(), "changes": candidate.changes}
            for candidate in search.pareto(compiled)
        ]
        fits &= bool(best)
        records += best
        if not args.json:
            print(plan.pareto_table(args.config, topology.name, best, len(compiled)))
    if args.json:
        _print_json(records, always_list=True)
    return 0 if fits else 1


def _sample(args: argparse.Namespace) -> int:
    from dalle_jax.models import build
    from dalle_jax.pages import plan
    from dalle_jax.planning import sampling_memory
    from dalle_jax.stages import by_shape
    from dalle_jax.types import UsageError

    config = _config(args)
    if config.task != "dalle":
        raise UsageError(
            f"--sample plans sampling from a DALL-E; {args.config} is a config of task "
            f"{config.task!r}."
        )
    codec = by_shape.codec(config)
    model = build.dalle(config, codec.grid, codec.num_codes)
    records = []
    for topology in _topologies(args):
        for guidance in (False, True):
            budget = sampling_memory.budget(model, guidance=guidance)
            record = sampling_memory.record(budget, topology)
            records.append({"config": args.config, "guidance": guidance, **record})
            if not args.json:
                print(plan.sampling_table(records[-1]), flush=True)
    if args.json:
        _print_json(records, always_list=True)
    return 0 if all(record["candidates"] for record in records) else 1


def _update_ledger(file: str, *, is_quick: bool) -> int:
    """Compiles the plans that the page's ledger lacks; 1 if some stay missing."""
    from dalle_jax.pages import ledger
    from dalle_jax.planning import shipped

    page, cases = pathlib.Path(file), shipped.CASES
    records: shipped.Records = {}
    for records in shipped.update(str(page.with_suffix(".json")), cases, is_quick=is_quick):
        part = page.with_name(page.name + ".part")
        part.write_text(ledger.page(records, cases))
        part.replace(page)
    return int(bool(shipped.missing(records, cases, is_quick=is_quick)))


def _mesh(text: str) -> tuple[int, int, int]:
    sizes = tuple(int(n) for n in text.replace("x", ",").split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError("expected DATA,FSDP,TENSOR, e.g. 2,128,1")
    return sizes


def _topologies(args: argparse.Namespace):
    """The topologies of --topology; nothing compiles before all of them exist."""
    from dalle_jax.planning import topology

    for name in args.topology:
        topology.prepare(name)
    return [topology.get(name) for name in args.topology]


def _config(args: argparse.Namespace, attention: str = ""):
    """The config with --batch, --mesh and --remat, unless a search varies them."""
    from dalle_jax import axes, config, tasks
    from dalle_jax.planning import search
    from dalle_jax.types import UsageError

    loaded = _flags.load_config(args)
    if loaded.task not in tasks.TASKS:  # a search would skip it as a config that does not fit
        raise UsageError(
            f"task {loaded.task!r} is unknown; config.task is one of {', '.join(tasks.TASKS)}."
        )
    changes = {"model.attention_impl": attention} if attention else {}
    if args.batch and not args.search:
        changes["data.batch"] = args.batch[0]
    if args.mesh and not args.search:
        changes |= {f"mesh.{n}": size for n, size in zip(axes.MESH_AXES, args.mesh[0], strict=True)}
    if args.remat and not args.search:
        changes |= search.remat_override(loaded, args.remat[0])
    return config.override(loaded, changes)


def _task(config):
    from dalle_jax import tasks

    return tasks.make(config, shapes_only=True)


def _print_json(records: list[dict], *, always_list: bool = False) -> None:
    import json

    from dalle_jax.planning import plan

    records = plan.rounded(records)
    print(json.dumps(records if always_list or len(records) > 1 else records[0], indent=2))
