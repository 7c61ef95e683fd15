"""Checks a config's mesh and batch for machines that are not here; computes nothing.

  python -m dalle_jax mesh --config=configs/dalle_12b.py --hosts=64 --devices_per_host=4

The launchers run it before they rent anything. `plan` checks whether the model fits the chips'
memory.
"""

import argparse

from dalle_jax.cli import _flags

SUMMARY = "check that hosts x devices = mesh, and that the batch divides"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    _flags.add_config(parser)
    parser.add_argument("--hosts", type=int, default=1, help="machines (default: %(default)s)")
    parser.add_argument(
        "--devices_per_host", type=int, required=True, metavar="N", help="chips or GPUs per machine"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the mesh in one line."""
    import jax

    from dalle_jax import axes
    from dalle_jax.engine import meshes, sharding
    from dalle_jax.types import UsageError

    for name in ("hosts", "devices_per_host"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name}={getattr(args, name)}; expected 1 or more.")
    config = _flags.load_config(args)
    sharding.rules(config.mesh)
    num_devices = args.hosts * args.devices_per_host
    sizes = meshes.mesh_sizes(config.mesh, num_devices)
    mesh = jax.sharding.AbstractMesh(sizes, axes.MESH_AXES)
    data, accum = config.data, config.optim.accum_steps
    sharding.check_batch(data.batch, mesh, "data.batch", accum)
    sharding.check_batch(data.eval_batch, mesh, "data.eval_batch")
    product = " x ".join(f"{n} {s}" for n, s in zip(axes.MESH_AXES, sizes, strict=True))
    shards = sizes[0] * sizes[1]
    parts = f" in {accum} micro-batches" if accum > 1 else ""
    print(
        f"mesh {product} = {num_devices} devices = {args.hosts} hosts x {args.devices_per_host}; "
        f"batch {data.batch} = {data.batch // shards} for each of {shards} data shards{parts}"
    )
    return 0
