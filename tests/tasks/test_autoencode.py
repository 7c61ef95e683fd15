"""The autoencode task: its socket, its warm starts, and eight devices against one."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax import config as cfg
from dalle_jax.engine import checkpoint, meshes, sharding
from dalle_jax.engine.train_state import TrainState
from dalle_jax.models import build, vqvae
from dalle_jax.stages.codec import Codec
from dalle_jax.tasks import autoencode
from dalle_jax.types import UsageError

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
SMALL = {
    "data.image_px": 8,
    "data.batch": 16,
    "model.halvings": 1,
    "model.width": 8,
    "model.num_blocks": 1,
    "model.num_codes": 16,
}


def _config(kind: str, **overrides):
    overrides = {k.replace("__", "."): v for k, v in overrides.items()}
    small = SMALL | ({"model.code_dim": 4} if kind == "vqvae" else {})
    return cfg.override(cfg.load(f"{CONFIGS / kind}.py:size=smoke"), small | overrides)


def _batch(rng, config):
    """Pictures of one colour with a square of another: something that 16 codes can say."""
    n, px = config.data.batch, config.data.image_px
    image = np.zeros((n, px, px, 3), np.uint8) + rng.integers(0, 255, (n, 1, 1, 3), dtype=np.uint8)
    image[:, px // 4 : px // 2, px // 4 : px // 2] = rng.integers(0, 255, (n, 1, 1, 3))
    return {"image": image}


def _start(task, seed=1):
    """Weights by numpy: compiling an init of threefry normals takes longer than all else here."""
    params, extra = sharding.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    draw = np.random.default_rng(seed).normal

    def fill(leaf):
        fan_in = max(1, np.prod(leaf.shape[:-1]))
        return jnp.asarray(draw(size=leaf.shape) / fan_in**0.5, leaf.dtype)

    return jax.tree.map(fill, params), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), extra)


def _save(workdir, config, params, extra):
    """A run of zero steps: what a later stage finds."""
    pathlib.Path(workdir).mkdir(parents=True)
    checkpoint.save_config(str(workdir), config)
    store = checkpoint.Checkpointer(str(workdir), config)
    store.save(1, TrainState(jnp.int32(1), params, None, extra, {}), wait=True)
    store.close()


@pytest.mark.parametrize("kind", ["vqvae", "dvae"])
def test_the_socket(kind, key, rng):
    config = _config(kind)
    task = autoencode.make(config)
    batch = _batch(rng, config)
    assert set(task.batch_spec) == {"image"}
    assert task.batch_spec["image"].shape == batch["image"].shape
    params, extra = _start(task)
    total, out = jax.jit(task.loss)(params, extra, None, batch, key, jnp.int32(0))
    assert total.dtype == jnp.float32 and np.isfinite(total)
    assert jax.tree.map(jnp.shape, out.extra) == jax.tree.map(jnp.shape, extra)
    for name, value in out.metrics.items():
        assert value.shape == () and value.dtype == jnp.float32, name
    assert {"psnr", "recon", "codes_used", "perplexity"} <= set(out.metrics)
    assert set(task.alarms) <= set(out.metrics)
    metrics = jax.jit(task.evaluate)(params, out.extra, None, batch, key)
    assert {"psnr", "codes_used", "codes_fraction", "perplexity"} <= set(metrics)
    (grid,) = task.preview(params, out.extra, None, batch, key).values()
    assert grid.shape == (16, 16, 8, 3)  # originals over reconstructions
    np.testing.assert_allclose(grid[:, :8], batch["image"] / 127.5 - 1, atol=1e-5)
    assert np.abs(grid).max() <= 1 + 1e-6


@pytest.mark.parametrize("kind", ["vqvae", "dvae"])
def test_eight_devices_compute_what_one_computes(kind, key, rng):
    config = _config(kind)
    task = autoencode.make(config)
    batch = _batch(rng, config)
    params, extra = _start(task)
    _, out = jax.jit(task.loss)(params, extra, None, batch, key, jnp.int32(0))
    extra = out.extra  # the codebook is drawn; the step below moves it

    def step(params, extra, batch):
        grad = jax.value_and_grad(task.loss, has_aux=True)
        (_, out), grads = grad(params, extra, None, batch, key, jnp.int32(1))
        return grads, out.extra, out.metrics

    alone = jax.jit(step)(params, extra, batch)
    mesh = meshes.make_mesh(config.mesh)
    with sharding.use(mesh, sharding.rules(config.mesh)):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        spread = jax.device_put(batch, where)
        assert len(spread["image"].sharding.device_set) == 8
        together = jax.jit(step)(params, extra, spread)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), alone, together
    )


@pytest.mark.parametrize("kind", ["vqvae", "dvae"])
def test_it_learns(kind, key, rng):
    """120 steps on 16 fixed pictures: several times the codes of a collapse, and 4 dB."""
    config = _config(kind, model__entropy_bonus=0.05) if kind == "dvae" else _config(kind)
    task = autoencode.make(config)
    batch = _batch(rng, config)
    params, extra = sharding.unbox(jax.jit(task.init)(key))
    tx = optax.adam(5e-3)
    opt = tx.init(params)

    @jax.jit
    def run(params, extra, opt, first):
        def step(carry, i):
            params, extra, opt = carry
            grad = jax.value_and_grad(task.loss, has_aux=True)
            (_, out), grads = grad(params, extra, None, batch, jax.random.fold_in(key, i), i)
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), out.extra, opt), None

        return jax.lax.scan(step, (params, extra, opt), first + jnp.arange(60))[0]

    evaluate = jax.jit(lambda params, extra: task.evaluate(params, extra, None, batch, key))
    params, extra, opt = run(params, extra, opt, 0)
    early = evaluate(params, extra)
    params, extra, opt = run(params, extra, opt, 60)
    late = evaluate(params, extra)
    assert late["psnr"] > early["psnr"] and late["psnr"] > 13, (early, late)
    assert late["perplexity"] > 5


def test_the_alarm_rings_for_a_collapse_and_not_before_it_can_be_judged(key, rng):
    assert autoencode.is_collapsed(jnp.float32(2.0), 128) == 1
    assert autoencode.is_collapsed(jnp.float32(8.0), 512) == 1
    assert autoencode.is_collapsed(jnp.float32(60.0), 512) == 0
    config = _config("dvae")
    task = autoencode.make(config)
    params, extra = _start(task)
    params["encoder_head"]["bias"] = params["encoder_head"]["bias"].at[3].set(1e3)  # one code
    loss = jax.jit(task.loss)
    rings = [
        float(
            loss(params, extra, None, _batch(rng, config), key, jnp.int32(step))[1].metrics[
                autoencode.COLLAPSED
            ]
        )
        for step in (0, 99, 100)
    ]
    assert rings == [0, 0, 1]
    assert "init_from" in task.alarms[autoencode.COLLAPSED]


def test_a_dvae_starts_as_the_vqvae_it_is_made_from(key, rng, workdir):
    config = _config("vqvae")
    task = autoencode.make(config)
    batch = _batch(rng, config)
    params, extra = _start(task)
    extra = jax.jit(task.loss)(params, extra, None, batch, key, jnp.int32(0))[1].extra
    _save(workdir, config, params, extra)

    made = autoencode.make(_config("dvae", init_from=str(workdir)))
    new, nothing = _start(made, 5)
    new, nothing = made.warm_start(jax.device_get(new), nothing)
    then = jax.jit(task.evaluate)(params, extra, None, batch, key)
    now = jax.jit(made.evaluate)(new, nothing, None, batch, key)
    for name in ("codes_used", "perplexity"):
        np.testing.assert_allclose(now[name], then[name], rtol=1e-6)
    np.testing.assert_allclose(now["psnr"], then["psnr"], rtol=1e-4)
    # The loaded stage agrees with the task it came from.
    codec = Codec.load(str(workdir))
    images = batch["image"] / np.float32(127.5) - 1
    codes = codec.encode(images)
    model = build.autoencoder(_config("dvae"))
    encode = jax.jit(lambda params, x: model.apply({"params": params}, x, method="encode"))
    np.testing.assert_array_equal(encode(new, images), codes)


def test_a_run_starts_from_a_run_of_its_kind(workdir):
    config = _config("vqvae")
    task = autoencode.make(config)
    params, extra = _start(task)
    _save(workdir, config, params, extra)
    again = autoencode.make(_config("vqvae", init_from=str(workdir)))
    got = again.warm_start(*jax.device_get(_start(again, 9)))
    jax.tree.map(np.testing.assert_array_equal, got, (params, extra))
    assert task.warm_start is None  # nothing to start from


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 16), ("num_codes", 32), ("halvings", 2), ("likelihood", "logit_laplace")],
)
def test_a_vqvae_that_does_not_fit_is_refused_by_field(workdir, field, value):
    config = _config("vqvae")
    pathlib.Path(workdir).mkdir()
    checkpoint.save_config(str(workdir), config)
    task = autoencode.make(_config("dvae", init_from=str(workdir), **{f"model__{field}": value}))
    with pytest.raises(UsageError, match=f"model.{field}"):
        task.warm_start({}, {})


def test_a_vqvae_cannot_start_from_a_dvae(workdir):
    pathlib.Path(workdir).mkdir()
    checkpoint.save_config(str(workdir), _config("dvae"))
    task = autoencode.make(_config("vqvae", init_from=str(workdir)))
    with pytest.raises(UsageError, match="holds a dvae"):
        task.warm_start({}, {})


def test_bad_configs_are_refused_before_anything_compiles():
    with pytest.raises(UsageError, match="image_px 9 is not a multiple.*8 or 10"):
        autoencode.make(_config("vqvae", data__image_px=9))
    with pytest.raises(UsageError, match="gan"):
        autoencode.make(_config("vqvae", model__kind="gan"))


def test_flops_are_three_forward_passes():
    config = _config("vqvae")
    task = autoencode.make(config)
    made = build.autoencoder(config).config
    assert task.flops == 6 * 16 * vqvae.forward_macs(made)
