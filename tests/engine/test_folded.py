"""Folded layer weights: the numbers of one device on every mesh, plain on disk, and their traffic.

The step's traffic is read out of the compiled program: what the layout promises and nothing else.
"""

import collections
import math

import folded
import jax
import numpy as np
import pytest

from dalle_jax.engine import checkpoint, sharding
from dalle_jax.planning import hlo

ROWS = 24  # of a shard of any stored matrix in these sizes: three tiles


def close(got, expected, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), got, expected)


@pytest.mark.parametrize(
    "task, mesh, overrides",
    [
        ("dalle", (1, 8), {"model.scan_layers": False, "model.num_layers": 2}),
        ("dalle", (2, 4), {"model.remat": "full", "model.use_bias": True}),
        ("dalle", (2, 4), {"model.dropout": 0.3, "model.remat": "dots"}),
        ("clip", (2, 4), {"optim.grad_reduce_dtype": "float32"}),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(root, task, mesh, overrides):
    config = folded.config_of(root, task, **overrides)
    one, many = folded.Run(config, 1, 1), folded.Run(config, *mesh)
    a = one.init()
    b = many.place(a)
    shards = [x.addressable_shards[0].data for x in jax.tree.leaves(b.params) if x.ndim == 3]
    assert {x.shape[1] for x in shards} == {ROWS}
    loss, gradients = one.gradients(a)
    got_loss, got = many.gradients(b)
    assert got_loss == pytest.approx(loss, abs=1e-5)
    close(got, gradients, 1e-5)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_optimisers_that_look_at_rows_make_the_step_of_one_device(root, name):
    """Rows and columns of a folded matrix would make another step."""
    sizes = {"optim.name": name, "model.num_layers": 2, "model.width": 136}  # folds by 4
    config = folded.config_of(root, "dalle", **sizes)  # adafactor factors from 128
    one, many = folded.Run(config, 1, 1), folded.Run(config, 2, 4)
    start = one.init()
    other = many.place(start)
    results = []
    for run, state in ((one, start), (many, other)):
        state, metrics = run.step(state)
        results.append((run.plain(state.params), run.plain(state.ema), metrics["update_ratio"]))
    assert results[0][2] > 1e-4
    close(results[1], results[0], 2e-5)


def filled(run):
    """A state whose every leaf is noise, by name: the same numbers on every mesh."""

    def noise(path, leaf):
        rng = np.random.default_rng(list(jax.tree_util.keystr(path).encode()))
        return (rng.normal(size=leaf.shape) * 100).astype(leaf.dtype)

    shapes = run.program.folding.unfolded_shapes
    values = jax.tree_util.tree_map_with_path(noise, shapes)
    placed = sharding.place(values, jax.tree.map(lambda x: x.sharding, shapes))
    return values, run.program.folding.fold(placed)


def test_checkpoint_goes_from_mesh_to_mesh_bit_for_bit(root, workdir):
    config = folded.config_of(root, "dalle", **{"optim.name": "adamw"})
    values, state = filled(folded.Run(config, 1, 8))
    for step, (old, new) in enumerate([((1, 8), (1, 1)), ((1, 1), (2, 4)), ((2, 4), (1, 8))], 1):
        before, after = folded.Run(config, *old), folded.Run(config, *new)
        manager = checkpoint.Checkpointer(str(workdir), config)
        manager.save(step, before.program.folding.unfold(state), wait=True)
        state, _ = manager.restore(after.program.folding.unfolded_shapes)
        manager.close()
        state = after.program.folding.fold(state)
        jax.tree.map(lambda x, t: x.sharding == t or pytest.fail(), state, after.program.shardings)
        got = after.program.folding.unfold(state)
        for name in ("params", "ema", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(got, name), getattr(values, name))
    checkpoint.save_config(str(workdir), config)
    loaded = checkpoint.load_variables(str(workdir)).params
    assert loaded["transformer"]["blocks"]["attn"]["q"].shape == (3, folded.WIDTH, folded.WIDTH)


def test_run_that_moves_to_one_device_goes_on(root, tmp_path, monkeypatch):
    config = folded.config_of(root, "dalle", **{"optim.name": "adamw"})
    folded.train(config, 2, tmp_path / "moved")
    real = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: real[:1])
    moved = folded.train(config, 4, tmp_path / "moved")
    unbroken = folded.train(config, 4, tmp_path / "unbroken")
    assert moved["step"] == unbroken["step"] == 4
    assert moved["loss"] == pytest.approx(unbroken["loss"], rel=1e-4)


@pytest.mark.parametrize("task, remat", [("dalle", "none"), ("dalle", "full"), ("clip", "full")])
def test_weights_travel_and_activations_do_not(root, task, remat):
    """Per layer and matrix: a gather forward, another backward, one reduce-scatter."""
    overrides = {"model.remat": remat, "optim.name": "adamw", "optim.clip_norm": 0.0}
    config = folded.config_of(root, task, **overrides)
    run = folded.Run(config, 2, 4)
    moved = hlo.collectives(run.compiled(), run.program.mesh.shape)
    layers = 3 if task == "dalle" else 4  # of both towers

    in_layers = collections.Counter()
    for c in moved:
        if "shard_map" in c.source and len(c.shape) == 2:
            in_layers[c.kind, c.axis, math.prod(c.shape)] += c.count
    square, wide = folded.WIDTH**2, 4 * folded.WIDTH**2
    assert in_layers == {
        ("all-gather", "fsdp", square): 2 * 4 * layers,
        ("all-gather", "fsdp", wide): 2 * 2 * layers,
        ("reduce-scatter", "fsdp", square): 4 * layers,
        ("reduce-scatter", "fsdp", wide): 2 * layers,
        ("all-reduce", "data", square // 4): 4 * layers,  # of shards, after the scatter
        ("all-reduce", "data", wide // 4): 2 * layers,
    }
    # Outside them: weights or their shards, and of the batch no more than an embedding each.
    sizes = {
        math.prod(x.shape) for x in jax.tree.leaves(run.program.folding.unfolded_shapes.params)
    }
    sizes.add(folded.GRID**2 * folded.WIDTH)  # gradient of all places, then of rows and columns
    for c in moved:
        size = math.prod(c.shape)
        if "shard_map" not in c.source and not {size, 4 * size} & sizes:
            assert size <= folded.BATCH * 16, c


def test_state_of_every_optimiser_lies_with_its_weights(root):
    """Nothing of the size of a matrix is held whole, whatever the optimiser keeps of it."""
    for name in ("adamw", "muon", "adafactor"):
        sizes = {"optim.name": name, "model.width": 128, "model.num_heads": 2}
        run = folded.Run(folded.config_of(root, "dalle", **sizes), 2, 4)
        for path, leaf in jax.tree_util.tree_leaves_with_path(run.program.state_shapes):
            held = math.prod(leaf.sharding.shard_shape(leaf.shape))
            assert held <= max(leaf.size / 4, 3 * 4 * 128), (jax.tree_util.keystr(path), leaf)
        if name == "adafactor":
            factors = run.program.state_shapes.opt_state[1][0]
            row = factors.v_row["transformer"]["blocks"]["attn"]["q"]
            column = factors.v_col["transformer"]["blocks"]["attn"]["q"]
            assert row.shape == column.shape == (3, 128)
            assert row.sharding.shard_shape(row.shape) == (3, 32)  # of rows, which are scattered
            assert column.sharding.is_fully_replicated
