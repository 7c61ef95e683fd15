"""Schedules: independent float64 formulas, and what fewer steps must keep."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.diffusion import schedules
from dalle_jax.types import UsageError


def test_linear_is_the_product_of_one_minus_beta():
    for n, first, last in ((1000, 1e-4, 0.02), (250, 4e-4, 0.08)):
        schedule = schedules.make("linear", n)
        left, expected = 1.0, []
        for i in range(n):
            left *= 1 - (first + (last - first) * i / (n - 1))
            expected.append(left)
        np.testing.assert_allclose(schedule.alpha_bar, expected, rtol=1e-11)


def test_cosine_is_its_closed_form_until_beta_is_capped():
    schedule = schedules.make("cosine", 1000)

    def signal(s):
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [signal((i + 1) / 1000) / signal(0) for i in range(999)]
    np.testing.assert_allclose(schedule.alpha_bar[:-1], expected, rtol=1e-9)
    np.testing.assert_allclose(schedule.beta[-1], 0.999, rtol=1e-9)  # uncapped it would be 1
    assert schedule == schedules.make("squaredcos_cap_v2", 1000)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("spacing", [1000, 250, "ddim50", "fast27", 2, 1])
def test_signal_falls_and_tables_agree_with_their_definitions(name, spacing):
    schedule = schedules.respace(schedules.make(name), spacing)
    signal = schedule.alpha_bar
    assert signal.dtype == np.float64
    assert (np.diff(signal) < 0).all() and signal[0] < 1 and signal[-1] > 0
    before = np.concatenate([[1.0], signal[:-1]])
    np.testing.assert_allclose(np.cumprod(1 - schedule.beta), signal, rtol=1e-7)
    # The product of two Gaussians in x_{t-1}: precisions add.
    precision = (1 - schedule.beta[1:]) / schedule.beta[1:] + 1 / (1 - before[1:])
    np.testing.assert_allclose(schedule.posterior_variance[1:], 1 / precision, rtol=1e-9)
    assert schedule.posterior_variance[0] == 0
    assert (schedule.posterior_variance <= schedule.beta).all()
    np.testing.assert_allclose(
        np.exp(schedule.posterior_log_variance)[1:], schedule.posterior_variance[1:], rtol=1e-9
    )
    if schedule.num_steps > 1:
        assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]
    assert np.isfinite(schedule.posterior_log_variance).all()
    assert (schedule.posterior_x_0[0], schedule.posterior_x_t[0]) == (1, 0)  # exactly


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_respacing_to_all_steps_is_the_identity(name):
    schedule = schedules.make(name, 100)
    for spacing in (100, "100", "50,50", [25, 25, 25, 25], "ddim100", "logsnr100"):
        assert schedules.respace(schedule, spacing) == schedule


def test_respacing_changes_neither_the_noise_nor_the_names_of_its_steps():
    schedule = schedules.make("cosine", 1000)
    fewer = schedules.respace(schedule, "ddim50")
    assert fewer.timesteps == tuple(range(0, 1000, 20)) and fewer.num_train_steps == 1000
    np.testing.assert_array_equal(fewer.alpha_bar, schedule.alpha_bar[::20])
    # One long step adds as much noise as its short ones.
    remaining = np.prod(1 - schedule.beta[21:41])
    np.testing.assert_allclose(1 - fewer.beta[2], remaining, rtol=1e-9)
    again = schedules.respace(fewer, "ddim10")  # names stay those of training
    assert again.timesteps == tuple(range(0, 1000, 100))


def test_spacings():
    rows = schedules.spaced_rows
    # fmt: off
    assert rows(1000, "fast27") == (
        0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377,
        399, 400, 500, 599, 600, 799, 800, 997,
    )
    # fmt: on
    assert rows(300, "10,15,20")[:10] == (0, 11, 22, 33, 44, 55, 66, 77, 88, 99)
    assert [sum(100 * s <= r < 100 * s + 100 for r in rows(300, [10, 15, 20])) for s in range(3)] \
        == [10, 15, 20]  # fmt: skip
    assert rows(10, [2, 1, 2]) == (0, 3, 4, 7, 9)  # sections of 4, 3 and 3
    assert rows(1000, 27)[13] == 499  # added up; 13 * 999 / 26 = 499.5 would round to 500
    for n in (2, 15, 64, 250):
        chosen = rows(1000, n)
        assert len(chosen) == n and (chosen[0], chosen[-1]) == (0, 999)
        assert rows(1000, str(n)) == chosen
    assert rows(1000, "ddim250") == tuple(range(0, 1000, 4))
    assert rows(999, "ddim333") == tuple(range(0, 999, 3))


@pytest.mark.parametrize(
    ("spacing", "hint"),
    [
        ("ddim300", "ddim250 and ddim334"),
        ("ddim", "ddim50"),
        ("ddim1001", "ddim1000"),
        (1001, "asks for 1001 of the 1000"),
        ("600,10", "600 of the 500 steps in section 1 of 2"),
        ("0", "fast27"),
        (-3, "fast27"),
        ([], "fast27"),
        ("slow", "fast27"),
        ("10,,10", "fast27"),
        (None, "fast27"),
        (2.5, "fast27"),
    ],
)
def test_an_impossible_spacing_says_what_is_possible(spacing, hint):
    with pytest.raises(UsageError, match=hint):
        schedules.spaced_rows(1000, spacing)


@pytest.mark.parametrize(("name", "n"), [("quadratic", 100), ("linear", 20), ("cosine", 0)])
def test_a_bad_schedule_is_refused(name, n):
    with pytest.raises(UsageError):
        schedules.make(name, n)


@pytest.mark.parametrize(
    ("signal", "timesteps"),
    [((0.5, 0.6), (0, 1)), ((1.0, 0.5), (0, 1)), ((0.5, 0.0), (0, 1)), ((), ()),
     ((0.5, 0.4), (1, 0)), ((0.5, 0.4), (0, 5)), ((0.5, 0.4), (0,))],
)  # fmt: skip
def test_a_schedule_validates_itself(signal, timesteps):
    with pytest.raises(ValueError):
        schedules.Schedule(signal, timesteps, 5)


def test_a_schedule_is_a_static_argument_of_jit():
    traces = []

    def f(t, like, schedule):
        traces.append(schedule)
        return schedules.at(1 - schedule.alpha_bar, t, like)

    f = jax.jit(f, static_argnames="schedule")
    like = jnp.zeros((2, 4, 4, 3))
    for _ in range(2):  # equal by value, so compiled once
        rows = f(jnp.asarray([0, 999]), like, schedule=schedules.make("cosine"))
    assert len(traces) == 1
    assert rows.shape == (2, 1, 1, 1) and rows.dtype == jnp.float32
    # float64 until here: 1 - alpha_bar of row 0 taken in float32 would be off by 1e-3 of itself.
    np.testing.assert_allclose(rows[0, 0, 0, 0], 1 - schedules.make("cosine").signal[0], rtol=1e-6)
    assert f(jnp.asarray(3), like, schedule=schedules.make("linear")).shape == ()
