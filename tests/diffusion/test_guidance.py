"""Guidance: its two ends, what it must not mix, and one network call on local pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.diffusion import gaussian, guidance, samplers, schedules
from dalle_jax.diffusion.gaussian import Parameterisation


@pytest.fixture
def outputs(rng):
    """Conditional and unconditional, [4, 8, 8, 6]: eps and variance channels."""
    return (jnp.asarray(np.float32(rng.normal(size=(4, 8, 8, 6)))) for _ in range(2))


def test_pair_puts_the_two_of_an_example_side_by_side(rng):
    condition = {"text": np.arange(6).reshape(3, 2), "image": rng.normal(size=(3, 4, 5))}
    empty = {"text": np.full((1, 2), -1), "image": rng.normal(size=(3, 4, 5))}
    both = guidance.pair(condition, empty)
    np.testing.assert_array_equal(
        both["text"], [[0, 1], [-1, -1], [2, 3], [-1, -1], [4, 5], [-1, -1]]
    )
    assert both["image"].shape == (6, 4, 5)
    np.testing.assert_allclose(both["image"][0::2], condition["image"], rtol=1e-6)
    np.testing.assert_allclose(both["image"][1::2], empty["image"], rtol=1e-6)


def test_mix_at_its_ends_and_beyond(outputs):
    c, u = outputs
    mix = jax.jit(guidance.mix, static_argnums=2)
    both = guidance.pair(c, u)
    np.testing.assert_array_equal(mix(both, 1.0, 3), c)  # bit for bit: guidance 1 is no guidance
    np.testing.assert_allclose(mix(both, 0.0, 3)[..., :3], u[..., :3], atol=1e-6)
    for scale in (0.5, 3.0, 8.0):
        got = mix(both, scale, 3)
        np.testing.assert_allclose(got[..., :3], (u + scale * (c - u))[..., :3], atol=1e-5)
        np.testing.assert_array_equal(got[..., 3:], c[..., 3:])  # the variance is not mixed
    each = jnp.asarray([0.0, 1.0, 2.0, 4.0])
    got = mix(both, each, 3)
    for i, scale in enumerate(each):
        np.testing.assert_array_equal(got[i], mix(both, scale, 3)[i])
    assert mix(both.astype(jnp.bfloat16), 2.0, 3).dtype == jnp.float32


def test_mixing_eps_x_0_or_v_is_the_same(rng):
    schedule = schedules.make("cosine", 100)
    x_t, eps_c, eps_u = (jnp.asarray(np.float32(rng.normal(size=(4, 8, 8, 3)))) for _ in range(3))
    t = jnp.asarray([0, 20, 50, 80])
    expected = gaussian.x_0_from_eps(
        schedule, x_t, t, guidance.mix(guidance.pair(eps_c, eps_u), 3.0, 3)
    )
    for kind in ("x_0", "v"):
        pair = guidance.pair(
            *(
                gaussian.target(
                    kind, schedule, gaussian.x_0_from_eps(schedule, x_t, t, eps), t, eps
                )
                for eps in (eps_c, eps_u)
            )
        )
        got = gaussian.predicted_x_0(kind, schedule, x_t, t, guidance.mix(pair, 3.0, 3))
        np.testing.assert_allclose(got, expected, atol=2e-4)


def test_guided_asks_once_and_samples_like_the_mixture():
    """A conditional and an unconditional predictor of points: sampling ends at their mixture."""
    schedule = schedules.respace(schedules.make("linear"), 20)
    full = jnp.asarray(np.sqrt(schedules.make("linear").alpha_bar), jnp.float32)
    left = jnp.asarray(np.sqrt(1 - schedules.make("linear").alpha_bar), jnp.float32)
    where, empty = jnp.asarray([[0.2], [0.4], [-0.3]]), jnp.asarray([[0.1]])
    calls = []

    def predict_pairs(x, t):  # all the data is one point, the condition
        calls.append((x.shape, t.shape))
        points = guidance.pair(where, empty)
        return (x - full[t][:, None] * points) / left[t][:, None]

    def run(scale):
        x_t = jnp.asarray([[0.5], [-1.0], [0.0]])
        p = Parameterisation(clip="none")
        return samplers.ddim(guidance.guided(predict_pairs, scale), schedule, p, x_t)

    run = jax.jit(run)
    for scale in (1.0, 0.0, 2.5):
        np.testing.assert_allclose(run(scale), empty + scale * (where - empty), atol=1e-4)
    assert calls == [((6, 1), (6,))]  # one doubled batch, one compilation for all scales


def test_pairs_stay_on_their_device():
    """Eight examples over eight devices: doubling and mixing exchange nothing."""
    mesh = Mesh(np.asarray(jax.devices()), "data")
    spread = NamedSharding(mesh, PartitionSpec("data"))
    predict = guidance.guided(lambda x, t: jnp.sin(x) * t.reshape(-1, 1, 1, 1), 3.0)
    x = jax.device_put(jnp.ones((8, 4, 4, 3)), spread)
    t = jax.device_put(jnp.arange(8), spread)
    compiled = jax.jit(predict, out_shardings=spread).lower(x, t).compile()
    text = compiled.as_text()
    for exchange in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert exchange not in text
    expected = np.broadcast_to(np.sin(1) * np.arange(8).reshape(-1, 1, 1, 1), x.shape)
    np.testing.assert_allclose(compiled(x, t), expected, rtol=1e-5)
