"""Workdirs as callable stages: a trained codec, DALL·E or CLIP from its folder alone.

The config travels with the checkpoint, so a stage needs nothing but its folder: a run's workdir,
or the small exported folder of `export`. Weights are the EMA where there is one. Everything that
can be wrong with a folder (missing, of another task, not trained yet, weights of another shape)
is a `UsageError` before anything compiles. Called by tasks/dalle.py and tasks/clip.py, whose
frozen codec this is, and by cli and evaluation.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax import config as cfg
from dalle_jax.engine import checkpoint
from dalle_jax.models import build
from dalle_jax.nn import partition
from dalle_jax.types import Array, Params, UsageError

PRETRAINED = pathlib.Path(__file__).resolve().parent.parent / "pretrained"
STAGES = (
    "dvae", "clip", "dalle",
    "prior", "prior_ar", "decoder", "inpaint", "upsampler_1", "upsampler_2",
)  # fmt: skip


class Weights:
    """Host arrays `params`, and copies of them on devices, each made once."""

    @functools.cached_property
    def _copies(self) -> dict[jax.sharding.Sharding | None, Params]:
        return {}

    def on(self, where: jax.sharding.Sharding | None = None) -> Params:
        """`params` as `where` says; by default on the first device."""
        if where not in self._copies:
            self._copies[where] = jax.device_put(self.params, where)
        return self._copies[where]


@dataclasses.dataclass(frozen=True, eq=False)
class Codec(Weights):
    """Images to codes and back: a trained dVAE or VQ-VAE.

    Attributes:
      model: the linen module, with `encode` and `decode_codes` methods.
      params: all its variables, `{"params": ..., other collections}`, host arrays.
      grid: g, side of the code grid.
      num_codes: V, entries of the codebook.
      image_px: h = w of the images.
      fingerprint: 16 hex digits of weights and architecture: stored codes carry it, so that codes
        of one codec are never read with another.
      workdir: where it came from.
      config: its run's config.
      step: training step of the weights.
      encode_fn: pure (params, images [B, h, w, 3] float in [-1, 1]) -> codes [B, g, g] int32.
      decode_fn: pure (params, codes [B, g, g] or [B, g*g] int32) -> images [B, h, w, 3] float32
        in [-1, 1].
    """

    model: nn.Module
    params: Params
    grid: int
    num_codes: int
    image_px: int
    fingerprint: str
    workdir: str
    config: cfg.ConfigDict
    step: int
    encode_fn: Callable[[Params, Array], Array]
    decode_fn: Callable[[Params, Array], Array]

    @property
    def boxed(self) -> Params:
        """`params` with the logical names that the model gives them: what `Task.frozen` wants."""
        picture = jax.ShapeDtypeStruct((1, self.image_px, self.image_px, 3), jnp.float32)
        key = jax.eval_shape(jax.random.key, 0)
        return partition.rebox(jax.eval_shape(self.model.init, key, picture), self.params)

    @property
    def encoder(self) -> Params:
        """`boxed` without the decoder: all that `encode_fn` reads, about half."""
        return {
            collection: {k: v for k, v in tree.items() if not k.startswith("decoder")}
            for collection, tree in self.boxed.items()
        }

    def encode(self, images: Array) -> Array:
        """Codes [B, g, g] int32 of images [B, h, w, 3], float in [-1, 1]; compiled."""
        return self._encode(self._beside(images), images)

    def decode(self, codes: Array) -> Array:
        """Images [B, h, w, 3] float32 in [-1, 1] of codes [B, g, g] or [B, g*g]; compiled.

        As with `encode`, an input that is spread over devices is worked on where it lies.
        """
        return self._decode(self._beside(codes), codes)

    def _beside(self, x: Array) -> Params:
        """The weights on every device that holds a part of x."""
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
            return self.on(NamedSharding(x.sharding.mesh, PartitionSpec()))
        return self.on()

    @functools.cached_property
    def _encode(self):
        return jax.jit(self.encode_fn)

    @functools.cached_property
    def _decode(self):
        return jax.jit(self.decode_fn)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipStage(Weights):
    """A trained CLIP.

    Attributes:
      model: the linen module, with `encode_image` and `encode_text` methods.
      params: its parameters, host arrays (no collection level).
      config: its run's config.
      tokenizer_bytes: the SentencePiece model it was trained with.
      image_px: side of the pictures it takes.
      text_len: text ids per caption, bos and eos included.
      fingerprint: 16 hex digits of weights and architecture.
      workdir: where it came from.
      step: training step of the weights.
      origin: fingerprint of the run that it was exported (and so rounded) from; "" of a run.
    """

    model: nn.Module
    params: Params
    config: cfg.ConfigDict
    tokenizer_bytes: bytes
    image_px: int
    text_len: int
    fingerprint: str
    workdir: str
    step: int
    origin: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class DalleStage(Weights):
    """A trained DALL·E with the codec whose codes it draws.

    Attributes:
      model: the linen module.
      params: its parameters, host arrays (no collection level).
      config: its run's config.
      tokenizer_bytes: the SentencePiece model it was trained with.
      text_len: text positions before the image.
      codec: the codec, loaded.
      fingerprint: 16 hex digits of weights and architecture.
      workdir: where it came from.
      step: training step of the weights.
    """

    model: nn.Module
    params: Params
    config: cfg.ConfigDict
    tokenizer_bytes: bytes
    text_len: int
    codec: Codec
    fingerprint: str
    workdir: str
    step: int


def load_codec(workdir: str, step: int | None = None) -> Codec:
    """The codec that an autoencoder run's workdir (or exported folder) holds.

    Raises:
      UsageError: if the folder is missing, of another task, not trained yet or damaged.
    """
    config, variables = open_run(workdir, "autoencode", step)
    params = floats({"params": variables.params, **(variables.extra or {})}, config)
    codec = make_codec(config, params, fingerprint(params, config), str(workdir), variables.step)
    px = codec.image_px
    images = jax.ShapeDtypeStruct((1, px, px, 3), jnp.float32)
    trace(workdir, lambda p, x: codec.decode_fn(p, codec.encode_fn(p, x)), params, images)
    return codec


def load_clip(workdir: str, step: int | None = None) -> ClipStage:
    """The CLIP that a clip run's workdir (or exported folder) holds.

    Raises:
      UsageError: if the folder is missing, of another task, not trained yet or damaged.
    """
    config, variables = open_run(workdir, "clip", step)
    model = build.clip(config)
    params = floats(variables.params, config)
    px, length = config.data.image_px, config.data.text_len
    origin = checkpoint.absolute(workdir) / checkpoint.ORIGIN
    images = jax.ShapeDtypeStruct((1, px, px, 3), jnp.float32)
    text = jax.ShapeDtypeStruct((1, length), jnp.int32)
    trace(workdir, lambda p, *xs: model.apply({"params": p}, *xs), params, images, text)
    return ClipStage(
        model=model,
        params=params,
        config=config,
        tokenizer_bytes=read_tokenizer(workdir),
        image_px=px,
        text_len=length,
        fingerprint=fingerprint(params, config),
        workdir=str(workdir),
        step=variables.step,
        origin=origin.read_text() if origin.exists() else "",
    )


def load_dalle(workdir: str, dvae: str = "", step: int | None = None) -> DalleStage:
    """The DALL·E that a dalle run's workdir (or exported folder) holds, with its codec.

    Args:
      workdir: the run's folder.
      dvae: the codec's folder if it has moved; by default the one that the run's config names,
        else a folder `dvae` beside the workdir, as pretrained sets are laid out.
      step: training step; the latest by default.

    Raises:
      UsageError: if a folder is missing, of another task, not trained yet or damaged, or if the
        codec does not fit the transformer.
    """
    config, variables = open_run(workdir, "dalle", step)
    codec = load_codec(_codec_workdir(workdir, config, dvae))
    trained_with = checkpoint.absolute(workdir) / checkpoint.CODEC
    if trained_with.exists() and trained_with.read_text() != codec.fingerprint:
        raise UsageError(
            f"{str(workdir)!r} was trained on the codes of a codec {trained_with.read_text()}, but "
            f"{codec.workdir!r} holds {codec.fingerprint}: it was trained on or again. Give the "
            "folder of the old one with --dvae, or train the DALL-E again."
        )
    model = build.dalle(config, codec.grid, codec.num_codes)
    params = floats(variables.params, config)
    text = jax.ShapeDtypeStruct((1, config.data.text_len), jnp.int32)
    codes = jax.ShapeDtypeStruct((1, codec.grid**2), jnp.int32)
    trace(workdir, lambda p, *xs: model.apply({"params": p}, *xs), params, text, codes)
    return DalleStage(
        model=model,
        params=params,
        config=config,
        tokenizer_bytes=read_tokenizer(workdir),
        text_len=config.data.text_len,
        codec=codec,
        fingerprint=fingerprint(params, config),
        workdir=str(workdir),
        step=variables.step,
    )


def kept(tokenizer=None, codec: Codec | None = None) -> dict[str, bytes]:
    """`Task.keeps` of a run on this tokenizer and this codec."""
    files = {} if tokenizer is None else {checkpoint.TOKENIZER: tokenizer.model_bytes}
    return files if codec is None else files | {checkpoint.CODEC: codec.fingerprint.encode()}


def pretrained(name: str) -> dict[str, str]:
    """Folders of a pretrained set that ships with the package: stage name -> folder.

    Raises:
      UsageError: for an unknown name; the text lists the known ones.
    """
    folder = PRETRAINED / name
    names = (
        sorted(p.name for p in PRETRAINED.iterdir() if p.is_dir()) if PRETRAINED.is_dir() else []
    )
    if name not in names:
        known = ", ".join(names) or "none in this installation"
        raise UsageError(f"there is no pretrained set {name!r}; known sets: {known}.")
    return {stage: str(folder / stage) for stage in STAGES if (folder / stage).is_dir()}


def fingerprint(params: Params, config: cfg.ConfigDict) -> str:
    """16 hex digits that change with any weight or with the architecture.

    Args:
      params: nested dict of host arrays.
      config: the run's config; its `model` section counts, its training sections do not.
    """
    digest = hashlib.sha256(json.dumps(config.model.to_dict(), sort_keys=True).encode())
    for name, leaf in sorted(checkpoint.flatten(params).items()):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()[:16]


def make_codec(
    config: cfg.ConfigDict, params: Params, digits: str, workdir: str, step: int
) -> Codec:
    """The codec of a config with these variables, which may be ShapeDtypeStructs.

    Args:
      config: of an autoencoder's run.
      params: `{"params": ..., other collections}`.
      digits: their fingerprint.
      workdir: where they came from.
      step: their training step.
    """
    model = build.autoencoder(config)
    grid = model.config.grid

    def encode_fn(params: Params, images: Array) -> Array:
        return model.apply(params, images, method="encode")

    def decode_fn(params: Params, codes: Array) -> Array:
        codes = codes.reshape(codes.shape[0], grid, grid)
        return model.apply(params, codes, method="decode_codes")

    return Codec(
        model=model,
        params=params,
        grid=grid,
        num_codes=model.config.num_codes,
        image_px=config.data.image_px,
        fingerprint=digits,
        workdir=workdir,
        config=config,
        step=step,
        encode_fn=encode_fn,
        decode_fn=decode_fn,
    )


def open_run(workdir: str, task: str, step: int | None):
    """Config and variables of a folder that must hold a run of `task`; UsageError if not."""
    if not checkpoint.absolute(workdir).is_dir():
        raise UsageError(
            f"workdir {str(workdir)!r} does not exist; expected the folder of a {task} run: "
            "give the --workdir that `train` was given."
        )
    config = checkpoint.load_config(workdir)
    if config.task != task:
        raise UsageError(
            f"workdir {str(workdir)!r} holds a run of task {config.task!r}; expected task "
            f"{task!r}: check which folder goes with which option."
        )
    return config, checkpoint.load_variables(workdir, step)


def _codec_workdir(workdir: str, config: cfg.ConfigDict, given: str) -> str:
    if given:
        return given
    named = config.stages.get("dvae", "")
    beside = checkpoint.absolute(workdir).parent / "dvae"
    for folder in (named, str(beside)):
        if folder and checkpoint.absolute(folder).is_dir():
            return folder
    raise UsageError(
        f"the codec of {str(workdir)!r} is not at {named!r}, which its config names, nor at "
        f"{str(beside)!r}; give its folder with --dvae."
    )


def read_tokenizer(workdir: str) -> bytes:
    """The SentencePiece model of a run; UsageError if it is missing."""
    path = checkpoint.absolute(workdir) / checkpoint.TOKENIZER
    if not path.exists():
        raise UsageError(
            f"{path} is missing; `train` copies the tokenizer there: copy it from the original "
            "run, or train again."
        )
    return path.read_bytes()


def floats(tree: Params, config: cfg.ConfigDict) -> Params:
    """Host arrays, floats in the config's parameter dtype: an export may store 16-bit ones."""
    dtype = build.policy(config).param

    def cast(leaf):
        leaf = np.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def trace(workdir: str, apply: Callable, params: Params, *inputs):
    """Traces `apply` without running it; linen then names any weight whose shape differs."""
    try:
        return jax.eval_shape(apply, params, *inputs)
    except flax.errors.FlaxError as error:
        raise UsageError(
            f"the weights in {str(workdir)!r} do not fit the model of its config: {error} "
            "Was config.json edited, or is the codec another one than it was trained with?"
        ) from error
