"""A checkpoint survives kills and bit rot, moves between meshes, is read without the engine."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import linear_task as lt
import numpy as np
import pytest

from dalle_jax.engine import checkpoint
from dalle_jax.engine.program import Program
from dalle_jax.engine.train_state import TrainState
from dalle_jax.types import UsageError


def make_state(devices, config, seed=0):
    """(shapes, state) of the linear task on these devices."""
    program = Program.build(config, lt.make_task(), devices)
    return program.state_shapes, program.init(jax.random.key(seed))


def config_for(devices):
    return lt.make_config(**{"mesh.data": 1, "mesh.fsdp": devices})


def saved(workdir, devices=1, steps=(1, 2), seed=0):
    config = config_for(devices)
    target, state = make_state(jax.devices()[:devices], config, seed)
    checkpoint.save_config(str(workdir), config)
    keeper = checkpoint.Checkpointer(str(workdir), config)
    for step in steps:
        state = state.replace(
            step=jnp.int32(step), params=jax.tree.map(lambda p: p + 1, state.params)
        )
        keeper.save(step, state)
    keeper.close()
    return config, target, state


def equal(a, b):
    flat_a, flat_b = jax.tree.leaves(a), jax.tree.leaves(b)
    return all(np.array_equal(x, y) for x, y in zip(flat_a, flat_b, strict=True))


def truncate(folder: pathlib.Path):
    """Cuts the data files of one item in half."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.parent.name == "d"]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("old, new", [(8, 1), (1, 8), (8, 2)])
def test_restores_onto_another_mesh(workdir, old, new):
    _, _, state = saved(workdir, old)
    config = config_for(new)
    target, _ = make_state(jax.devices()[:new], config)
    keeper = checkpoint.Checkpointer(str(workdir), config)
    got, step = keeper.restore(target)
    keeper.close()
    assert step == 2 and int(got.step) == 2
    assert equal(got, state)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    kernel = got.params["dense"]["kernel"]
    assert kernel.sharding == target.params["dense"]["kernel"].sharding
    assert len(kernel.sharding.device_set) == new
    # Adam's moments lie where their weights lie.
    moments = [x for x in jax.tree.leaves(got.opt_state) if x.shape == kernel.shape]
    assert len(moments) == 2 and all(m.sharding == kernel.sharding for m in moments)


@pytest.mark.parametrize(
    "keep_last, keep_every, steps",
    [(2, 4, [4, 6, 7]), (2, 0, [6, 7]), (1, 3, [3, 6, 7]), (9, 2, [1, 2, 3, 4, 5, 6, 7])],
)
def test_pruning_keeps_the_last_and_every_nth(workdir, keep_last, keep_every, steps):
    keep = {"train.keep_last": keep_last, "train.keep_every_steps": keep_every}
    config = lt.make_config(**{"mesh.data": 1, **keep})
    _, state = make_state(jax.devices()[:1], config)
    keeper = checkpoint.Checkpointer(str(workdir), config)
    for step in range(1, 8):
        keeper.save(step, state, wait=True)
    keeper.close()
    assert checkpoint.steps(str(workdir)) == steps


def test_damaged_newest_falls_back_one_step_and_says_so(workdir, caplog):
    config, target, _ = saved(workdir)
    truncate(workdir / "checkpoints" / "2" / "params")
    keeper = checkpoint.Checkpointer(str(workdir), config)
    state, step = keeper.restore(target)
    assert step == 1
    assert "step 2 is damaged" in caplog.text and "falling back to step 1" in caplog.text
    # The step can be trained and saved again; the damaged folder is kept aside.
    keeper.save(2, state, wait=True)
    keeper.close()
    assert checkpoint.steps(str(workdir)) == [1, 2]
    assert (workdir / "damaged" / "2").is_dir()


def test_samplers_fall_back_too(workdir, caplog):
    saved(workdir)
    truncate(workdir / "checkpoints" / "2" / "ema")
    assert checkpoint.load_variables(str(workdir)).step == 1
    assert "damaged" in caplog.text
    with pytest.raises(UsageError, match="can be read"):
        checkpoint.load_variables(str(workdir), step=2)


def test_nothing_readable_is_an_error_and_deletes_nothing(workdir):
    config, target, _ = saved(workdir)
    for step in "12":
        truncate(workdir / "checkpoints" / step / "params")
    keeper = checkpoint.Checkpointer(str(workdir), config)
    with pytest.raises(UsageError, match=r"steps \[1, 2\]"):
        keeper.restore(target)
    keeper.close()
    assert checkpoint.steps(str(workdir)) == [1, 2]


def test_kill_9_during_a_save_leaves_the_previous_checkpoint(workdir, compile_flags):
    """The child kills itself between the write of the data and the commit."""
    program = """
        import os, signal, sys
        import jax, jax.numpy as jnp, linear_task as lt
        import orbax.checkpoint as ocp
        from dalle_jax.engine import checkpoint
        from dalle_jax.engine.train_state import TrainState
        config = lt.make_config()
        def state(x):
            return TrainState(jnp.int32(0), {"w": jnp.full((500, 500), x)}, None, None, None)
        checkpoint.save_config(sys.argv[1], config)
        keeper = checkpoint.Checkpointer(sys.argv[1], config)
        keeper.save(1, state(1.0), wait=True)
        rename = os.rename
        def dies(source, target, **kwargs):
            if "2" in os.path.basename(str(target)):
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(source, target, **kwargs)
        os.rename = os.replace = dies
        keeper.save(2, state(2.0), wait=True)
    """
    root = pathlib.Path(__file__).parents[2]
    env = {
        **os.environ,
        "PYTHONPATH": f"{root}:{root / 'tests' / 'engine'}",
        "XLA_FLAGS": compile_flags,
    }
    command = [sys.executable, "-c", textwrap.dedent(program), str(workdir)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = [p.name for p in (workdir / "checkpoints").iterdir()]
    assert any("tmp" in name for name in names)
    assert checkpoint.steps(str(workdir)) == [1]
    got = checkpoint.load_variables(str(workdir))
    assert got.step == 1 and (got.params["w"] == 1).all()
    # The next run sweeps up what the kill left, before its first save.
    keeper = checkpoint.Checkpointer(str(workdir), lt.make_config())
    _, state = make_state(jax.devices()[:1], lt.make_config(**{"mesh.data": 1}))
    keeper.save(3, state, wait=True)
    keeper.close()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["1", "3"]


def test_load_variables_prefers_the_average_and_reads_no_optimiser(workdir):
    _, _, state = saved(workdir, devices=8)
    (workdir / "checkpoints" / "2" / "opt").rename(workdir / "gone")
    got = checkpoint.load_variables(str(workdir))
    assert isinstance(got.params["dense"]["kernel"], np.ndarray)
    assert equal(got.params, state.ema) and not equal(got.params, state.params)
    assert got.extra == {"seen": 0}
    assert checkpoint.load_variables(str(workdir), step=1).step == 1


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 0), ("float16", 1e-3), ("bfloat16", 1e-2)]
)
def test_export_round_trip(workdir, tmp_path, dtype, tolerance):
    saved(workdir)
    (workdir / "tokenizer.model").write_bytes(b"pieces")
    done = checkpoint.export(str(workdir), str(tmp_path / "out"), dtype)
    got, whole = (checkpoint.load_variables(str(d)) for d in (tmp_path / "out", workdir))
    assert got.step == whole.step == done["step"] == 2
    a, b = checkpoint.flatten(got.params), checkpoint.flatten(whole.params)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == np.float32
        np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=0)
    assert got.extra["seen"].shape == () and got.extra["seen"].dtype == np.int32
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    stored = checkpoint.load_config(str(tmp_path / "out"))
    assert stored.to_dict() == checkpoint.load_config(str(workdir)).to_dict()


def test_an_exported_config_names_no_path_of_this_machine(workdir, tmp_path):
    config, _, _ = saved(workdir)
    with config.unlocked():
        config.data.data_dir, config.init_from = "/somewhere/sets", "/somewhere/vqvae"
        config.stages = {"dvae": "/somewhere/dvae", "from_codes": True}
    checkpoint.save_config(str(workdir), config)
    checkpoint.export(str(workdir), str(tmp_path / "out"))
    assert "/somewhere" not in (tmp_path / "out" / "config.json").read_text()
    exported = checkpoint.load_config(str(tmp_path / "out"))
    assert (exported.data.data_dir, exported.init_from) == ("sets", "vqvae")
    assert exported.stages.to_dict() == {"dvae": "", "from_codes": True}


def test_export_refuses_what_float16_cannot_hold(workdir, tmp_path):
    config = lt.make_config()
    state = TrainState(jnp.int32(0), {"w": jnp.full((2,), 1e6)}, None, None, None)
    checkpoint.save_config(str(workdir), config)
    keeper = checkpoint.Checkpointer(str(workdir), config)
    keeper.save(1, state, wait=True)
    keeper.close()
    with pytest.raises(UsageError, match="w has values up to 1e\\+06.*bfloat16"):
        checkpoint.export(str(workdir), str(tmp_path / "out"))
    with pytest.raises(UsageError, match="float8"):
        checkpoint.export(str(workdir), str(tmp_path / "out"), "float8")


def test_what_is_no_workdir_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a workdir"):
        checkpoint.load_config(str(tmp_path))
    checkpoint.save_config(str(tmp_path), lt.make_config())
    with pytest.raises(UsageError, match="no checkpoint yet"):
        checkpoint.load_variables(str(tmp_path))
    with pytest.raises(UsageError, match="no checkpoint of step 3"):
        checkpoint.load_variables(str(tmp_path), step=3)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        checkpoint.load_config(str(tmp_path))


def test_flat_names_round_trip():
    tree = {"a": {"b": np.ones(2), "c": {"d": np.zeros(())}}, "e": np.arange(3)}
    flat = checkpoint.flatten(tree)
    assert list(flat) == ["a/b", "a/c/d", "e"]
    assert equal(checkpoint.unflatten(flat), tree)
    with pytest.raises(ValueError, match="slash"):
        checkpoint.flatten({"a/b": np.ones(1)})
