"""Attention against numpy in float64, and its implementations and gradients against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.nn import attention, masks

TEXT, HEADS, HEAD_DIM = 3, 2, 4


def reference(q, k, v, allowed):
    """Queries one by one, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        scores = k[b, :, h] @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max()) * allowed[t]
        out[b, t, h] = weights @ v[b, :, h] / weights.sum()
    return out


def random_qkv(rng, batch, length):
    shape = (3, batch, length, HEADS, HEAD_DIM)
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", masks.KINDS)
def test_dense_equals_numpy(rng, kind):
    mask = masks.Mask(kind, TEXT, 4)
    q, k, v = random_qkv(rng, 2, mask.length)
    expected = reference(q, k, v, mask.table())
    np.testing.assert_allclose(attention.attention(q, k, v, mask), expected, atol=2e-6)
    given = attention.attention(q, k, v, jnp.asarray(mask.table()))
    np.testing.assert_allclose(given, expected, atol=2e-6)


def test_no_mask_sees_every_key(rng):
    q, k, v = random_qkv(rng, 2, 5)
    expected = reference(q, k, v, np.ones((5, 5), bool))
    np.testing.assert_allclose(attention.attention(q, k, v, None), expected, atol=2e-6)


def test_softmax_is_float32_under_bfloat16(rng):
    q, k, v = jnp.asarray(random_qkv(rng, 1, 6), jnp.bfloat16)
    text = jax.make_jaxpr(lambda *x: attention.attention(*x, None))(q, k, v).pretty_print()
    exps = [line for line in text.splitlines() if " exp " in line]
    assert exps and all("f32[" in line for line in exps)
    assert attention.attention(q, k, v, None).dtype == jnp.bfloat16


def test_unknown_implementation_is_refused(rng):
    q, k, v = random_qkv(rng, 1, 2)
    with pytest.raises(ValueError, match="'flash' is unknown"):
        attention.attention(q, k, v, None, impl="flash")


def plain(q, k, v, mask):
    """The textbook's three lines, whose gradient is autodiff's."""
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask.table()[None, None], scores, -1e30), axis=-1)
    return jnp.einsum("BHTS,BSHK->BTHK", weights, v)


@pytest.mark.parametrize("impl", ["dense", "structured"])
# Codes across and down; conv reaches 7 rows: dense up to 7.
@pytest.mark.parametrize("grid", [(1, 1), (5, 5), (9, 9), (4, 6), (6, 4), (4, 9)])
@pytest.mark.parametrize("kind", masks.KINDS)
def test_values_and_gradients_are_those_of_the_textbook(rng, kind, grid, impl):
    mask = masks.Mask(kind, TEXT, grid[0], rows=grid[1])
    q, k, v = random_qkv(rng, 1, mask.length)
    weight = rng.standard_normal(q.shape).astype(np.float32)

    def run(attend):
        @jax.jit
        def values_and_gradients(*x):
            out, pull = jax.vjp(attend, *x)
            return out, *pull(jnp.asarray(weight))

        return values_and_gradients(q, k, v)

    ours = run(lambda *x: attention.attention(*x, mask, impl=impl))
    for got, expected in zip(ours, run(lambda *x: plain(*x, mask)), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_structured_has_no_square_of_the_stream(rng, kind):
    mask = masks.Mask(kind, TEXT, 12)
    q, k, v = random_qkv(rng, 1, mask.length)

    def largest(impl):
        def loss(*x):
            return attention.attention(*x, mask, impl=impl).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(q, k, v)
        outputs = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
        return max(outputs)

    assert largest("dense") == HEADS * mask.length**2
    keys = {"row": 24, "column": 12, "conv": 84}[kind]
    assert largest("structured") == HEADS * 144 * keys


def test_bfloat16_keeps_the_dtype_and_three_digits(rng):
    mask = masks.Mask("row", TEXT, 6)
    x = jnp.asarray(random_qkv(rng, 1, mask.length), jnp.bfloat16)
    for impl in ("dense", "structured"):

        @jax.jit
        def run(*x, impl=impl):
            out, pull = jax.vjp(lambda *x: attention.attention(*x, mask, impl=impl), *x)
            return out, *pull(out)

        out, *gradients = run(*x)
        assert {y.dtype for y in (out, *gradients)} == {jnp.dtype(jnp.bfloat16)}
        expected = plain(*x.astype(jnp.float32), mask)
        np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)
