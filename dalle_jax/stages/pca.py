"""Principal components of CLIP image embeddings, and their quantisation: the AR prior's alphabet.

A file made once for a CLIP and a training set (`python -m dalle_jax pca`): mean, components in
order of falling variance, and for each component the edges of V buckets. Buckets hold equally many
training embeddings, so every token is equally frequent, whatever its dimension's variance, and the
upper half of the dot product's distribution is the upper half of its buckets. A bucket stands for
the mean of the training values in it.

The fit is float64 numpy on the host; `quantise` and its like are jax, for the training step. All
components are stored, also those that are not kept: who truncates chooses how many.

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.2: 319 of 1024 components with less than 1 % mean
squared error, 1,024 buckets each. Where the edges lie is not stated.
"""

import dataclasses
import io
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models import clip
from dalle_jax.types import Array, UsageError

_ARRAYS = ("mean", "components", "variances", "edges", "levels", "dot_edges", "dot_levels")


@dataclasses.dataclass(frozen=True, eq=False)
class Pca:
    """What was fitted.

    Attributes:
      mean: [E] float32.
      components: [E, E] float32, orthonormal rows, by falling variance.
      variances: [E] float32, of the training embeddings along them.
      edges: [E, V - 1] float32, between the buckets of each component, rising.
      levels: [E, V] float32, what each bucket stands for.
      dot_edges: [V - 1] float32, the same for z_i . z_t.
      dot_levels: [V] float32.
      num_dims: K, components that were asked to be kept.
      num_examples: embeddings that it was fitted on.
      clip: fingerprint of the CLIP that made them.
    """

    mean: np.ndarray
    components: np.ndarray
    variances: np.ndarray
    edges: np.ndarray
    levels: np.ndarray
    dot_edges: np.ndarray
    dot_levels: np.ndarray
    num_dims: int
    num_examples: int
    clip: str

    @property
    def joint_width(self) -> int:
        """E."""
        return len(self.mean)

    @property
    def num_buckets(self) -> int:
        """V."""
        return self.levels.shape[1]

    def explained(self, num_dims: int) -> float:
        """The share of the variance that the leading num_dims components hold."""
        return float(self.variances[:num_dims].sum() / self.variances.sum())

    def tables(self, num_dims: int = 0) -> dict[str, np.ndarray]:
        """What the functions below read, for the leading num_dims components (0 = `num_dims`)."""
        k = num_dims or self.num_dims
        return {
            "mean": self.mean,
            "components": self.components[:k],
            "edges": self.edges[:k],
            "levels": self.levels[:k],
            "dot_edges": self.dot_edges,
            "dot_levels": self.dot_levels,
        }


def fit(
    image: np.ndarray,
    text: np.ndarray,
    *,
    num_dims: int = 0,
    variance: float = 0.99,
    num_buckets: int = 1024,
    fingerprint: str = "",
) -> Pca:
    """Components and buckets of embeddings.

    Args:
      image: [N, E] CLIP image embeddings of unit length.
      text: [N, E] of the captions of the same pictures.
      num_dims: components to keep; 0 = as few as explain `variance`.
      variance: in (0, 1].
      num_buckets: V, at most N.
      fingerprint: of the CLIP.

    Raises:
      UsageError: for numbers out of range, too few embeddings, or ones that are all the same.
    """
    n, e = image.shape
    if not 2 <= num_buckets <= n:
        raise UsageError(
            f"{num_buckets} buckets from {n} embeddings; expected 2 up to the number of "
            "embeddings: ask for fewer buckets, or use more pictures."
        )
    if not 0 <= num_dims <= e:
        raise UsageError(f"{num_dims} dimensions of embeddings of {e} numbers; expected 1 to {e}.")
    if not 0 < variance <= 1:
        raise UsageError(f"variance={variance}; expected a share in (0, 1], paper 0.99.")
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    mean = image.mean(axis=0)
    centred = image - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / n)  # rising
    values, components = np.maximum(values[::-1], 0), vectors.T[::-1]
    # A component's sign is arbitrary; this choice does not depend on the machine's LAPACK.
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], axis=1)
    components = components * np.sign(largest)
    if not values[0] > 1e-12:
        raise UsageError(f"all {n} embeddings are the same: nothing can be learnt from them.")
    if not num_dims:
        share = np.cumsum(values) / values.sum()
        num_dims = min(int(np.searchsorted(share, variance - 1e-12)) + 1, e)
    edges, levels = _buckets(centred @ components.T, num_buckets)
    dot_edges, dot_levels = _buckets(np.sum(image * text, axis=1, keepdims=True), num_buckets)
    return Pca(
        mean=mean.astype(np.float32),
        components=components.astype(np.float32),
        variances=values.astype(np.float32),
        edges=edges,
        levels=levels,
        dot_edges=dot_edges[0],
        dot_levels=dot_levels[0],
        num_dims=num_dims,
        num_examples=n,
        clip=fingerprint,
    )


def quantise(tables: dict[str, Array], z: Array) -> Array:
    """Buckets of embeddings: z [B, E] -> [B, K] int32 in [0, V)."""
    centred = z.astype(jnp.float32) - tables["mean"][None]
    along = jnp.einsum("BE,KE->KB", centred, tables["components"], precision="highest")
    return jax.vmap(_bucket)(tables["edges"], along).T


def quantise_dot(tables: dict[str, Array], z: Array, z_t: Array) -> Array:
    """Bucket of the dot product of pairs: [B, E], [B, E] -> [B] int32 in [0, V)."""
    return _bucket(tables["dot_edges"], jnp.sum(z * z_t, axis=-1))


def dequantise(tables: dict[str, Array], buckets: Array) -> Array:
    """Embeddings of unit length [..., E] float32 of buckets [..., K] int32."""
    k = jnp.arange(buckets.shape[-1]).reshape((1,) * (buckets.ndim - 1) + (-1,))
    return _embedding(tables, jnp.asarray(tables["levels"])[k, buckets])


def truncate(pca: Pca, z: Array, num_dims: int) -> Array:
    """What the leading num_dims components keep of embeddings [B, E]: [B, E] of unit length.

    Source: the paper's figure 7, which decodes pictures from 20 to 320 of them.
    """
    if not 1 <= num_dims <= pca.joint_width:
        raise UsageError(f"{num_dims} dimensions; expected 1 to {pca.joint_width}.")
    tables = pca.tables(num_dims)
    along = jnp.einsum("BE,KE->BK", z - tables["mean"][None], tables["components"])
    return _embedding(tables, along)


def to_bytes(pca: Pca) -> bytes:
    """The file: an .npz without pickles, the same bytes for the same numbers."""
    buffer = io.BytesIO()
    numbers = dict(num_dims=np.int64(pca.num_dims), num_examples=np.int64(pca.num_examples))
    arrays = {name: getattr(pca, name) for name in _ARRAYS}
    np.savez(buffer, **arrays, **numbers, clip=np.array(pca.clip))
    return buffer.getvalue()


def from_bytes(data: bytes, name: str) -> Pca:
    """The fit that a file holds; `name` is for messages.

    Raises:
      UsageError: if the bytes are no such file.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {key: file[key] for key in (*_ARRAYS, "num_dims", "num_examples", "clip")}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{name} is not a file of `python -m dalle_jax pca` ({error}); make it again."
        ) from error
    numbers = {key: int(arrays.pop(key)) for key in ("num_dims", "num_examples")}
    return Pca(clip=str(arrays.pop("clip")), **arrays, **numbers)


def load(path: str) -> Pca:
    """`from_bytes` of a file.

    Raises:
      UsageError: if there is none, or it holds something else.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UsageError(
            f"{str(path)!r} does not exist; make it with `python -m dalle_jax pca --clip=DIR "
            f"--out={path}`."
        )
    return from_bytes(file.read_bytes(), str(path))


def save(pca: Pca, path: str) -> None:
    """Writes `to_bytes` to a file, which appears only when it is complete."""
    file = pathlib.Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_bytes(to_bytes(pca))
    part.replace(file)


def quantised_cosine(pca: Pca, z: np.ndarray) -> float:
    """Mean cosine between embeddings [B, E] and their quantised selves."""
    tables = pca.tables()
    quantised = np.asarray(dequantise(tables, quantise(tables, z)))
    return float(np.sum(z * quantised, axis=1).mean())


def _embedding(tables: dict[str, Array], along: Array) -> Array:
    z = jnp.einsum("...K,KE->...E", along, tables["components"], precision="highest")
    mean = jnp.asarray(tables["mean"])
    return clip.unit(z + mean.reshape((1,) * (z.ndim - 1) + mean.shape))


def _bucket(edges: Array, values: Array) -> Array:
    """How many of the rising edges [V - 1] are at or below each of the values."""
    return jnp.searchsorted(edges, values, side="right").astype(jnp.int32)


def _buckets(values: np.ndarray, num_buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges [K, V - 1] between buckets of equally many of N values [N, K], and means [K, V]."""
    ordered = np.sort(values, axis=0).T  # [K, N]
    starts = np.arange(num_buckets + 1) * ordered.shape[1] // num_buckets
    sums = np.concatenate([np.zeros((len(ordered), 1)), np.cumsum(ordered, axis=1)], axis=1)
    levels = np.diff(sums[:, starts], axis=1) / np.diff(starts)
    inner = starts[1:-1]
    # In the middle between neighbours: rounding to float32 moves no training value across.
    edges = (ordered[:, inner - 1] + ordered[:, inner]) / 2
    return edges.astype(np.float32), levels.astype(np.float32)
