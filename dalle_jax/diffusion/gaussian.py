"""The Gaussians of diffusion: noising, the meaning of a network's output, posterior and losses.

  x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps
  v   = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0

All arithmetic is float32 whatever the network's dtype: bfloat16 rounds alpha_bar to 1 on the first
steps of a schedule, which would then add no noise. Examples are [B, ...] of any rank, channels
last: pictures [B, h, w, C] in [-1, 1] or embeddings [B, E]. `t` is [B] int32 rows of the
schedule's tables, or one scalar row for all examples; the network's input is
`schedule.timesteps[t]`, which differs from t for a respaced schedule. The caller samples noise.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import special

from dalle_jax.diffusion import schedules
from dalle_jax.diffusion.schedules import Schedule
from dalle_jax.types import Array, UsageError

Predicts = Literal["eps", "x_0", "v"]
Variance = Literal["posterior", "beta", "learned_range"]
Clip = Literal["none", "static", "dynamic"]

# The variational term is a mean over steps; its sum over the steps counts a thousandth.
VB_WEIGHT = 1e-3

# Half the distance between two of 256 levels in [-1, 1], and the least probability of a level.
HALF_LEVEL = 1 / 255
LEAST_MASS = 1e-12


@dataclasses.dataclass(frozen=True)
class Parameterisation:
    """The meaning of a network's output.

    Attributes:
      predicts: eps (GLIDE, unCLIP's pictures), x_0 (unCLIP's prior) or v.
      variance: of p(x_{t-1} | x_t). posterior is the smaller and beta the larger fixed choice;
        with learned_range the output has twice the channels, and the second half interpolates
        between the logarithms of the two, from -1 (posterior) to 1 (beta).
      clip: of an estimate of x_0 to [-bound, bound]: none; static clips each entry; dynamic also
        scales the example, so that strong guidance does not saturate it.
      bound: 1 for pictures.
      percentile: for dynamic: the share of an example's entries that is scaled into the bound; the
        rest is clipped.

    Source: learned range Nichol & Dhariwal 2021 (arXiv:2102.09672) eq. 15; v Salimans & Ho 2022
    (arXiv:2202.00512) §4; dynamic thresholding Saharia et al. 2022 (arXiv:2205.11487) §2.3.
    """

    predicts: Predicts = "eps"
    variance: Variance = "posterior"
    clip: Clip = "static"
    bound: float = 1.0
    percentile: float = 0.995

    def __post_init__(self):
        for name, kinds in (("predicts", Predicts), ("variance", Variance), ("clip", Clip)):
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise UsageError(f"{name}={value!r} is unknown; use one of {get_args(kinds)}.")
        if not self.bound > 0:
            raise UsageError(f"bound={self.bound}; expected more than 0, for pictures 1.")
        if not 0 < self.percentile <= 1:
            raise UsageError(f"percentile={self.percentile}; expected a share in (0, 1].")


def q_sample(schedule: Schedule, x_0: Array, t: Array, eps: Array) -> Array:
    """x_0 diffused to row t, float32: sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps.

    Args:
      schedule: n steps.
      x_0: [B, ...] clean examples.
      t: [B] int32 in [0, n). Row 0 is the least noisy, not the clean example.
      eps: [B, ...] standard normal noise.

    Raises:
      ValueError: if t is not one row per example.

    Source: Ho et al. 2020 (arXiv:2006.11239) eq. 4.
    """
    if t.shape != x_0.shape[:1]:
        raise ValueError(f"t has shape {t.shape}; expected one per example, {x_0.shape[:1]}.")
    signal, noise = _scales(schedule, t, x_0)
    return signal * x_0 + noise * eps


def x_0_from_eps(schedule: Schedule, x_t: Array, t: Array, eps: Array) -> Array:
    """The x_0 that gives x_t with noise eps. An error in eps grows up to 2e4 times (cosine)."""
    signal, noise = _scales(schedule, t, x_t)
    return (x_t - noise * eps) / signal


def eps_from_x_0(schedule: Schedule, x_t: Array, t: Array, x_0: Array) -> Array:
    """The noise that took x_0 to x_t."""
    signal, noise = _scales(schedule, t, x_t)
    return (x_t - signal * x_0) / noise


def v_from(schedule: Schedule, x_0: Array, t: Array, eps: Array) -> Array:
    """The velocity sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""
    signal, noise = _scales(schedule, t, x_0)
    return signal * eps - noise * x_0


def x_0_from_v(schedule: Schedule, x_t: Array, t: Array, v: Array) -> Array:
    """The x_0 of a velocity."""
    signal, noise = _scales(schedule, t, x_t)
    return signal * x_t - noise * v


def eps_from_v(schedule: Schedule, x_t: Array, t: Array, v: Array) -> Array:
    """The noise of a velocity."""
    signal, noise = _scales(schedule, t, x_t)
    return noise * x_t + signal * v


def target(predicts: Predicts, schedule: Schedule, x_0: Array, t: Array, eps: Array) -> Array:
    """The correct output of the network for q_sample(schedule, x_0, t, eps): [B, ...]."""
    if predicts == "eps":
        return eps
    return x_0 if predicts == "x_0" else v_from(schedule, x_0, t, eps)


def predicted_x_0(
    predicts: Predicts, schedule: Schedule, x_t: Array, t: Array, output: Array
) -> Array:
    """The x_0 that an output (without variance channels) predicts, not clipped: [B, ...]."""
    if predicts == "eps":
        return x_0_from_eps(schedule, x_t, t, output)
    return output if predicts == "x_0" else x_0_from_v(schedule, x_t, t, output)


def clip(p: Parameterisation, x_0: Array) -> Array:
    """An estimate of x_0, clipped to [-p.bound, p.bound] by method p.clip: [B, ...]."""
    if p.clip == "none":
        return x_0
    if p.clip == "static":
        return jnp.clip(x_0, -p.bound, p.bound)
    size = jnp.quantile(jnp.abs(x_0).reshape(x_0.shape[0], -1), p.percentile, axis=1)
    size = jnp.maximum(size, p.bound).reshape(-1, *[1] * (x_0.ndim - 1))
    return jnp.clip(x_0, -size, size) * (p.bound / size)


def split(p: Parameterisation, output: Array) -> tuple[Array, Array | None]:
    """Prediction and variance channels of an output, float32; None without such channels.

    Args:
      p: the output's meaning.
      output: [B, ..., C], or [B, ..., 2 C] with a learned range.
    """
    output = output.astype(jnp.float32)
    if p.variance != "learned_range":
        return output, None
    if output.shape[-1] % 2:
        raise ValueError(
            f"the output has {output.shape[-1]} channels; a learned range needs two for each "
            "channel of the picture."
        )
    prediction, v = jnp.split(output, 2, axis=-1)
    return prediction, v


def log_variance(
    p: Parameterisation, schedule: Schedule, t: Array, raw: Array | None, like: Array
) -> Array:
    """log of the variance of p(x_{t-1} | x_t) in an array that broadcasts against `like`.

    Args:
      p: `p.variance` is used.
      schedule: has the steps that are taken, so a respaced one when sampling.
      t: rows.
      raw: [B, ...] variance channels for a learned range, where -1 is posterior and 1 beta (the
        network may leave that range); None otherwise.
      like: [B, ...].
    """
    small = schedules.at(schedule.posterior_log_variance, t, like)
    if p.variance == "posterior":
        return small
    if p.variance == "beta":
        return schedules.at(schedule.beta_log_variance, t, like)
    share = (raw + 1) / 2
    return share * schedules.at(np.log(schedule.beta), t, like) + (1 - share) * small


def posterior_mean(schedule: Schedule, x_0: Array, x_t: Array, t: Array) -> Array:
    """Mean of q(x_{t-1} | x_t, x_0): [B, ...]; in row 0 it is x_0, bit for bit.

    Its variance is schedule.posterior_variance.

    Source: Ho et al. 2020 (arXiv:2006.11239) eq. 7.
    """
    clean = schedules.at(schedule.posterior_x_0, t, x_t)
    return clean * x_0 + schedules.at(schedule.posterior_x_t, t, x_t) * x_t


def losses(
    p: Parameterisation, schedule: Schedule, output: Array, x_0: Array, t: Array, eps: Array
) -> dict[str, Array]:
    """The training objective of each example.

    Args:
      p: the output's meaning. `clip` is not used, because a clipped estimate has no gradient.
      schedule: of training, not respaced.
      output: the network's, for q_sample(schedule, x_0, t, eps) at t.
      x_0: [B, ...] clean examples; with a learned range pictures of 256 levels in [-1, 1].
      t: [B] int32 rows, sampled uniformly.
      eps: [B, ...] the noise.

    Returns:
      [B] float32 each. mse: mean square of output - target over the example. With a learned range
      also vb: the variational term of row t in bits per dimension, whose gradient reaches only the
      variance channels. loss: mse, or mse + vb * num_steps / 1,000.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672) eq. 16: L_simple + 0.001 L_vlb, and L_vlb is
    num_steps times the mean over t of the term; openai/guided-diffusion (`RESCALED_MSE`).
    """
    prediction, raw = split(p, output)
    truth = target(p.predicts, schedule, x_0, t, eps)
    if prediction.shape != truth.shape:
        raise ValueError(f"the output predicts {prediction.shape}; expected {truth.shape}.")
    mse = _mean(jnp.square(prediction - truth))
    if raw is None:
        return {"loss": mse, "mse": mse}
    x_t = q_sample(schedule, x_0, t, eps)
    # Otherwise the noisy variational gradient would also train eps, and worsen it (§3.1).
    fixed = jax.lax.stop_gradient(prediction)
    mean = posterior_mean(schedule, predicted_x_0(p.predicts, schedule, x_t, t, fixed), x_t, t)
    vb = vb_term(schedule, x_0, x_t, t, mean, log_variance(p, schedule, t, raw, x_t))
    return {"loss": mse + vb * (schedule.num_steps * VB_WEIGHT), "mse": mse, "vb": vb}


def capped_weight(predicts: Predicts, schedule: Schedule, t: Array, cap: float) -> Array:
    """Weights [B] that turn `losses`' mse into the squared error of v, or `cap` times that of x_0.

    The smaller of the two is used: the squared error of v is SNR + 1 times that of x_0, a factor
    that grows to 25,000 on the least noisy steps and would drown the others.

    Args:
      predicts: the network's prediction, whose error the mse is.
      schedule: of training.
      t: [B] int32 rows.
      cap: at least 1; at 1 an x_0 network's mse has weight 1.

    Source: Salimans & Ho 2022 (arXiv:2202.00512) §4, "SNR + 1"; the cap from Hang et al. 2023
    (arXiv:2303.09556). Deliberate difference: they cap SNR itself, which gives no weight to the
    noisiest steps, where colours and places are decided.
    """
    if not cap >= 1:
        raise UsageError(f"a cap of {cap}; expected 1 or more.")
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    own = {"eps": snr, "x_0": np.ones_like(snr), "v": snr + 1}[predicts]  # in units of x_0's
    return jnp.asarray(np.minimum(snr + 1, cap) / own, jnp.float32)[t]


def vb_term(
    schedule: Schedule, x_0: Array, x_t: Array, t: Array, mean: Array, log_var: Array
) -> Array:
    """Row t's term of the variational bound in bits per dimension: [B] float32.

    Rows above 0: KL(q(x_{t-1} | x_t, x_0) || N(mean, exp(log_var))). Row 0: minus the logarithm
    of the probability of x_0's levels.

    Args:
      schedule: n steps.
      x_0: [B, ...] clean examples.
      x_t: [B, ...] the same at row t.
      t: [B] int32.
      mean: [B, ...] of p(x_{t-1} | x_t).
      log_var: broadcasts against it.

    Source: Ho et al. 2020 (arXiv:2006.11239) eqs. 5 and 13; openai/guided-diffusion
    (`_vb_terms_bpd`).
    """
    true_mean = posterior_mean(schedule, x_0, x_t, t)
    true_log_var = schedules.at(schedule.posterior_log_variance, t, x_t)
    log_var = jnp.broadcast_to(log_var, mean.shape)
    kl = _mean(normal_kl(true_mean, true_log_var, mean, log_var))
    nll = -_mean(level_log_likelihood(x_0, mean, 0.5 * log_var))
    return jnp.where(t == 0, nll, kl) / np.log(2)


def normal_kl(mean_q: Array, log_var_q: Array, mean_p: Array, log_var_p: Array) -> Array:
    """KL(N(mean_q, exp(log_var_q)) || N(mean_p, exp(log_var_p))), elementwise in nats."""
    ratio = jnp.exp(log_var_q - log_var_p)
    distance = jnp.square(mean_q - mean_p) * jnp.exp(-log_var_p)
    return 0.5 * (ratio - 1 + log_var_p - log_var_q + distance)


def level_log_likelihood(x: Array, mean: Array, log_std: Array) -> Array:
    """log of the probability that a Gaussian gives the level of x, elementwise in nats.

    A level is an interval of width 2 / 255 around x; the darkest and the brightest extend to
    infinity, so that the 256 probabilities sum to 1.

    Args:
      x: 256 levels in [-1, 1].
      mean: of the Gaussian, the shape of x.
      log_std: log of its standard deviation, the shape of x.

    Source: Ho et al. 2020 (arXiv:2006.11239) eq. 13. openai/guided-diffusion approximates the
    normal distribution function by a tanh (error 2e-4); this is the function itself.
    """
    precision = jnp.exp(-log_std)
    darkest, brightest = x < -0.999, x > 0.999
    # Mirrored to the side below the mean, because float32 rounds 1 - 1e-9 to 1 but represents 1e-9.
    # The two ends are mirrored so that the infinite edge is the lower one.
    offset = jnp.where(darkest, x - mean, jnp.where(brightest, mean - x, -jnp.abs(x - mean)))
    below = _normal_cdf(precision * (offset - HALF_LEVEL))
    below = jnp.where(darkest | brightest, 0, below)
    mass = _normal_cdf(precision * (offset + HALF_LEVEL)) - below
    return jnp.log(jnp.maximum(mass, LEAST_MASS))


def _normal_cdf(z: Array) -> Array:
    """The standard normal distribution function, exact in its lower tail too."""
    return 0.5 * special.erfc(-math.sqrt(0.5) * z)


def _scales(schedule: Schedule, t: Array, like: Array) -> tuple[Array, Array]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar), computed in float64."""
    signal = schedules.at(np.sqrt(schedule.alpha_bar), t, like)
    return signal, schedules.at(np.sqrt(1 - schedule.alpha_bar), t, like)


def _mean(x: Array) -> Array:
    """[B, ...] -> [B]: the mean over each example."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
