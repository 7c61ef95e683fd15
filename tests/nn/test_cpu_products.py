"""nn.cpu_products: the products and gradients that jax finds, by other means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dalle_jax.engine import flops
from dalle_jax.nn import cpu_products, partition

MATMULS = [  # x, F; the last has few rows and a large matrix
    ((4, 6, 8), 32), ((4, 6, 32), 8), ((10, 8), 8), ((2, 3, 5, 4), 16), ((2, 8, 256), 512),
]  # fmt: skip
CONVS = [(3, 16, 8), (3, 8, 16), (1, 16, 16), (5, 16, 4), (3, 32, 64)]  # k, C, F


def normal(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def check(product, plain, x, w, g, tolerance=1e-5):
    """Values and both gradients of `product` are those of `plain`."""
    got, back = jax.vjp(jax.jit(product), x, w)
    want, plain_back = jax.vjp(plain, x, w)
    for a, b in zip((got, *back(g)), (want, *plain_back(g)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = np.abs(np.asarray(b, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance * scale
        )


def plain_conv(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


@pytest.mark.parametrize(("shape", "features"), MATMULS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul(shape, features, dtype):
    x, w, g = normal(shape, (shape[-1], features), (*shape[:-1], features), dtype=dtype)
    check(cpu_products.matmul, jnp.matmul, x, w, g, 1e-5 if dtype == "float32" else 2e-2)


def test_a_wider_result_is_asked_for():
    x, w = normal((4, 8), (8, 6), dtype="bfloat16")
    y = cpu_products.matmul(x, w, jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, np.float32(x) @ np.float32(w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "channels", "features"), CONVS)
@pytest.mark.parametrize("size", [(6, 6), (4, 7), (1, 3)])
def test_conv(k, channels, features, size):
    shapes = (3, *size, channels), (k, k, channels, features), (3, *size, features)
    check(cpu_products.conv, plain_conv, *normal(*shapes))


EINSUMS = [
    ("BNQHK,BSHK->BHNQS", "BHNQK,BHSK->BHNQS"),
    ("BHNQS,BNSHK->BNQHK", "BHNQS,BHNSK->BHNQK"),
    ("BHNQS,BNQHK->BSHK", "BHKNQ,BHNQS->BHKS"),  # the factors swapped
    ("BHQS,BHSK->BHQK", "BHQS,BHSK->BHQK"),  # nothing to lay out anew
]


@pytest.mark.parametrize(("subscripts", "on_cpu"), EINSUMS)
def test_einsum(subscripts, on_cpu):
    sides = dict(B=2, H=3, N=4, Q=5, S=6, K=7)
    terms = subscripts.replace("->", ",").split(",")
    x, y, g = normal(*([sides[letter] for letter in term] for term in terms))
    check(
        lambda x, y: cpu_products.einsum(subscripts, x, y, on_cpu=on_cpu),
        lambda x, y: jnp.einsum(subscripts, x, y), x, y, g,
    )  # fmt: skip
    wide = cpu_products.einsum(
        subscripts, x.astype("bfloat16"), y.astype("bfloat16"), jnp.float32, on_cpu=on_cpu
    )
    assert wide.dtype == jnp.float32


def test_split_over_devices_it_is_the_same():
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    x, w, g = normal((16, 5, 5, 16), (3, 3, 16, 8), (16, 5, 5, 8))
    check(cpu_products.conv, plain_conv, jax.device_put(x, split), w, jax.device_put(g, split))
    x, w, g = normal((16, 5, 16), (16, 8), (16, 5, 8))
    check(cpu_products.matmul, jnp.matmul, jax.device_put(x, split), w, jax.device_put(g, split))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_elsewhere_nothing_differs(platform, monkeypatch):
    x, w, kernel, image = normal((4, 16), (16, 8), (3, 3, 16, 8), (2, 4, 4, 16))
    y, z = normal((2, 5, 3, 7), (2, 6, 3, 7))
    subscripts, on_cpu = "BQHK,BSHK->BHQS", "BHQK,BHSK->BHQS"

    def text(matmul, conv, einsum):
        loss = jax.grad(lambda w, k: matmul(x, w).sum() + conv(image, k).sum(), argnums=(0, 1))
        step = jax.jit(lambda w, k: (loss(w, k), einsum(y, z)))
        return step.lower(w, kernel).as_text()

    def ours():
        einsum = functools.partial(cpu_products.einsum, subscripts, on_cpu=on_cpu)
        return text(cpu_products.matmul, cpu_products.conv, einsum)

    assert "optimization_barrier" in ours()
    monkeypatch.setattr(partition, "platform", lambda: platform)
    assert "optimization_barrier" not in ours()
    assert ours() == text(jnp.matmul, plain_conv, functools.partial(jnp.einsum, subscripts))


def test_the_work_is_counted_alike():
    x, w, image, kernel = normal((4, 6, 8), (8, 32), (2, 8, 8, 16), (3, 3, 16, 32))

    def work(matmul, conv):
        def loss(x, w, image, kernel):
            return (matmul(x, w) ** 2).sum() + (conv(image, kernel) ** 2).sum()

        return flops.hardware(jax.grad(loss, argnums=(0, 1, 2, 3)), x, w, image, kernel)

    assert work(cpu_products.matmul, cpu_products.conv) == work(jnp.matmul, plain_conv)
