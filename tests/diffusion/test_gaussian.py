"""Diffusion's Gaussians: inverses, Bayes, gradients that must not flow; then float64 numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.diffusion import gaussian, schedules
from dalle_jax.diffusion.gaussian import Parameterisation
from dalle_jax.types import UsageError

SHAPE = (6, 4, 4, 3)
ROWS = np.asarray([0, 1, 30, 60, 98, 99])  # of 100
LEARNED = Parameterisation(variance="learned_range")


@pytest.fixture(params=["linear", "cosine"])
def schedule(request):
    return schedules.make(request.param, 100)


def batch(rng, levels=False):
    """x_0, t, eps; x_0 on the 256 levels of a picture if asked."""
    x_0 = rng.integers(0, 256, SHAPE) / 127.5 - 1 if levels else rng.uniform(-1, 1, SHAPE)
    return tuple(
        jnp.asarray(a) for a in (np.float32(x_0), ROWS, np.float32(rng.normal(size=SHAPE)))
    )


def test_q_sample_has_the_marginal_of_single_steps(schedule, rng):
    """Step by step with beta, in float64, mean and variance come to those of the jump."""
    x_0, t, _ = batch(rng)
    mean, variance, means, variances = np.asarray(x_0[:, 0, 0, 0], np.float64), 0.0, [], []
    for beta in schedule.beta:
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        means.append(mean), variances.append(variance)
    sample = jax.jit(lambda eps: gaussian.q_sample(schedule, x_0, t, eps))
    still, moved = sample(jnp.zeros(SHAPE)), sample(jnp.ones(SHAPE))
    each = np.arange(len(ROWS))
    np.testing.assert_allclose(still[:, 0, 0, 0], np.stack(means)[ROWS, each], rtol=1e-5)
    np.testing.assert_allclose(
        (moved - still)[:, 0, 0, 0] ** 2, np.asarray(variances)[ROWS], rtol=1e-4
    )


def test_q_sample_keeps_unit_variance(schedule, key):
    key_x, key_eps = jax.random.split(key)
    x_0 = jax.random.normal(key_x, (6, 4096))
    x_t = gaussian.q_sample(schedule, x_0, jnp.asarray(ROWS), jax.random.normal(key_eps, x_0.shape))
    np.testing.assert_allclose(x_t.std(1), 1.0, atol=0.045)  # 4 sigma of 4,096 samples


def test_q_sample_wants_one_row_per_example(schedule, rng):
    x_0, _, eps = batch(rng)
    with pytest.raises(ValueError, match="one per example"):
        gaussian.q_sample(schedule, x_0, jnp.asarray(3), eps)


def test_bfloat16_is_computed_in_float32(schedule, rng):
    x_0, t, eps = batch(rng)
    low = gaussian.q_sample(schedule, x_0.astype(jnp.bfloat16), t, eps.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    assert gaussian.split(LEARNED, jnp.zeros((2, 4), jnp.bfloat16))[1].dtype == jnp.float32


def test_conversions_are_inverses(schedule, rng):
    x_0, t, eps = batch(rng)

    @jax.jit
    def round_trips():
        x_t = gaussian.q_sample(schedule, x_0, t, eps)
        v = gaussian.v_from(schedule, x_0, t, eps)
        return [
            (gaussian.x_0_from_eps(schedule, x_t, t, eps), x_0),
            (gaussian.eps_from_x_0(schedule, x_t, t, x_0), eps),
            (gaussian.x_0_from_v(schedule, x_t, t, v), x_0),
            (gaussian.eps_from_v(schedule, x_t, t, v), eps),
        ] + [
            (
                gaussian.predicted_x_0(
                    kind, schedule, x_t, t, gaussian.target(kind, schedule, x_0, t, eps)
                ),
                x_0,
            )
            for kind in ("eps", "x_0", "v")
        ]

    # eps at the first row and x_0 at the last come from differences: 1e-7 / sqrt(alpha_bar).
    signal = schedule.alpha_bar[ROWS]
    error = 1e-6 / np.sqrt(np.minimum(signal, 1 - signal)).reshape(-1, 1, 1, 1)
    for got, expected in round_trips():
        assert (np.abs(got - expected) < error).all()


def test_posterior_matches_bayes_by_numerical_integration(schedule):
    """p(x_{t-1} | x_t, x_0) on a fine grid: prior from x_0, likelihood of one noising step."""
    x_0, x_t = 0.4, -0.7
    for row in (1, 2, 40, 90):
        before, beta = schedule.alpha_bar_prev[row], schedule.beta[row]
        centre, width = math.sqrt(before) * x_0, math.sqrt(1 - before)
        ends = sorted([centre, x_t / math.sqrt(1 - beta)])  # the posterior's mean lies between
        grid = np.linspace(ends[0] - 12 * width, ends[1] + 12 * width, 400_001)
        log_p = -((grid - centre) ** 2) / (2 * width**2)
        log_p -= (x_t - math.sqrt(1 - beta) * grid) ** 2 / (2 * beta)
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        mean = (p * grid).sum()
        variance = (p * (grid - mean) ** 2).sum()
        got = gaussian.posterior_mean(
            schedule, jnp.asarray([[x_0]]), jnp.asarray([[x_t]]), jnp.asarray([row])
        )
        np.testing.assert_allclose(got[0, 0], mean, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(schedule.posterior_variance[row], variance, rtol=1e-5)


def test_posterior_of_row_0_is_x_0_bit_for_bit(schedule, rng):
    x_0, _, eps = batch(rng)
    mean = jax.jit(lambda: gaussian.posterior_mean(schedule, x_0, eps, jnp.asarray(0)))()
    np.testing.assert_array_equal(mean, x_0)


def test_learned_range_interpolates_between_the_fixed_choices(schedule, rng):
    x_0, t, _ = batch(rng)

    def learned(raw):
        return gaussian.log_variance(LEARNED, schedule, t, jnp.full(SHAPE, raw), x_0)

    small = gaussian.log_variance(Parameterisation(), schedule, t, None, x_0)
    large = np.log(schedule.beta)[ROWS].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(learned(-1.0), np.broadcast_to(small, SHAPE), rtol=1e-6)
    np.testing.assert_allclose(learned(1.0), np.broadcast_to(large, SHAPE), rtol=1e-6)
    np.testing.assert_allclose(learned(0.0), np.broadcast_to((small + large) / 2, SHAPE), rtol=1e-5)
    fixed = gaussian.log_variance(Parameterisation(variance="beta"), schedule, t, None, x_0)
    np.testing.assert_allclose(fixed[1:], large[1:], rtol=1e-6)
    np.testing.assert_allclose(fixed[0], small[0])  # row 0 would be the log of row 1's posterior


def test_clipping(rng):
    x = np.float32(
        rng.normal(size=(5, 4, 4, 3)) * np.asarray([0.1, 1, 2, 5, 9]).reshape(-1, 1, 1, 1)
    )
    none, static, dynamic = (
        np.asarray(gaussian.clip(Parameterisation(clip=kind, percentile=0.9), jnp.asarray(x)))
        for kind in ("none", "static", "dynamic")
    )
    np.testing.assert_array_equal(none, x)
    np.testing.assert_array_equal(static, np.clip(x, -1, 1))
    for got, example in zip(dynamic, x, strict=True):
        size = max(np.quantile(np.abs(example), 0.9), 1)
        np.testing.assert_allclose(got, np.clip(example, -size, size) / size, rtol=1e-5)
    np.testing.assert_array_equal(dynamic[0], x[0])  # inside already: bit for bit
    wide = Parameterisation(clip="static", bound=5.0)
    np.testing.assert_array_equal(gaussian.clip(wide, jnp.asarray(x)), np.clip(x, -5, 5))


def test_levels_have_all_the_probability_there_is():
    levels = jnp.arange(256) / 127.5 - 1
    log_likelihood = jax.jit(gaussian.level_log_likelihood)
    for mean, std in ((0.0, 0.3), (0.9, 0.05), (-2.0, 0.5), (0.3, 0.002)):
        log_p = log_likelihood(levels, jnp.full(256, mean), jnp.full(256, math.log(std)))
        np.testing.assert_allclose(jnp.exp(log_p).sum(), 1, atol=1e-5)
        cdf = [0.5 * (1 + math.erf((e / 127.5 - 1 - mean) / std / math.sqrt(2)))
               for e in np.arange(0.5, 255)]  # fmt: skip
        mass = np.diff(np.concatenate([[0.0], cdf, [1.0]]))
        sure = mass > 1e-11  # float64's own 1 - cdf ends there; below is the floor
        np.testing.assert_allclose(log_p[sure], np.log(mass[sure]), rtol=1e-3, atol=1e-3)
        assert (np.asarray(log_p) >= math.log(0.99e-12)).all()


def test_kl_against_numpy_and_zero_for_equals(rng):
    mean_q, log_q, mean_p, log_p = rng.normal(size=(4, 50))
    var_q, var_p = np.exp(log_q), np.exp(log_p)
    expected = (np.log(var_p / var_q) + (var_q + (mean_q - mean_p) ** 2) / var_p - 1) / 2
    got = gaussian.normal_kl(*(jnp.asarray(a, jnp.float32) for a in (mean_q, log_q, mean_p, log_p)))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(gaussian.normal_kl(*(jnp.asarray(3.0),) * 4), 0)


@pytest.mark.parametrize("predicts", ["eps", "x_0", "v"])
def test_losses_against_numpy(schedule, rng, predicts):
    x_0, t, eps = batch(rng, levels=True)
    p = dataclasses.replace(LEARNED, predicts=predicts)
    wrong = np.float32(rng.normal(size=SHAPE) * 0.05)
    v = np.float32(rng.uniform(-1, 1, SHAPE))
    output = jnp.concatenate([gaussian.target(predicts, schedule, x_0, t, eps) + wrong, v], -1)
    got = jax.jit(lambda o: gaussian.losses(p, schedule, o, x_0, t, eps))(output)
    np.testing.assert_allclose(got["mse"], np.square(wrong).mean((1, 2, 3)), rtol=1e-3)
    np.testing.assert_allclose(got["loss"], got["mse"] + 0.1 * got["vb"], rtol=1e-6)  # 100 / 1,000

    # The means differ as far as the estimates of x_0 do; everything in float64.
    def column(table):
        return table[ROWS].reshape(-1, 1, 1, 1)

    signal, left = np.sqrt(column(schedule.alpha_bar)), np.sqrt(1 - column(schedule.alpha_bar))
    shift = {"eps": -left / signal, "x_0": 1.0, "v": -left}[predicts] * wrong.astype(np.float64)
    small, large = column(schedule.posterior_log_variance), np.log(column(schedule.beta))
    log_var = (v + 1.0) / 2 * large + (1 - v) / 2.0 * small
    distance = (column(schedule.posterior_x_0) * shift) ** 2
    kl = 0.5 * (log_var - small + (np.exp(small) + distance) * np.exp(-log_var) - 1)
    expected = kl.mean((1, 2, 3)) / np.log(2)
    np.testing.assert_allclose(got["vb"][1:], expected[1:], rtol=5e-3)
    x, mean, std = np.asarray(x_0[0], np.float64), (x_0 + shift)[0], np.exp(0.5 * log_var[0])
    edges = [np.clip((x + side / 255 - mean) / std, -30, 30) for side in (-1, 1)]
    edges[0][x < -0.999], edges[1][x > 0.999] = -np.inf, np.inf
    below, above = (np.vectorize(math.erf)(e / math.sqrt(2)) / 2 for e in edges)
    mass = np.maximum(above - below, 1e-12)
    np.testing.assert_allclose(got["vb"][0], -np.log2(mass).mean(), rtol=5e-3)


def test_the_true_posterior_costs_nothing_above_row_0(schedule, rng):
    x_0, t, eps = batch(rng, levels=True)
    output = jnp.concatenate([eps, -jnp.ones(SHAPE)], -1)
    got = jax.jit(lambda o: gaussian.losses(LEARNED, schedule, o, x_0, t, eps))(output)
    np.testing.assert_allclose(got["mse"], 0, atol=1e-12)
    np.testing.assert_allclose(got["vb"][1:], 0, atol=2e-5)
    assert got["vb"][0] > 0  # the decoder's bits


def test_gradient_of_the_variational_term_does_not_reach_eps(schedule, rng):
    x_0, t, eps = batch(rng, levels=True)
    prediction = eps + np.float32(rng.normal(size=SHAPE))
    v = jnp.asarray(np.float32(rng.uniform(-1, 1, SHAPE)))

    def total(prediction, v, which):
        output = jnp.concatenate([prediction, v], -1)
        return gaussian.losses(LEARNED, schedule, output, x_0, t, eps)[which].sum()

    @jax.jit
    def gradients(prediction, v):
        return {
            which: jax.grad(total, (0, 1))(prediction, v, which) for which in ("vb", "mse", "loss")
        }

    gradients = gradients(prediction, v)
    to_eps, to_v = gradients["vb"]
    np.testing.assert_array_equal(to_eps, 0)
    assert np.isfinite(to_v).all() and (np.abs(to_v).max((1, 2, 3)) > 0).all()
    mse_to_eps, mse_to_v = gradients["mse"]
    np.testing.assert_array_equal(mse_to_v, 0)
    # So the hybrid trains eps with the simple loss alone, v with the variational one alone.
    both_to_eps, both_to_v = gradients["loss"]
    np.testing.assert_allclose(both_to_eps, mse_to_eps, rtol=1e-6)
    np.testing.assert_allclose(both_to_v, 0.1 * to_v, rtol=1e-4, atol=1e-8)


def test_without_a_learned_range_there_is_no_variational_term(schedule, rng):
    x_0, t, eps = batch(rng)
    got = gaussian.losses(Parameterisation(), schedule, eps + 1, x_0, t, eps)
    assert set(got) == {"loss", "mse"}
    np.testing.assert_allclose(got["loss"], 1, rtol=1e-5)


def test_embeddings_are_examples_too(schedule, rng):
    z, t = jnp.asarray(np.float32(rng.normal(size=(6, 8)))), jnp.asarray(ROWS)
    p = Parameterisation(predicts="x_0", clip="none")
    got = gaussian.losses(p, schedule, z + 2, z, t, jnp.zeros_like(z))
    np.testing.assert_allclose(got["loss"], 4, rtol=1e-5)


@pytest.mark.parametrize("cap", [1.0, 5.0, 1e9])
@pytest.mark.parametrize("predicts", ["eps", "x_0", "v"])
def test_a_capped_error_is_that_of_v_or_of_x_0(schedule, rng, predicts, cap):
    """One error of x_0 counts the same whatever the network predicts."""
    x_0, eps, wrong = rng.normal(size=(3, 4, 2, 2, 3)).astype(np.float32)
    t = np.array([0, 10, 500, 900]) * schedule.num_steps // 1000
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    a, s = (np.sqrt(x)[t].reshape(4, 1, 1, 1) for x in (schedule.alpha_bar, 1 - schedule.alpha_bar))
    guess = x_0 + wrong
    noise = (x_t - a * guess) / s
    output = {"eps": noise, "x_0": guess, "v": a * noise - s * guess}[predicts]
    p = Parameterisation(predicts=predicts)
    mse = gaussian.losses(p, schedule, output, x_0, t, eps)["mse"]
    weight = gaussian.capped_weight(predicts, schedule, t, cap)
    square = np.square(wrong).mean(axis=(1, 2, 3))
    expected = square * np.minimum(1 / s.ravel() ** 2, cap)
    np.testing.assert_allclose(mse * weight, expected, rtol=2e-2 if predicts == "eps" else 1e-3)


def test_a_cap_below_one_is_refused(schedule):
    with pytest.raises(UsageError, match="cap of 0.5"):
        gaussian.capped_weight("x_0", schedule, np.array([0]), 0.5)


@pytest.mark.parametrize(
    "fields",
    [{"predicts": "noise"}, {"variance": "learned"}, {"clip": "hard"}, {"bound": 0.0},
     {"percentile": 1.1}],
)  # fmt: skip
def test_a_bad_parameterisation_is_refused(fields):
    with pytest.raises(UsageError):
        Parameterisation(**fields)


def test_an_output_of_the_wrong_width_is_refused(schedule, rng):
    x_0, t, eps = batch(rng)
    with pytest.raises(ValueError, match="two for each"):
        gaussian.split(LEARNED, x_0)
    with pytest.raises(ValueError, match="expected"):
        gaussian.losses(Parameterisation(), schedule, jnp.zeros((*SHAPE[:3], 6)), x_0, t, eps)
