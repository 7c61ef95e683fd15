"""Samplers against data whose best predictor is known: N(MU, STD^2), every pixel by itself.

There everything is affine, so where DDIM must end is a product of cosines, written down below.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.diffusion import gaussian, samplers, schedules
from dalle_jax.diffusion.gaussian import Parameterisation
from dalle_jax.types import UsageError

MU, STD = 0.4, 0.3
SHAPE = (8, 8, 3)
FREE = Parameterisation(clip="none")


def exact(schedule, predicts="eps", variance_channels=False, traces=None):
    """The best possible predictor: E[eps | x_t] (or x_0, or v) of N(MU, STD^2) data.

    Args:
      schedule: of training; predict must be fed its steps.
      predicts: what to return.
      variance_channels: append a learned range that says `posterior`.
      traces: list to which each call is appended.
    """
    signal = jnp.asarray(np.sqrt(schedule.alpha_bar), jnp.float32)
    noise = jnp.asarray(np.sqrt(1 - schedule.alpha_bar), jnp.float32)

    def predict(x, t):
        if traces is not None:
            traces.append(t)
        a, s = (table[t].reshape(-1, *[1] * (x.ndim - 1)) for table in (signal, noise))
        centred = (x - a * MU) / (a * a * STD**2 + s * s)
        eps, x_0 = s * centred, MU + a * STD**2 * centred
        output = {"eps": eps, "x_0": x_0, "v": a * eps - s * x_0}[predicts]
        return jnp.concatenate([output, -jnp.ones_like(x)], -1) if variance_channels else output

    return predict


def ddim_by_hand(schedule, x_t):
    """Where DDIM at eta 0 leads, float64.

    With the exact predictor a step multiplies (x - sqrt(alpha_bar) MU) / std(x) by cos(d), where
    d is how far the angle atan(noise / (signal STD)) turns.
    """
    signal, noise = np.sqrt(schedule.alpha_bar), np.sqrt(1 - schedule.alpha_bar)
    angles = np.concatenate([[0.0], np.arctan2(noise, signal * STD)])
    shrink = np.cos(np.diff(angles)).prod()
    spread = np.hypot(signal[-1] * STD, noise[-1])
    return MU + STD * shrink * (np.asarray(x_t, np.float64) - signal[-1] * MU) / spread


def normal(rng, n):
    """[n, *SHAPE] for x_T: jax's own noise takes seconds to compile wherever it stands."""
    return jnp.asarray(np.float32(rng.normal(size=(n, *SHAPE))))


def keys_of(seed, n, first=0):
    return samplers.example_keys(jax.random.key(seed), first + jnp.arange(n))


@pytest.fixture(params=["linear", "cosine"])
def schedule(request):
    return schedules.make(request.param, 1000)


@pytest.mark.parametrize("spacing", [1000, 250, "ddim50", "fast27"])
def test_ddim_ends_at_the_closed_form_of_its_cosines(schedule, rng, spacing):
    """With the original schedule's predictor: so the steps it is fed are those of training."""
    short = schedules.respace(schedule, spacing)
    x_t = normal(rng, 4)
    x_0 = jax.jit(lambda x: samplers.ddim(exact(schedule), short, FREE, x))(x_t)
    expected = ddim_by_hand(short, x_t)
    # x_0 from eps divides by the signal: 5e-5 in cosine's last row, and its rounding with it.
    np.testing.assert_allclose(x_0, expected, atol=2e-3 if schedule.signal[-1] < 1e-6 else 2e-5)


@pytest.mark.parametrize("predicts", ["eps", "x_0", "v"])
def test_every_parameterisation_leads_to_the_same_place(schedule, rng, predicts):
    short = schedules.respace(schedule, 50)
    p = Parameterisation(predicts=predicts, clip="none", variance="learned_range")
    predict = exact(schedule, predicts, variance_channels=True)
    x_t = normal(rng, 4)
    x_0 = jax.jit(lambda x: samplers.ddim(predict, short, p, x))(x_t)
    np.testing.assert_allclose(x_0, ddim_by_hand(short, x_t), atol=2e-3)


@pytest.mark.parametrize("predicts", ["x_0", "v"])
def test_ten_steps_of_dpmpp_miss_by_less_than_forty_of_ddim(schedule, rng, predicts):
    """The limit of infinitely many steps: x has a constant distance from the mean in deviations.

    Measured, ddim 40 and dpmpp 10, 20, 40: linear .018, .0078, .0043, .0010; cosine .021, .0056,
    .0060, .0014. (Evenly spaced, 10 and 20 steps of dpmpp are worse than ddim's.)
    """
    p = Parameterisation(predicts=predicts, clip="none", variance="learned_range")
    predict = exact(schedule, predicts, variance_channels=True)
    x_t = normal(rng, 4)
    signal, noise = schedule.signal[-1], np.sqrt(1 - schedule.alpha_bar[-1])
    end = MU + STD * (np.asarray(x_t, np.float64) - signal * MU) / np.hypot(signal * STD, noise)

    def error(sampler, steps):
        short = schedules.respace(schedule, f"logsnr{steps}")
        assert short.num_steps == steps and short.timesteps[-1] == schedule.timesteps[-1]
        samples = jax.jit(lambda x: sampler(predict, short, p, x))(x_t)
        return np.sqrt(np.mean((samples - end) ** 2))

    few, more = error(samplers.dpmpp, 10), error(samplers.dpmpp, 40)
    assert few < error(samplers.ddim, 40) / 1.8
    assert more < few / 3


def test_one_step_of_dpmpp_is_that_of_ddim(schedule, rng):
    """As is every step with a predictor whose x_0 is constant."""
    x_t = normal(rng, 2)
    constant = Parameterisation(predicts="x_0", clip="none")
    for spacing in (1, 7):
        short = schedules.respace(schedule, spacing)
        a, b = (
            jax.jit(lambda x, f=f, s=short: f(lambda x, t: 0.3 + 0 * x, s, constant, x))(x_t)
            for f in (samplers.dpmpp, samplers.ddim)
        )
        np.testing.assert_allclose(a, b, atol=1e-5)


def sample(name, schedule, short, x_t, predict=None, p=FREE, **options):
    """What a sampler makes of x_t, with one key per example."""
    predict = predict or exact(schedule)
    return getattr(samplers, name)(predict, short, p, x_t, keys_of(1, len(x_t)), **options)


def std_by_hand(short, eta):
    """Spread of DDIM's samples, float64; eta 1 is DDPM with the posterior's variance.

    Few steps fall short of STD, and the more noise they draw, the more: 4 % at 250 of linear.
    """
    variance = 1.0
    for a2, before, fresh in zip(
        short.alpha_bar[::-1],
        short.alpha_bar_prev[::-1],
        eta**2 * short.posterior_variance[::-1],
        strict=True,
    ):
        spread = a2 * STD**2 + 1 - a2  # x_0 = gain x + …, eps = gain x + …, and so x_{t-1}
        gain = np.sqrt(before * a2) * STD**2 + np.sqrt((1 - before - fresh) * (1 - a2))
        variance = (gain / spread) ** 2 * variance + fresh
    return np.sqrt(variance)


@pytest.mark.parametrize(("name", "etas"), [("ddpm", [None]), ("ddim", [0.0, 0.5, 1.0])])
def test_samples_have_the_mean_and_spread_of_the_data(schedule, rng, name, etas):
    short = schedules.respace(schedule, 250)

    @jax.jit
    def run(x_t, eta):  # None is static; other etas share one program
        return sample(name, schedule, short, x_t, **({} if eta is None else {"eta": eta}))

    for eta in etas:
        expected = std_by_hand(short, 1 if eta is None else eta)
        np.testing.assert_allclose(expected, STD, rtol=0.05)
        check_moments(run(normal(rng, 64), eta), expected)


def check_moments(x, std):
    """x: [64, 8, 8, 3] that should be independent draws of N(MU, std^2)."""
    np.testing.assert_allclose(x.mean(), MU, atol=0.011)  # 4 sigma
    np.testing.assert_allclose(x.std(), std, rtol=0.026)  # 4 sigma
    # Pixels are independent: no example and no place has noise in common with another.
    flat = np.asarray(x).reshape(64, -1)
    for rows in (flat, flat.T):
        correlation = np.corrcoef(rows)[~np.eye(len(rows), dtype=bool)]
        np.testing.assert_allclose(correlation.mean(), 0, atol=0.01)


def test_ddim_at_eta_1_is_ddpm(rng):
    """With the posterior's variance, learned or not, and the same noise (Song et al., §4.1)."""
    schedule = schedules.make("cosine")
    short = schedules.respace(schedule, 20)
    learned = Parameterisation(clip="none", variance="learned_range")
    says_posterior = exact(schedule, variance_channels=True)

    @jax.jit
    def run(x_t):
        return (
            sample("ddpm", schedule, short, x_t),
            sample("ddpm", schedule, short, x_t, predict=says_posterior, p=learned),
            sample("ddim", schedule, short, x_t, eta=1.0),
            sample("ddim", schedule, short, x_t),
        )

    ancestral, by_learned, noisy, quiet = run(normal(rng, 4))
    np.testing.assert_allclose(by_learned, ancestral, atol=3e-4)
    np.testing.assert_allclose(noisy, ancestral, atol=3e-4)
    assert np.abs(ancestral - quiet).max() > 0.1


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 0.7})])
def test_an_example_does_not_depend_on_its_batch_or_device(rng, name, options):
    schedule = schedules.make("linear")
    short = schedules.respace(schedule, 10)

    @jax.jit
    def run(x_t, keys):
        return getattr(samplers, name)(exact(schedule), short, FREE, x_t, keys, **options)

    x_t, keys = normal(rng, 8), keys_of(1, 8)
    together = run(x_t, keys)
    for i in (0, 5):
        np.testing.assert_allclose(run(x_t[i : i + 1], keys[i : i + 1])[0], together[i], atol=1e-6)
    over_devices = NamedSharding(Mesh(np.asarray(jax.devices()), "data"), PartitionSpec("data"))
    spread = run(*jax.device_put((x_t, keys), over_devices))
    assert len(spread.sharding.device_set) == 8 and not spread.is_fully_replicated
    np.testing.assert_allclose(spread, together, atol=1e-6)


def test_noise_is_a_function_of_key_and_step():
    noise = jax.jit(samplers.noise, static_argnums=2)
    eight = noise(keys_of(0, 8), 3, SHAPE)
    np.testing.assert_array_equal(noise(keys_of(0, 1, first=5), 3, SHAPE)[0], eight[5])
    for other in (noise(keys_of(0, 8), 4, SHAPE), noise(keys_of(1, 8), 3, SHAPE)):
        assert np.abs(np.corrcoef(other.ravel(), eight.ravel())[0, 1]) < 0.1
    # x_T does not change with the number of steps.
    schedule = schedules.make("cosine")
    short = schedules.respace(schedule, "ddim50")
    np.testing.assert_array_equal(
        samplers.start(schedule, keys_of(0, 2), SHAPE), samplers.start(short, keys_of(0, 2), SHAPE)
    )


def test_each_sampler_is_one_loop_that_is_compiled_once(rng):
    schedule = schedules.make("linear")
    short = schedules.respace(schedule, 30)
    counts = {"ddpm": [], "ddim": [], "ddim_invert": []}

    @jax.jit
    def run(x_t, keys, eta):
        predicts = {name: exact(schedule, traces=traces) for name, traces in counts.items()}
        x_0 = samplers.ddpm(predicts["ddpm"], short, FREE, x_t, keys)
        x_0 += samplers.ddim(predicts["ddim"], short, FREE, x_t, keys, eta=eta)
        return samplers.ddim_invert(predicts["ddim_invert"], short, FREE, x_0, corrections=2)

    for seed, eta in ((0, 0.2), (1, 0.9)):  # eta is traced here: no compilation for another one
        run(normal(rng, 2), keys_of(seed, 2), eta)
    assert {name: len(traces) for name, traces in counts.items()} == dict.fromkeys(counts, 1)


def round_trip(predict, short, p, x_0, corrections):
    @jax.jit
    def invert_and_sample():
        x_t = samplers.ddim_invert(predict, short, p, x_0, corrections=corrections)
        return x_t, samplers.ddim(predict, short, p, x_t)

    x_t, back = invert_and_sample()
    return x_t, np.abs(back - x_0).max()


def test_inversion_is_exact_if_eps_is_constant(rng):
    """The eps that inversion estimates is then the true one."""
    short = schedules.respace(schedules.make("linear"), 50)
    x_0, eps = (jnp.asarray(np.float32(rng.normal(size=(2, *SHAPE)))) for _ in range(2))
    x_t, error = round_trip(lambda x, t: eps, short, FREE, x_0, 0)
    assert error < 1e-3  # 1e-7 / sqrt(alpha_bar) = 2e-5 at the last row, 50 steps
    expected = gaussian.q_sample(short, x_0, jnp.asarray([49, 49]), eps)
    np.testing.assert_allclose(x_t, expected, atol=1e-4)


def test_ddim_after_inversion_returns_the_picture(schedule):
    """Pixels up to 3 STD = 0.9 from the mean: better with more steps, best with corrections."""
    sigmas = jnp.linspace(-3, 3, 2 * 64).reshape(2, 8, 8, 1)
    x_0, errors = MU + STD * sigmas, {}
    for steps, corrections in ((25, 0), (250, 0), (25, 2), (25, 5), (250, 2)):
        short = schedules.respace(schedule, steps)
        x_t, error = round_trip(exact(schedule), short, FREE, x_0, corrections)
        errors[steps, corrections] = error
    assert 0.1 < errors[25, 0] < 0.3
    assert errors[250, 0] < errors[25, 0] / 8  # of first order: ten times the steps
    assert errors[25, 2] < 0.015
    assert max(errors[25, 5], errors[250, 2]) < 1e-3
    # x_T is noise: as many standard deviations from 0 as the picture's pixels from their mean.
    np.testing.assert_allclose(x_t, sigmas, atol=0.08)


@pytest.mark.parametrize(
    ("name", "clip"), [("ddpm", "none"), ("ddpm", "dynamic"), ("ddim", "static"), ("ddim", "none")]
)
def test_inpainting_keeps_known_pixels_bit_for_bit(rng, name, clip):
    schedule = schedules.make("cosine")
    short = schedules.respace(schedule, 15)
    picture = jnp.asarray(np.float32(rng.integers(0, 256, (3, *SHAPE)) / 127.5 - 1))
    known = jnp.asarray(rng.random((3, *SHAPE[:2], 1)) < 0.5)
    p = Parameterisation(clip=clip)
    x_t, project = normal(rng, 3), samplers.keep_known(picture, known)
    fill = jax.jit(lambda x: sample(name, schedule, short, x, p=p, project=project))(x_t)
    everywhere = np.broadcast_to(known, picture.shape)
    np.testing.assert_array_equal(np.asarray(fill)[everywhere], np.asarray(picture)[everywhere])
    if name == "ddim":  # the other pixels do not change: here pixels are independent
        free = jax.jit(lambda x: sample(name, schedule, short, x, p=p))(x_t)
        np.testing.assert_allclose(fill[~everywhere], free[~everywhere], atol=1e-5)


def test_known_pixels_carry_the_noise_of_their_step(rng):
    """The network's input there is q(x_t | x_0): mean and spread at every step."""
    schedule = schedules.respace(schedules.make("linear"), 20)
    n, seen = 512, {}
    picture = jnp.full((n, 4, 4, 1), 0.8)
    project = samplers.keep_known(picture, jnp.ones(picture.shape, bool))

    def note(t, mean, std):
        seen[int(t)] = mean, std

    def predict(x, t):
        jax.debug.callback(note, t[0], x.mean(), x.std())
        return jnp.zeros_like(x)

    x_t = jnp.asarray(np.float32(rng.normal(size=picture.shape)))
    jax.jit(lambda x: sample("ddpm", None, schedule, x, predict=predict, project=project))(x_t)
    jax.effects_barrier()
    assert sorted(seen) == list(schedule.timesteps)
    for t, signal in zip(schedule.timesteps, schedule.signal, strict=True):
        mean, std = seen[t]
        np.testing.assert_allclose(mean, 0.8 * np.sqrt(signal), atol=0.045)  # 4 sigma
        np.testing.assert_allclose(std, np.sqrt(1 - signal), rtol=0.035)


def test_what_cannot_be_meant_is_refused(schedule):
    short = schedules.respace(schedule, 5)
    x, keys = jnp.zeros((2, 4)), keys_of(0, 2)
    for eta in (-0.1, 1.5):
        with pytest.raises(UsageError, match="eta"):
            samplers.ddim(exact(schedule), short, FREE, x, keys, eta=eta)
    with pytest.raises(ValueError, match="keys"):
        samplers.ddim(exact(schedule), short, FREE, x, eta=0.5)
    with pytest.raises(UsageError, match="corrections"):
        samplers.ddim_invert(exact(schedule), short, FREE, x, corrections=-1)
    with pytest.raises(ValueError, match="predict returned"):
        samplers.ddim(lambda x, t: x[:1], short, FREE, x)
    with pytest.raises(ValueError, match="bool"):
        samplers.keep_known(x, x)
