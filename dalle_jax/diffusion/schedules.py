"""Noise schedules: the share of signal after each diffusion step, and respacing to fewer steps.

A `Schedule` is plain numbers, equal and hashable by value, so it can be a static argument of jit:
its tables become constants of the program. They are float64 numpy on the host (1 - alpha_bar of
the first cosine step is 4e-5, which float32 would round to three significant figures) and become
float32 only in `at`, when an expression uses a row.

A *row* counts the steps of a schedule, 0 the least noisy; a *step* is the number that the network
gets. They are equal until `respace` selects some of the steps.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from dalle_jax.types import Array, UsageError

# squaredcos_cap_v2 is what diffusers calls cosine.
NAMES = ("linear", "cosine", "squaredcos_cap_v2")

# Cosine ends at alpha_bar = 0, a step that no network can undo; the last beta is capped here.
MAX_BETA = 0.999

# The beta range of `linear` is stated for this many steps; others scale it.
LINEAR_STEPS = 1000

Spacing = str | int | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A diffusion process of n steps, and its tables: float64 [n], by row.

    Attributes:
      signal: n numbers: alpha_bar, the share of the picture in the variance of x_t; strictly
        falling within (0, 1).
      timesteps: n ints, strictly rising: the step of each row in the process that the network was
        trained on, which is the network's input.
      num_train_steps: steps of that process.
    """

    signal: tuple[float, ...]
    timesteps: tuple[int, ...]
    num_train_steps: int

    def __post_init__(self):
        edges = (1.0, *self.signal, 0.0)
        if not self.signal or any(a <= b for a, b in zip(edges, edges[1:], strict=False)):
            raise ValueError("alpha_bar must fall strictly, from below 1 to above 0.")
        steps = (-1, *self.timesteps, self.num_train_steps)
        if any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"timesteps must rise strictly within [0, {self.num_train_steps}).")
        if len(self.signal) != len(self.timesteps):
            raise ValueError(f"{len(self.signal)} alpha_bar for {len(self.timesteps)} timesteps.")

    @property
    def num_steps(self) -> int:
        """The number of rows."""
        return len(self.signal)

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """Share of signal in the variance of x_t."""
        return np.asarray(self.signal, np.float64)

    @functools.cached_property
    def alpha_bar_prev(self) -> np.ndarray:
        """alpha_bar of the next less noisy row; 1, the clean picture, before row 0."""
        return np.append(1.0, self.alpha_bar[:-1])

    @functools.cached_property
    def beta(self) -> np.ndarray:
        """Variance that a step adds: x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) eps."""
        return 1 - self.alpha_bar / self.alpha_bar_prev

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0); 0 in row 0."""
        return self.beta * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Its logarithm; row 0 has the value of row 1, because its variance is 0.

        Source: openai/guided-diffusion (`posterior_log_variance_clipped`).
        """
        return np.log(np.append(self._first_variance, self.posterior_variance[1:]))

    @functools.cached_property
    def beta_log_variance(self) -> np.ndarray:
        """log(beta), the larger fixed choice; row 0 as in `posterior_log_variance`.

        Source: openai/guided-diffusion (`FIXED_LARGE`).
        """
        return np.log(np.append(self._first_variance, self.beta[1:]))

    @property
    def _first_variance(self) -> float:
        """posterior_variance[1]; a schedule of one step has its beta."""
        return self.posterior_variance[1] if self.num_steps > 1 else self.beta[0]

    @functools.cached_property
    def posterior_x_0(self) -> np.ndarray:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0); exactly 1 in row 0."""
        return self.beta * np.sqrt(self.alpha_bar_prev) / (1 - self.alpha_bar)

    @functools.cached_property
    def posterior_x_t(self) -> np.ndarray:
        """Weight of x_t in that mean; exactly 0 in row 0."""
        remaining = np.sqrt(self.alpha_bar / self.alpha_bar_prev)
        return remaining * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)


def at(table: np.ndarray, t: Array, like: Array) -> Array:
    """Rows t of a table, float32, in a shape that broadcasts against `like`.

    Args:
      table: [n] float64.
      t: [B] int rows, one per example of `like`, or one scalar row for all.
      like: [B, ...].

    Returns:
      [B, 1, ...] with the rank of `like`, or a scalar.
    """
    rows = jnp.asarray(table, jnp.float32)[t]
    return rows.reshape(rows.shape + (1,) * (like.ndim - 1)) if rows.ndim else rows


def make(name: str, num_steps: int = 1000) -> Schedule:
    """The schedule of that name with all of its steps.

    Args:
      name: one of NAMES. linear: beta from 1e-4 to 0.02 at 1,000 steps, scaled by 1000 / num_steps
        otherwise, for GLIDE's and unCLIP's larger upsamplers. cosine = squaredcos_cap_v2 for
        everything else.
      num_steps: more than 20 for linear, whose last beta would reach 1.

    Raises:
      UsageError: for an unknown name or too few steps.

    Source: linear Ho et al. 2020 (arXiv:2006.11239) §4; cosine Nichol & Dhariwal 2021
    (arXiv:2102.09672) eq. 17; both as in openai/guided-diffusion (`get_named_beta_schedule`).
    """
    if name not in NAMES:
        raise UsageError(f"schedule {name!r} is unknown; use one of {NAMES}.")
    least = 21 if name == "linear" else 1
    if num_steps < least:
        raise UsageError(f"{num_steps} steps; a {name} schedule needs {least} or more.")
    if name == "linear":
        scale = LINEAR_STEPS / num_steps
        beta = np.linspace(1e-4 * scale, 0.02 * scale, num_steps, dtype=np.float64)
    else:
        # 0.008, so that the first steps add some noise.
        angle = (np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * math.pi / 2
        signal = np.cos(angle) ** 2
        beta = np.minimum(1 - signal[1:] / signal[:-1], MAX_BETA)
    signal = np.cumprod(1 - beta)
    return Schedule(tuple(signal.tolist()), tuple(range(num_steps)), num_steps)


def respace(schedule: Schedule, spacing: Spacing) -> Schedule:
    """The same process in fewer steps: the rows that `spacing` selects, with their alpha_bar.

    x_t of a selected row has the same distribution, so the network needs no new training; only the
    steps between rows are longer. `timesteps` are still the network's inputs.

    Args:
      schedule: any; a respaced schedule can be respaced again.
      spacing: see `spaced_rows`; or "logsnr20": that many rows, evenly in the logarithm of the
        signal-to-noise ratio, with the first and the last, for DPM-Solver++.

    Raises:
      UsageError: if the spacing does not fit the schedule.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672) §4; openai/glide-text2im (`respace.py`).
    """
    if isinstance(spacing, str) and spacing.startswith("logsnr"):
        rows = _even_in_logsnr(schedule, _counts(spacing[len("logsnr") :], spacing)[0])
    else:
        rows = spaced_rows(schedule.num_steps, spacing)
    return Schedule(
        tuple(schedule.signal[row] for row in rows),
        tuple(schedule.timesteps[row] for row in rows),
        schedule.num_train_steps,
    )


def spaced_rows(num_steps: int, spacing: Spacing) -> tuple[int, ...]:
    """The rows that a spacing selects from num_steps, rising.

    Args:
      num_steps: rows to choose from.
      spacing: 250 or "250": that many rows, evenly, with the first and the last. [10, 10, 3] or
        "10,10,3": that many in each of equally long sections, the least noisy section first.
        "ddim50": every k-th from 0, with the smallest integer k that gives 50. "fast27": the
        sections 10,10,3,2,2 with the last row moved two rows down, as for GLIDE's upsampler.

    Raises:
      UsageError: for any other spacing, or one with more rows than num_steps.

    Source: openai/glide-text2im (`respace.py`).
    """
    if spacing == "fast27":
        # The source attributes DDIM's artefacts to the noisiest step.
        return (*_sections(num_steps, (10, 10, 3, 2, 2), spacing)[:-1], num_steps - 3)
    if isinstance(spacing, str) and spacing.startswith("ddim"):
        return _strided(num_steps, _counts(spacing[len("ddim") :], spacing)[0])
    return _sections(num_steps, _counts(spacing, spacing), spacing)


def _counts(counts: Spacing, spacing: Spacing) -> tuple[int, ...]:
    """Positive ints from "10,10", 10 or [10, 10]."""
    parts = counts.split(",") if isinstance(counts, str) else counts
    parts = [parts] if isinstance(parts, int) else parts
    try:
        numbers = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UsageError(
            f"spacing {spacing!r} is unknown; use a number of steps (250), numbers by section "
            "(10,10,3,2,2), ddimN (ddim50), logsnrN (logsnr20) or fast27."
        )
    return numbers


def _even_in_logsnr(schedule: Schedule, count: int) -> list[int]:
    """`count` rows, evenly in log SNR down to -12; from there to the last row is one step.

    Cosine's last rows fall from -12 to -20, where x_t is practically pure noise.
    """
    num = schedule.num_steps
    if not 2 <= count <= num:
        raise UsageError(f"spacing 'logsnr{count}' of {num} steps; expected 2 to all of them.")
    log_snr = np.log(schedule.alpha_bar / (1 - schedule.alpha_bar))
    end = max(log_snr[-1], -12.0)
    levels = np.linspace(log_snr[0], end, count if end == log_snr[-1] else count - 1)
    rows = [int(np.argmin(np.abs(log_snr - level))) for level in levels]
    rows = rows[: count - 1] + [num - 1]
    for i in range(1, count):
        rows[i] = max(rows[i], rows[i - 1] + 1)
    rows[-1] = num - 1
    for i in reversed(range(count - 1)):
        rows[i] = min(rows[i], rows[i + 1] - 1)
    return rows


def _sections(num_steps: int, counts: Sequence[int], spacing: Spacing) -> tuple[int, ...]:
    size, extra = divmod(num_steps, len(counts))
    rows, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise UsageError(
                f"spacing {spacing!r} asks for {count} of the {length} steps in section "
                f"{section + 1} of {len(counts)}; ask for fewer."
            )
        # A running sum as in the source, not i * stride: if the product is exactly .5 the sum may
        # round the other way, and released samplers were tuned with its rows (27 of 1,000: 499,
        # not 500).
        stride, place = (length - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            rows.append(start + round(place))
            place += stride
        start += length
    return tuple(rows)


def _strided(num_steps: int, count: int) -> tuple[int, ...]:
    possible = {-(-num_steps // stride): stride for stride in range(num_steps - 1, 0, -1)}
    if count not in possible:
        near = sorted(possible, key=lambda other: abs(other - count))[:2]
        raise UsageError(
            f"no integer stride through {num_steps} steps gives exactly {count}; the nearest are "
            f"{' and '.join(f'ddim{n}' for n in sorted(near)) or 'none'}."
        )
    return tuple(range(0, num_steps, possible[count]))
