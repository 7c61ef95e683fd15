"""Optimisers against their definitions in numpy, schedules against their formulas."""

import jax
import jax.numpy as jnp
import linear_task as lt
import numpy as np
import optax
import pytest
from flax import linen as nn

from dalle_jax import axes
from dalle_jax.engine import optim
from dalle_jax.types import UsageError


def make_config(**changes):
    return lt.make_config(**{f"optim.{k}": v for k, v in changes.items()}).optim


def boxed_params():
    def box(names, *shape):
        return nn.LogicallyPartitioned(np.full(shape, 0.5, np.float32), names=names)

    return {
        "embed": box((axes.VOCAB, axes.EMBED), 10, 8),
        "head": box((axes.EMBED, axes.VOCAB), 8, 10),
        "blocks": {
            "kernel": box((axes.LAYERS, axes.EMBED, axes.MLP), 3, 8, 16),
            "gain": box((axes.LAYERS, axes.EMBED), 3, 8),
        },
        "conv": box((None, None, axes.CONV_IN, axes.CONV_OUT), 3, 3, 4, 4),
        "codebook": box((axes.CODES, axes.EMBED), 6, 8),
        "bias": box((axes.MLP,), 16),
    }


def update(config, grads=None, steps=100, params=None):
    boxed = boxed_params()
    tx, _ = optim.make(config, boxed, None, steps)
    plain = jax.tree.map(lambda b: b.value, boxed, is_leaf=lambda b: hasattr(b, "names"))
    grads = grads or jax.tree.map(
        lambda p: np.random.default_rng(p.size).normal(size=p.shape).astype(np.float32), plain
    )
    got = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, plain)
    return plain, grads, got


def test_decay_spares_tables_gains_and_biases():
    mask = optim.default_decay_mask(boxed_params())
    assert mask == {
        "embed": False,
        "head": True,
        "blocks": {"kernel": True, "gain": False},
        "conv": True,
        "codebook": False,
        "bias": False,
    }


def test_adamw_decay_is_decoupled():
    config = make_config(warmup_steps=0, weight_decay=0.1, clip_norm=0.0, lr=0.01)
    params, grads, got = update(config)
    # First Adam step: m_hat / (sqrt(v_hat) + eps) = sign of the gradient.
    np.testing.assert_allclose(got["bias"], -0.01 * np.sign(grads["bias"]), rtol=1e-4)
    expected = -0.01 * (np.sign(grads["head"]) + 0.1 * np.asarray(params["head"]))
    np.testing.assert_allclose(got["head"], expected, rtol=1e-4)


def test_muon_orthogonalises_each_layer_and_leaves_the_rest_to_adam():
    config = make_config(name="muon", warmup_steps=0, weight_decay=0.0, clip_norm=0.0, lr=1.0)
    _, grads, got = update(config)
    _, _, adam = update(make_config(warmup_steps=0, weight_decay=0.0, clip_norm=0.0, lr=1.0))
    for name in ("embed", "head", "conv", "codebook", "bias"):
        np.testing.assert_array_equal(got[name], adam[name])
    kernel = np.asarray(got["blocks"]["kernel"])
    for layer in range(3):
        # Newton-Schulz brings singular values near 1 (0.7 .. 1.2), times 0.2 sqrt(max(8, 16)).
        values = np.linalg.svd(kernel[layer], compute_uv=False) / (0.2 * 4)
        assert 0.6 < values.min() and values.max() < 1.3
    # The other layers' gradients do not matter.
    changed = jax.tree.map(np.copy, grads)
    changed["blocks"]["kernel"][1] *= 5.0
    _, _, again = update(config, changed)
    np.testing.assert_array_equal(again["blocks"]["kernel"][0], got["blocks"]["kernel"][0])


def test_muon_update_has_the_size_of_adams():
    config = dict(warmup_steps=0, weight_decay=0.0, clip_norm=0.0, lr=1.0)
    _, _, got = update(make_config(name="muon", **config))
    rms = np.sqrt(np.mean(np.square(got["blocks"]["kernel"])))
    # A full-rank orthogonal [8, 16] has RMS 1 / sqrt(16): times 0.2 sqrt(16) = 0.2.
    assert rms == pytest.approx(0.2, rel=0.3)


def test_adafactor_keeps_rows_and_columns_only():
    params = {"w": jnp.ones((256, 512))}
    config = make_config(name="adafactor")
    state = optim.make(config, params, None, 100)[0].init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 1000


def test_narrow_moments_make_nearly_the_same_updates():
    """Half the memory; eight bits of a moment are 0.4 % of it."""
    narrow = make_config(mu_dtype="bfloat16", nu_dtype="bfloat16", warmup_steps=0)
    params = {"w": jnp.linspace(-1, 1, 64).reshape(8, 8)}

    def run(config):
        tx, _ = optim.make(config, params, None, 100)
        state = tx.init(params)
        for i in range(5):
            grads = {"w": jax.random.normal(jax.random.key(i), (8, 8))}
            updates, state = tx.update(grads, state, params)
        return updates["w"], {x.dtype for x in jax.tree.leaves(state) if x.ndim}

    expected, _ = run(make_config(warmup_steps=0))
    got, dtypes = run(narrow)
    assert dtypes == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(got, expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("name", optim.OPTIMISERS)
def test_every_optimiser_minimises(name):
    config = make_config(name=name, lr=0.03, weight_decay=0.0, warmup_steps=5)
    target = jax.random.normal(jax.random.key(1), (8, 4))
    params = {"w": jnp.zeros((8, 4))}
    tx, _ = optim.make(config, params, None, 200)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((p["w"] - target) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(200):
        params, state = step(params, state)
    assert float(jnp.mean((params["w"] - target) ** 2)) < 0.05


def test_warmup_then_cosine():
    config = make_config(schedule="cosine", warmup_steps=10, lr=1.0, end_lr_ratio=0.1)
    lr = optim.make_schedule(config, 110)
    np.testing.assert_allclose([lr(0), lr(4), lr(9), lr(10)], [0.1, 0.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(lr(60), 0.55, rtol=1e-5)
    np.testing.assert_allclose([lr(110), lr(500)], 0.1, rtol=1e-5)


def test_plateau_halving_halves_five_times():
    config = make_config(schedule="plateau_halving", warmup_steps=10, lr=1.0)
    lr = optim.make_schedule(config, 320)
    got = [float(lr(s)) for s in (10, 159, 161, 241, 281, 301, 311, 320)]
    np.testing.assert_allclose(got, [1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 32])


def test_constant_and_its_independence_of_steps():
    config = make_config(schedule="constant", warmup_steps=0, lr=0.3)
    assert float(optim.make_schedule(config, 7)(10**6)) == pytest.approx(0.3)
    assert not optim.depends_on_steps(config)
    assert optim.depends_on_steps(make_config(schedule="cosine"))
    assert not optim.depends_on_steps(make_config(schedule="cosine", decay_steps=10))


def test_clip_bounds_the_gradient_not_the_update():
    config = make_config(clip_norm=1.0, warmup_steps=0, weight_decay=0.0)
    boxed = boxed_params()
    huge = jax.tree.map(
        lambda b: np.full(b.value.shape, 1e6, np.float32),
        boxed,
        is_leaf=lambda b: hasattr(b, "names"),
    )
    _, _, got = update(config, huge)
    assert np.isfinite(got["bias"]).all()


def test_ema_decay_warms_up():
    np.testing.assert_allclose(optim.ema_decay(0.999, 0), 0.1, rtol=1e-6)
    np.testing.assert_allclose(optim.ema_decay(0.999, 90), 0.91, rtol=1e-6)
    np.testing.assert_allclose(optim.ema_decay(0.999, 10**6), 0.999, rtol=1e-6)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(name="adan"), "adan.*one of adamw, muon"),
        (dict(schedule="cosin"), "cosin.*constant, cosine"),
        (dict(lr=0.0), "lr > 0"),
        (dict(beta2=1.0), "beta2=1.0"),
        (dict(accum_steps=0), "accum_steps=0"),
        (dict(mu_dtype="float16"), "mu_dtype='float16'.*bfloat16"),
        (dict(nu_dtype="bfloat16", beta2=0.999), "beta2=0.999.*is constant in 8 bits.*0.99"),
        (dict(grad_reduce_dtype="half"), "'half'.*compute, float32"),
        (dict(schedule="cosine", warmup_steps=100), "leaves nothing of the 100 steps"),
    ],
)
def test_impossible_numbers_are_refused(change, text):
    with pytest.raises(UsageError, match=text):
        optim.make(make_config(**change), boxed_params(), None, 100)
