"""The stages of DALL-E 2 from their workdirs, and what all of them share: one frozen CLIP.

As in `stages`, a folder is a run's workdir or an exported one, and everything that can be wrong
with it is a `UsageError` before anything compiles. A stage that was trained on the embeddings of
one CLIP says nothing about another's: loading refuses it, naming both.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dalle_jax import config as cfg
from dalle_jax.engine import checkpoint
from dalle_jax.models import build, prior_ar, prior_diffusion
from dalle_jax.nn import partition
from dalle_jax.sampling import prior
from dalle_jax.stages import pca, run
from dalle_jax.types import Array, Key, Params, UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class PriorStage(run.Weights):
    """A trained prior with the CLIP whose embeddings it draws.

    Attributes:
      model: the linen module.
      params: its parameters, host arrays (no collection level).
      kind: "diffusion" | "ar".
      config: its run's config.
      tokenizer_bytes: the SentencePiece model it was trained with: the CLIP's.
      text_len: ids of a caption, begin and end included.
      clip: the CLIP, loaded.
      pca: of an AR prior; else None.
      fingerprint: 16 hex digits of weights and architecture.
      workdir: where it came from.
      step: training step of the weights.
    """

    model: prior_diffusion.DiffusionPrior | prior_ar.ArPrior
    params: Params
    kind: str
    config: cfg.ConfigDict
    tokenizer_bytes: bytes
    text_len: int
    clip: run.ClipStage
    pca: pca.Pca | None
    fingerprint: str
    workdir: str
    step: int

    def sample(self, text: Array, z_t: Array, *, key: Key, **options) -> Array:
        """Image embeddings [B, E] for captions [B, T] and their embeddings [B, E].

        Args:
          text: as the CLIP reads captions.
          z_t: of unit length, `encode_text` of the CLIP.
          key: typed key.
          **options: of `prior.sample_diffusion` or `prior.sample_ar`.
        """
        return draw(self.model, self.on(), self.tables, text, z_t, key=key, **options)

    @property
    def tables(self) -> dict[str, Array] | None:
        """Of the PCA, for the model's dimensions; None without one."""
        return None if self.pca is None else self.pca.tables(self.model.config.num_dims)


def draw(model, params: Params, tables, text: Array, z_t: Array, *, key: Key, **options) -> Array:
    """`prior.sample_diffusion`, or with the tables of a PCA `prior.sample_ar`."""
    if tables is None:
        return prior.sample_diffusion(model, params, text, z_t, key=key, **options)
    return prior.sample_ar(model, params, tables, text, z_t, key=key, **options)


def load_prior(workdir: str, clip: str | run.ClipStage = "", step: int | None = None) -> PriorStage:
    """The prior that a prior run's workdir (or exported folder) holds, with its CLIP.

    Args:
      workdir: the run's folder.
      clip: the CLIP, or its folder if it has moved; by default the one that the run's config
        names, else a folder `clip` beside the workdir, as pretrained sets are laid out.
      step: training step; the latest by default.

    Raises:
      UsageError: if a folder is missing, of another task, not trained yet or damaged, or if the
        CLIP is another one than the prior was trained with.
    """
    config, variables = run.open_run(workdir, "prior", step)
    if not isinstance(clip, run.ClipStage):
        clip = run.load_clip(clip_workdir(workdir, config, clip))
    check_clip(workdir, clip)
    params = run.floats(variables.params, config)
    fitted = None
    if config.model.kind == "ar":
        file = checkpoint.absolute(workdir) / checkpoint.PCA
        if not file.exists():
            raise UsageError(f"{file} is missing; copy it from the original run, or train again.")
        fitted = pca.from_bytes(file.read_bytes(), str(file))
    model = make_prior(config, clip, fitted)
    inputs = example_inputs(model)
    run.trace(workdir, lambda p, *xs: model.apply({"params": p}, *xs), params, *inputs)
    return PriorStage(
        model=model,
        params=params,
        kind=config.model.kind,
        config=config,
        tokenizer_bytes=run.read_tokenizer(workdir),
        text_len=config.data.text_len,
        clip=clip,
        pca=fitted,
        fingerprint=run.fingerprint(params, config),
        workdir=str(workdir),
        step=variables.step,
    )


def make_prior(config: cfg.ConfigDict, clip: run.ClipStage, fitted: pca.Pca | None):
    """The prior of a config over this CLIP and, for an AR prior, this PCA (None = by shape).

    Raises:
      UsageError: if the config asks for other buckets, or more dimensions, than the PCA has.
    """
    joint = clip.model.config.joint_width
    if config.model.get("kind") != "ar":
        return build.prior(config, joint)
    dims, buckets = config.model.num_dims, config.model.num_buckets
    if fitted is None:
        return build.prior(config, joint, dims or joint, buckets or 1024)
    if fitted.joint_width != joint:
        raise UsageError(
            f"the PCA is of embeddings of {fitted.joint_width} numbers, but the CLIP's have "
            f"{joint}; make it again with `python -m dalle_jax pca`."
        )
    if buckets not in (0, fitted.num_buckets):
        raise UsageError(
            f"model.num_buckets={buckets}, but the PCA has {fitted.num_buckets}; use "
            "--config.model.num_buckets=0 (as the PCA has), or make the PCA again."
        )
    return build.prior(config, joint, dims or fitted.num_dims, fitted.num_buckets)


def example_inputs(model) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of one example as a prior's `__call__` takes it."""
    c = model.config
    text = jax.ShapeDtypeStruct((1, c.text_len), jnp.int32)
    embedding = jax.ShapeDtypeStruct((1, c.joint_width), jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    if c.kind == "ar":
        return text, embedding, number, jax.ShapeDtypeStruct((1, c.num_dims), jnp.int32)
    return text, embedding, embedding, number


def boxed(clip: run.ClipStage) -> Params:
    """The CLIP's parameters with their logical names: they are sharded like trained ones."""
    c, key = clip.model.config, jax.eval_shape(jax.random.key, 0)
    picture = jax.ShapeDtypeStruct((1, c.image_px, c.image_px, 3), jnp.float32)
    text = jax.ShapeDtypeStruct((1, c.text_len), jnp.int32)
    shapes = jax.eval_shape(clip.model.init, key, picture, text)["params"]
    return partition.rebox(shapes, clip.params)


def embeddings(clip: run.ClipStage, params: Params, images: Array, text: Array):
    """(z_i, z_t) [B, E] float32 of unit length, without a gradient.

    Args:
      clip: whose `model` it is.
      params: its parameters.
      images: [B, h, w, 3] float in [-1, 1], resized (bicubic, antialiased) to the CLIP's size.
      text: [B, T] int32.
    """
    px = clip.image_px
    if images.shape[1:3] != (px, px):
        shape = (len(images), px, px, 3)
        images = jnp.clip(jax.image.resize(images, shape, "cubic", antialias=True), -1, 1)
    image, text, _ = clip.model.apply({"params": params}, images, text)
    return jax.lax.stop_gradient((image, text))


def check_clip(workdir: str, clip: run.ClipStage) -> None:
    """Raises UsageError if the run in a folder was trained with another CLIP; names both."""
    file = checkpoint.absolute(workdir) / checkpoint.CLIP
    if file.exists() and file.read_text() not in (clip.fingerprint, clip.origin):
        raise UsageError(
            f"{str(workdir)!r} was trained on the embeddings of a CLIP {file.read_text()}, but "
            f"{clip.workdir!r} holds {clip.fingerprint}: another one, or trained on since. Give "
            "the folder of the old one with --clip, or train the stage again."
        )


def clip_workdir(workdir: str, config: cfg.ConfigDict, given: str = "") -> str:
    """Where the CLIP of a stage is: `given`, its config's `stages.clip`, or `clip` beside it.

    Raises:
      UsageError: if it is nowhere.
    """
    if given:
        return given
    named = config.stages.get("clip", "")
    beside = checkpoint.absolute(workdir).parent / "clip"
    for folder in (named, str(beside)):
        if folder and checkpoint.absolute(folder).is_dir():
            return folder
    raise UsageError(
        f"the CLIP of {str(workdir)!r} is not at {named!r}, which its config names, nor at "
        f"{str(beside)!r}; give its folder with --clip."
    )


def check_reading(config: cfg.ConfigDict, clip: run.ClipStage, tokenizer=None) -> None:
    """Raises UsageError if a run would read captions in another way than its frozen CLIP does.

    Args:
      config: of the run.
      clip: of `stages.clip`.
      tokenizer: the run's; None in dry runs.
    """
    name = config.stages.clip or config.stages.clip_config
    if not config.data.add_bos_eos:
        raise UsageError(
            "data.add_bos_eos=False, but CLIP's captions have begin and end; set "
            "--config.data.add_bos_eos=true."
        )
    if config.data.caption_drop:
        raise UsageError(
            f"data.caption_drop={config.data.caption_drop} would give the CLIP empty captions; set "
            "--config.data.caption_drop=0: loss.text_drop is what guidance needs."
        )
    for field in ("text_len", "vocab_size"):
        ours, theirs = config.data[field], getattr(clip.model.config, field)
        if ours != theirs:
            raise UsageError(
                f"data.{field}={ours}, but the CLIP {name} has {theirs}; set "
                f"--config.data.{field}={theirs}."
            )
    if tokenizer is not None and tokenizer.model_bytes != clip.tokenizer_bytes:
        raise UsageError(
            f"the run's tokenizer is not that of the CLIP {name}, so its ids mean other words; "
            "use a new --workdir, for which the CLIP's own is taken."
        )


def kept(tokenizer, clip: run.ClipStage, fitted: pca.Pca | None = None) -> dict[str, bytes]:
    """`Task.keeps` of a run with this tokenizer (or None), CLIP and PCA."""
    files = run.kept(tokenizer)
    if clip.fingerprint:
        files |= {checkpoint.CLIP: clip.fingerprint.encode()}
    return files if fitted is None else files | {checkpoint.PCA: pca.to_bytes(fitted)}
