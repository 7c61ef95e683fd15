"""PCA against numpy's SVD, quantisation and back, the file, refusals."""

import dataclasses

import numpy as np
import pytest

from dalle_jax.stages import pca
from dalle_jax.types import UsageError


def embeddings(n=2000, e=8, seed=0):
    """Unit vectors around a mean, with variances that fall; and as many beside them."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, e)) * 0.7 ** np.arange(e) @ np.linalg.qr(rng.normal(size=(e, e)))[0]
    z = z + rng.normal(size=e)
    other = z + 0.5 * rng.normal(size=z.shape)
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, other))


@pytest.fixture(scope="module")
def pair():
    return embeddings()


@pytest.fixture(scope="module")
def fitted(pair):
    return pca.fit(*pair, num_buckets=64, fingerprint="0123")


def test_components_are_those_of_the_svd(pair, fitted):
    z, _ = pair
    _, singular, rows = np.linalg.svd(z - z.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(fitted.variances, singular**2 / len(z), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(fitted.components * rows, axis=1)), 1, atol=1e-5)
    np.testing.assert_allclose(fitted.components @ fitted.components.T, np.eye(8), atol=1e-6)
    share = np.cumsum(singular**2) / np.sum(singular**2)
    assert fitted.num_dims == np.searchsorted(share, 0.99) + 1
    np.testing.assert_allclose(fitted.explained(3), share[2], rtol=1e-6)
    assert pca.fit(*pair, num_buckets=4, num_dims=3).num_dims == 3


def test_buckets_hold_equally_many_and_stand_for_their_mean(pair, fitted):
    z, z_t = pair
    tables = fitted.tables(8)
    buckets = np.asarray(pca.quantise(tables, z.astype(np.float32)))
    assert buckets.shape == (2000, 8) and buckets.min() == 0 and buckets.max() == 63
    for k in range(8):
        counts = np.bincount(buckets[:, k], minlength=64)
        assert counts.min() >= 29 and counts.max() <= 34  # 31.25, rounding to float32 apart
    along = (z - z.mean(axis=0)) @ fitted.components[2]
    np.testing.assert_allclose(fitted.levels[2, 10], along[buckets[:, 2] == 10].mean(), atol=2e-3)
    dots = np.asarray(pca.quantise_dot(tables, z.astype(np.float32), z_t.astype(np.float32)))
    product = np.sum(z * z_t, axis=1)
    assert product[dots >= 32].min() >= product[dots < 32].max() - 1e-6  # upper half = upper half


def test_quantised_and_back(pair, fitted):
    """The same buckets again, bit for bit; embeddings come back nearly, the more of them kept."""
    z = pair[0].astype(np.float32)
    tables = fitted.tables(8)
    buckets = pca.quantise(tables, z)
    again = pca.dequantise(tables, buckets)
    np.testing.assert_allclose(np.linalg.norm(again, axis=1), 1, atol=1e-5)
    assert np.sum(z * again, axis=1).mean() > 0.999
    # A level lies in its own bucket.
    inside = np.asarray(pca._bucket(tables["edges"][3], tables["levels"][3]))
    np.testing.assert_array_equal(inside, np.arange(64))
    few = pca.dequantise(fitted.tables(2), buckets[:, :2])
    assert 0.8 < np.sum(z * few, axis=1).mean() < np.sum(z * again, axis=1).mean()


def test_truncation_keeps_all_or_some(pair, fitted):
    z = pair[0][:50].astype(np.float32)
    np.testing.assert_allclose(pca.truncate(fitted, z, 8), z, atol=1e-5)
    cosine = [np.sum(pca.truncate(fitted, z, k) * z, axis=1).mean() for k in (1, 3, 6)]
    assert cosine == sorted(cosine)
    with pytest.raises(UsageError, match="9 dimensions"):
        pca.truncate(fitted, z, 9)


def test_the_file_comes_back_and_has_the_same_bytes(fitted, tmp_path):
    data = pca.to_bytes(fitted)
    assert data == pca.to_bytes(fitted)
    path = tmp_path / "pca.npz"
    path.write_bytes(data)
    again = pca.load(str(path))
    for field in dataclasses.fields(fitted):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(fitted, field.name))
    assert (again.clip, again.num_buckets, again.joint_width) == ("0123", 64, 8)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist; make it with"):
        pca.load(str(tmp_path / "absent.npz"))
    with pytest.raises(UsageError, match="bad.npz is not a file of"):
        pca.from_bytes(b"PK\x03\x04 nothing", "bad.npz")
    path = tmp_path / "other.npz"
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(UsageError, match="other.npz is not a file of"):
        pca.load(str(path))
    np.savez(path, mean=np.array([{}], dtype=object))
    with pytest.raises(UsageError, match="other.npz is not a file of"):
        pca.load(str(path))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_buckets": 3000}, "3000 buckets from 2000"),
        ({"num_dims": 9, "num_buckets": 4}, "9 dimensions of embeddings of 8"),
        ({"variance": 0, "num_buckets": 4}, "variance=0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(pair, options, says):
    with pytest.raises(UsageError, match=says):
        pca.fit(*pair, **options)


def test_embeddings_that_are_all_the_same_are_refused():
    same = np.ones((10, 4)) / 2
    with pytest.raises(UsageError, match="are the same"):
        pca.fit(same, same, num_buckets=2)
