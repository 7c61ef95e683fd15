"""Plans a training run on machines that are not there: memory, time and traffic, by compiling.

  python -m dalle_jax plan --config=configs/dalle_12b.py --topology=v5e:16x16
  python -m dalle_jax plan --config=configs/decoder_paper.py --topology=v5e:16x16 --quick
  python -m dalle_jax plan --config=configs/dalle_12b.py --topology v4:4x4x8 h100:16x8 --batch=2048
  python -m dalle_jax plan --config=configs/clip.py:size=l14 --topology=v6e:8x8 --search
  python -m dalle_jax plan --config=configs/dalle_12b.py --topology=v5p:2x2x1 --sample
  python -m dalle_jax plan --config=configs/dalle_12b.py --topology=v5e:16x16 \
      --attention dense structured splash

The training step is compiled for the topology exactly as `train` would, and its cost is read from
the executable. It needs no data, no trained codec and no accelerator, a core and some 2 GiB: a
small model takes seconds, 12 billion parameters minutes. Figures are the compiler's and arithmetic,
not measurements; the table says which.

Topologies: TPU slices v4:4x4x8, v5e:16x16, v5p:4x4x8, v6e:16x16 and several of them, 2*v5e:16x16
(pip install 'dalle_jax[plan]'); h100:HOSTSxGPUS (pip install 'dalle_jax[cuda12]'); cpu:8, eight
devices faked on this machine.

Exits with 1 if the config does not fit; then the nearest one that does is named.
"""

import argparse
import itertools
import sys

from dalle_jax.cli import _flags

SUMMARY = "compile a training step for a TPU or GPU cluster that is not there, and weigh it"


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
        "--remat", nargs="+", metavar="NAME", help="what to recompute; several with --search"
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
        help="end before the compiler makes code: memory and traffic in a fraction of the time, "
        "but no estimate of seconds (they are the floor)",
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
        help="weigh drawing pictures instead of training: weights, caches, candidates that fit",
    )
    mode.add_argument(
        "--docs",
        metavar="FILE",
        help="write the plans of all shipped configs as a page; goes on where it was interrupted",
    )
    parser.add_argument(
        "--no_nearest",
        action="store_true",
        help="if the config does not fit, do not look for one that does",
    )


def run(args: argparse.Namespace) -> int:
    """Plans; 1 if something does not fit."""
    import os

    # Both are read once, when jax is imported. XLA warns of every array that it copies whole to
    # reshard it: the table of traffic has them.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Keeping a program means loading it later, which takes the machine that it is for.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    from dalle_jax.types import UsageError

    if args.docs:
        from dalle_jax.cli import plan_docs

        return plan_docs.write(args.docs, is_quick=args.quick)
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
    from dalle_jax.cli import plan_page
    from dalle_jax.planning import plan, search

    records, fits = [], True
    configs = {name: _config(args, name) for name in args.attention or ("",)}
    for topology, (attention, config) in itertools.product(_topologies(args), configs.items()):
        found = plan.weigh(config, _task(config), topology, is_quick=args.quick)
        near = None
        if not found.fits and not args.no_nearest:
            print("does not fit; looking for what does …", file=sys.stderr, flush=True)
            near = search.nearest(config, _task, topology, found)
        fits &= found.fits
        records.append(plan_page.record(args.config, found, near))
        what = args.config
        if attention:
            records[-1]["attention"] = attention
            what += f", {attention} attention"
        if not args.json:
            print(plan_page.table(what, found, near), flush=True)
    if args.json:
        _print_json(records)
    elif len(configs) > 1:
        print(plan_page.comparison(records), flush=True)
    return 0 if fits else 1


def _search(args: argparse.Namespace) -> int:
    from dalle_jax.cli import plan_page
    from dalle_jax.planning import search

    config = _config(args)
    records, fits = [], True
    for topology in _topologies(args):
        tried = []
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
            tried.append(candidate)
            print(plan_page.line(candidate), file=sys.stderr, flush=True)
        best = search.pareto(tried)
        fits &= bool(best)
        records += [plan_page.record(args.config, c.plan, changes=c.changes) for c in best]
        if not args.json:
            print(plan_page.pareto_table(args.config, topology.name, best, len(tried)))
    if args.json:
        _print_json(records, always_list=True)
    return 0 if fits else 1


def _sample(args: argparse.Namespace) -> int:
    from dalle_jax.cli import plan_page
    from dalle_jax.models import build
    from dalle_jax.planning import sampling_memory
    from dalle_jax.stages import by_shape
    from dalle_jax.types import UsageError

    config = _config(args)
    if config.task != "dalle":
        raise UsageError(
            f"--sample weighs drawing from a DALL-E; {args.config} is a config of task "
            f"{config.task!r}."
        )
    codec = by_shape.codec(config)
    model = build.dalle(config, codec.grid, codec.num_codes)
    records = []
    for topology in _topologies(args):
        for guidance in (False, True):
            found = sampling_memory.budget(model, guidance=guidance)
            records.append(plan_page.sampling_record(args.config, topology, guidance, found))
            if not args.json:
                print(plan_page.sampling_table(records[-1]), flush=True)
    if args.json:
        _print_json(records, always_list=True)
    return 0 if all(record["candidates"] for record in records) else 1


def _mesh(text: str) -> tuple[int, int, int]:
    sizes = tuple(int(n) for n in text.replace("x", ",").split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError("expected DATA,FSDP,TENSOR, e.g. 2,128,1")
    return sizes


def _topologies(args: argparse.Namespace):
    """The topologies of --topology, one after the other; nothing compiles before all are known."""
    from dalle_jax.planning import topology

    for name in args.topology:
        topology.prepare(name)
    return [topology.get(name) for name in args.topology]


def _config(args: argparse.Namespace, attention: str = ""):
    """The config with --batch, --mesh and --remat in it, unless a search varies them."""
    from dalle_jax import axes, config, tasks
    from dalle_jax.planning import search
    from dalle_jax.types import UsageError

    found = _flags.load_config(args)
    if found.task not in tasks.TASKS:
        raise UsageError(
            f"task {found.task!r} is unknown; config.task is one of {', '.join(tasks.TASKS)}."
        )
    changes = {"model.attention_impl": attention} if attention else {}
    if args.batch and not args.search:
        changes["data.batch"] = args.batch[0]
    if args.mesh and not args.search:
        changes |= {f"mesh.{n}": size for n, size in zip(axes.MESH_AXES, args.mesh[0], strict=True)}
    if args.remat and not args.search:
        changes |= search.remat_override(found, args.remat[0])
    return config.override(found, changes)


def _task(config):
    from dalle_jax import tasks

    return tasks.make(config, shapes_only=True)


def _print_json(records: list[dict], *, always_list: bool = False) -> None:
    import json

    print(json.dumps(records if always_list or len(records) > 1 else records[0], indent=2))
