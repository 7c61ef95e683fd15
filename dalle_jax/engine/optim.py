"""Optimisers, learning-rate schedules and the weight average, from `config.optim`.

An update is: clip by global norm -> direction of the optimiser -> add decoupled weight decay ->
times -lr. The learning rate therefore scales the decay (as in the common AdamW implementations),
in the same manner for every optimiser.

  adamw      Adam's direction.
  muon       momentum orthogonalised by Newton-Schulz for weight matrices, each layer of a stacked
             [L, a, b] array on its own, times 0.2 sqrt(max(a, b)) so that an update has the size
             of Adam's and both share one learning rate; Adam for everything else: embeddings,
             output heads, codebooks, positions, convolutions, gains and biases.
  adafactor  factored second moments (memory ~ rows + columns), no first moment; update clipped
             to RMS 1. It ignores `beta1`, `beta2` and the moments' dtypes.

`mu_dtype` is the dtype of the first moment (Adam's, muon's momentum), `nu_dtype` of the second; the
arithmetic is float32 in any case. Adam is elementwise and works on the folded matrices; muon
and adafactor use rows and columns, so they receive unfolded matrices and their state is unfolded.

Schedules, after a linear warmup over `warmup_steps` from `lr / warmup_steps` to `lr`:

  constant         lr.
  cosine           half a cosine from lr at the end of the warmup to lr * end_lr_ratio at
                   `decay_steps` (0 = train.steps), constant afterwards.
  plateau_halving  lr halved at 5 fixed milestones, spread so that each stage is half as long as
                   the one before it: at 1/2, 3/4, 7/8, 15/16 and 31/32 of `decay_steps`. The
                   DALL-E paper halves the lr by hand whenever the training loss plateaus. Here
                   a run is a function of (config, step) and cannot use its own loss, so the
                   config fixes the milestones of a curve with the same shape.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle_jax import axes, layout
from dalle_jax.config import ConfigDict
from dalle_jax.engine import sharding
from dalle_jax.types import Array, Params, UsageError

Schedule = Callable[[Array], Array]

OPTIMISERS = ("adamw", "muon", "adafactor")
SCHEDULES = ("constant", "cosine", "plateau_halving")
HALVINGS = 5
DTYPES = ("float32", "bfloat16")
MAX_NARROW_BETA2 = 0.99  # bfloat16 keeps steps of 0.4 to 0.8 %

MUON_BETA = 0.95  # Jordan 2024; beta1 is Adam's
MUON_RMS = 0.2  # Liu et al. 2025 (arXiv:2502.16982): the RMS of Adam's updates

# Tables: one row is one token, code or position, so neither decay nor orthogonalisation of the
# matrix is meaningful.
_TABLES = (axes.VOCAB, axes.CODES, axes.POSITIONS)


def make(
    optim: ConfigDict,
    boxed_params: Params,
    decay_mask: Callable[[Params], Any] | None,
    steps: int,
    storage: Any = None,
) -> tuple[optax.GradientTransformation, Schedule]:
    """The gradient transformation and its learning rate as a function of the step.

    Args:
      optim: `config.optim`.
      boxed_params: abstract params with their logical names (`train_state.abstract`); unboxed
        leaves have no names.
      decay_mask: the task's own mask, params -> pytree of bool; None = `default_decay_mask`.
      steps: `train.steps`, the length of a schedule whose `decay_steps` is 0.
      storage: `sharding.storage` of the params; None = no matrix is folded.

    Raises:
      UsageError: for unknown names or impossible numbers.
    """
    lr = make_schedule(optim, steps)
    reduce_dtype(optim)
    checks = (
        ("name", optim.name in OPTIMISERS, f"one of {', '.join(OPTIMISERS)}"),
        ("beta1", 0 <= optim.beta1 < 1, "in [0, 1)"),
        ("beta2", 0 <= optim.beta2 < 1, "in [0, 1)"),
        ("eps", optim.eps > 0, "> 0"),
        ("weight_decay", optim.weight_decay >= 0, ">= 0"),
        ("clip_norm", optim.clip_norm >= 0, ">= 0 (0 = off)"),
        ("ema_decay", 0 <= optim.ema_decay < 1, "in [0, 1) (0 = off)"),
        ("accum_steps", optim.accum_steps >= 1, ">= 1"),
        ("mu_dtype", optim.mu_dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        ("nu_dtype", optim.nu_dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
    )
    for field, holds, expected in checks:
        if not holds:
            raise UsageError(f"optim.{field}={optim[field]!r}; expected {expected}.")

    if optim.nu_dtype != "float32" and optim.beta2 > MAX_NARROW_BETA2:
        raise UsageError(
            f"optim.nu_dtype={optim.nu_dtype} with beta2={optim.beta2}: a second moment that "
            "changes by less than 1 % per step is constant in 8 bits; use beta2 <= "
            f"{MAX_NARROW_BETA2} or nu_dtype=float32."
        )

    adam = _adam(optim)
    if optim.name == "adamw":
        direction = adam
    elif optim.name == "muon":
        direction = _on_unfolded(_muon(boxed_params, adam, optim.mu_dtype), storage)
    else:
        factored = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        direction = _on_unfolded(factored, storage)
    mask = decay_mask(sharding.unbox(boxed_params)) if decay_mask else None
    mask = default_decay_mask(boxed_params) if mask is None else mask
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(optim.weight_decay, mask)
    return optax.chain(clip, direction, decay, optax.scale_by_learning_rate(lr)), lr


def make_schedule(optim: ConfigDict, steps: int) -> Schedule:
    """Learning rate as a function of the number of finished updates.

    Raises:
      UsageError: for an unknown schedule or impossible numbers.
    """
    if optim.schedule not in SCHEDULES:
        raise UsageError(
            f"optim.schedule={optim.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}."
        )
    if optim.lr <= 0 or optim.warmup_steps < 0 or not 0 <= optim.end_lr_ratio <= 1:
        raise UsageError(
            f"optim.lr={optim.lr}, warmup_steps={optim.warmup_steps}, end_lr_ratio="
            f"{optim.end_lr_ratio}; expected lr > 0, warmup_steps >= 0, ratio in [0, 1]."
        )
    warmup, total = optim.warmup_steps, optim.decay_steps or steps
    if optim.schedule != "constant" and warmup >= total:
        raise UsageError(
            f"optim.warmup_steps={warmup} leaves nothing of the {total} steps of the schedule; "
            f"use fewer, e.g. {total // 10}."
        )
    peak = optim.lr
    if optim.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, total - warmup, alpha=optim.end_lr_ratio)
    else:
        milestones = [round(total * (1 - 0.5**i)) - warmup for i in range(1, HALVINGS + 1)]
        # A milestone inside the warmup halves from its end; equal ones (tiny runs) multiply.
        scales: dict[int, float] = {}
        for step in milestones:
            step = max(step, 0)
            scales[step] = scales.get(step, 1.0) * 0.5
        after = optax.piecewise_constant_schedule(peak, scales)
    if not warmup:
        return after
    # From lr / warmup and not from 0: the first update would do nothing.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def reduce_dtype(optim: ConfigDict) -> Any:
    """The dtype in which devices sum the gradients of layer matrices; None = the compute dtype.

    Raises:
      UsageError: for an unknown name.
    """
    known = {"compute": None, "float32": jnp.float32}
    if optim.grad_reduce_dtype not in known:
        raise UsageError(
            f"optim.grad_reduce_dtype={optim.grad_reduce_dtype!r}; expected one of "
            f"{', '.join(known)}."
        )
    return known[optim.grad_reduce_dtype]


def depends_on_steps(optim: ConfigDict) -> bool:
    """Whether the learning rate at a step depends on the length of the run."""
    return optim.schedule != "constant" and not optim.decay_steps


def default_decay_mask(boxed_params: Params) -> Any:
    """True for matrices and kernels: rank >= 2 beyond stacked layers, and no table of rows."""

    def decays(leaf: Array, names: sharding.Names) -> bool:
        dims = _own_names(leaf, names)
        return len(dims) >= 2 and dims[0] not in _TABLES

    return jax.tree.map(decays, sharding.unbox(boxed_params), sharding.names(boxed_params))


def ema_decay(limit: float, step: Array) -> Array:
    """Decay of the weight average at an update: min(limit, (1 + t) / (10 + t)).

    The warmup forgets the initial weights: their share of the average is 1e-9 after 100 updates
    and would be 0.9 with a constant 0.999.

    Args:
      limit: `optim.ema_decay`.
      step: number of updates before this one.
    """
    t = jnp.asarray(step, jnp.float32)
    return jnp.minimum(limit, (1 + t) / (10 + t))


def _own_names(leaf: Array, names: sharding.Names) -> tuple[str | None, ...]:
    """Axis names of one layer's array: without the stacked axes."""
    dims = names.axes if names.axes is not None else (None,) * leaf.ndim
    return tuple(name for name in dims if name != axes.LAYERS)


def _adam(optim: ConfigDict) -> optax.GradientTransformation:
    """Adam's direction with its moments stored in the config's dtypes."""
    adam = optax.scale_by_adam(
        b1=optim.beta1, b2=optim.beta2, eps=optim.eps, mu_dtype=optim.mu_dtype
    )
    if optim.nu_dtype == "float32":
        return adam

    def store(state):
        return state._replace(nu=optax.tree.cast(state.nu, optim.nu_dtype))

    def update(updates, state, params=None):
        state = state._replace(nu=optax.tree.cast(state.nu, jnp.float32))
        updates, state = adam.update(updates, state, params)
        return updates, store(state)

    return optax.GradientTransformation(lambda params: store(adam.init(params)), update)


def _on_unfolded(tx: optax.GradientTransformation, storage: Any) -> optax.GradientTransformation:
    """`tx` for stored matrices: `tx` itself receives them unfolded."""
    if storage is None:
        return tx

    def init(params):
        return tx.init(layout.plain(params, storage))

    def update(updates, state, params=None):
        params = None if params is None else layout.plain(params, storage)
        updates, state = tx.update(layout.plain(updates, storage), state, params)
        return layout.stored(updates, storage), state

    return optax.GradientTransformation(init, update)


def _muon(
    boxed_params: Params, adam: optax.GradientTransformation, mu_dtype: str
) -> optax.GradientTransformation:
    def dimensions(leaf, names):
        dims = _own_names(leaf, names)
        if len(dims) != 2 or any(name in _TABLES for name in dims):
            return None
        all_dims = names.axes or dims
        a, b = (i for i, name in enumerate(all_dims) if name != axes.LAYERS)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=a, output_axis=b)

    params = sharding.unbox(boxed_params)
    numbers = jax.tree.map(dimensions, params, sharding.names(boxed_params))
    labels = jax.tree.map(lambda _, n: "muon" if n else "adam", params, numbers)
    masked = jax.tree.map(lambda n: n or optax.MaskedNode(), numbers, is_leaf=_is_dimensions)

    def match_rms(updates, params=None):
        del params

        def scale(update, numbers):
            a, b = update.shape[numbers.reduction_axis], update.shape[numbers.output_axis]
            return update * (MUON_RMS * max(a, b) ** 0.5)

        return jax.tree.map(scale, updates, masked)

    matrices = optax.chain(
        optax.contrib.scale_by_muon(
            beta=MUON_BETA, mu_dtype=mu_dtype, weight_dimension_numbers=lambda _: masked
        ),
        optax.stateless(match_rms),
    )
    return optax.partition({"muon": matrices, "adam": adam}, labels)


def _is_dimensions(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.contrib.MuonDimensionNumbers)
