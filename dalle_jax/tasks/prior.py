"""The priors of DALL-E 2: from a caption to the CLIP embedding of a picture that it describes.

Both embeddings of an example come from the frozen CLIP inside the step. `model.kind` chooses the
prior: "diffusion" learns to denoise the image embedding (mean square error of x_0), "ar" to predict
its quantised components one after the other (cross-entropy). A share `loss.text_drop` of examples
sees learned nulls instead of caption and text embedding, which guidance needs.

Held-out batches are judged by drawn embeddings, under the names

  cosine             drawn to true; beside it cosine_text, the text embedding in the prior's place,
                     and cosine_shuffled, drawn to another example's true one
  retrieval1         how often the true embedding is the nearest of the batch (pictures of the same
                     caption are no wrong answers); beside it retrieval1_text and retrieval1_chance

Source: Ramesh et al. 2022 (arXiv:2204.06125) §2.2; the loss of the diffusion prior is on embeddings
of the scale of `nn.condition`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import axes, images
from dalle_jax import config as cfg
from dalle_jax.diffusion import gaussian, schedules
from dalle_jax.engine.task import Output, Task
from dalle_jax.models import dalle, prior_ar, prior_diffusion
from dalle_jax.nn import partition
from dalle_jax.sampling import prior
from dalle_jax.stages import by_shape, pca, run
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.prior import PriorStage
from dalle_jax.tasks import captions
from dalle_jax.types import Array, Key, Params, UsageError

NAME = "prior"

X_0 = gaussian.Parameterisation("x_0", clip="none")


def make(config: cfg.ConfigDict, read_tokenizer=None, *, shapes_only: bool = False) -> Task:
    """The task that trains a prior on the embeddings of the CLIP in `config.stages.clip`.

    Args:
      config: with the sections of configs/prior_diffusion.py or configs/prior_ar.py.
      read_tokenizer: () -> the run's tokenizer, which must be the CLIP's; None in dry runs.
      shapes_only: for plans and dry runs: without a `stages.clip` the CLIP is the one that
        `stages.clip_config` describes, without weights; an AR prior then needs no PCA either.

    Raises:
      UsageError: for a missing CLIP or PCA, or values that do not fit together.
    """
    if not config.stages.clip and not shapes_only:
        raise UsageError(
            "stages.clip is empty; a prior needs a trained CLIP: give its workdir with "
            "--config.stages.clip=DIR."
        )
    clip = by_shape.clip(config) if shapes_only else ClipStage.load(config.stages.clip)
    tokenizer = read_tokenizer and read_tokenizer()
    return assemble(config, clip, tokenizer, _pca(config, clip, shapes_only))


def assemble(
    config: cfg.ConfigDict, clip: ClipStage, tokenizer=None, components: pca.Pca | None = None
) -> Task:
    """`make` for a CLIP and a PCA that are already loaded."""
    clip.check_reading(config, tokenizer)
    drop = config.loss.text_drop
    if not 0 <= drop <= 1:
        raise UsageError(f"loss.text_drop={drop}; expected a share in [0, 1], paper 0.1.")
    model = PriorStage.build(config, clip, components)
    c, data = model.config, config.data
    objective = _Ar(model) if c.kind == "ar" else _Diffusion(model)
    frozen = {"clip": clip.frozen()}
    if c.kind == "ar":
        frozen["pca"] = _table_shapes(c) if components is None else components.tables(c.num_dims)

    def init(key: Key) -> tuple[Params, None]:
        inputs = [jnp.zeros(x.shape, x.dtype) for x in PriorStage.example_inputs(model)]
        return model.init(key, *inputs)["params"], None

    def embed(frozen, batch) -> tuple[Array, Array]:
        pictures = images.to_float(batch["image"])
        return clip.embeddings(frozen["clip"], pictures, batch["text"])

    def loss(params, extra, frozen, batch, key, step):
        del step
        z_i, z_t = embed(frozen, batch)
        drop_key, noise_key, dropout_key = jax.random.split(key, 3)
        dropped = jax.random.bernoulli(drop_key, drop, (len(z_i),)) if drop else None
        total, metrics = objective.loss(
            params, frozen, batch["text"], z_i, z_t, dropped, noise_key,
            dropout_key if c.transformer.dropout else None,
        )  # fmt: skip
        return total, Output({"loss": total, **metrics}, extra)

    def evaluate(params, extra, frozen, batch, key):
        del extra
        text = batch["text"]
        z_i, z_t = embed(frozen, batch)
        loss_key, sample_key = jax.random.split(key)
        total, metrics = objective.loss(params, frozen, text, z_i, z_t, None, loss_key, None)
        options = {} if c.kind == "ar" else {"steps": config.loss.eval_steps}
        tables = frozen.get("pca")
        samples = prior.sample(model, params, tables, text, z_t, key=sample_key, **options)
        return {"loss": total, **metrics, **judge(samples, z_i, z_t, text)}

    return Task(
        name=NAME,
        batch_spec={
            "image": jax.ShapeDtypeStruct((data.batch, data.image_px, data.image_px, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((data.batch, data.text_len), jnp.int32),
        },
        init=init,
        loss=loss,
        frozen=frozen,
        evaluate=evaluate,
        flops=3 * data.batch * objective.flops,
        warm_start=_warm_start(config, clip, init),
        keeps=run.identity_files(
            tokenizer, clip=clip, pca=b"" if components is None else pca.to_bytes(components)
        ),
    )


class _Diffusion:
    """The objective of the diffusion prior."""

    def __init__(self, model: prior_diffusion.DiffusionPrior):
        c = model.config
        self.model, self.flops = model, prior_diffusion.flops(c)
        self.schedule = schedules.make(c.schedule, c.num_steps)

    def loss(self, params, frozen, text, z_i, z_t, dropped, key, dropout_key):
        """Mean square error of the scaled x_0 at random steps; 0.29 for an estimate of 0."""
        del frozen
        step_key, noise_key = jax.random.split(key)
        t = jax.random.randint(step_key, (len(z_i),), 0, self.schedule.num_steps)
        x_0, eps = z_i * self.model.config.scale, jax.random.normal(noise_key, z_i.shape)
        x_t = gaussian.q_sample(self.schedule, x_0, t, eps)
        output = self.model.apply({"params": params}, text, z_t, x_t, t, dropped, dropout_key)
        return jnp.mean(gaussian.losses(X_0, self.schedule, output, x_0, t, eps)["loss"]), {}


class _Ar:
    """The objective of the autoregressive prior."""

    def __init__(self, model: prior_ar.ArPrior):
        self.model, self.flops = model, prior_ar.flops(model.config)

    def loss(self, params, frozen, text, z_i, z_t, dropped, key, dropout_key):
        """Cross-entropy in nats per dimension."""
        del key
        tables = frozen["pca"]
        dims, dot = pca.quantise(tables, z_i), pca.quantise_dot(tables, z_i, z_t)
        logits = self.model.apply({"params": params}, text, z_t, dot, dims, dropped, dropout_key)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == dims)
        return jnp.mean(dalle.cross_entropy(logits, dims)), {"accuracy": accuracy}


def judge(samples: Array, z_i: Array, z_t: Array, text: Array) -> dict[str, Array]:
    """What sampled embeddings are worth, beside the text embeddings and chance.

    Args:
      samples: [B, E] of unit length, like the others.
      z_i: [B, E] of the true pictures.
      z_t: [B, E] of their captions.
      text: [B, T] int32.

    Returns:
      float32 scalars, named in the module's docstring.
    """
    everybody = partition.constrain(z_i, None, None)  # one gather, as in CLIP's loss
    own = jnp.eye(len(z_i), dtype=bool)
    excluded = captions.duplicates(text)

    def cosines(z: Array) -> tuple[Array, Array]:
        z = partition.constrain(z, axes.ACT_BATCH, None)
        scores = jnp.einsum("BE,SE->BS", z, everybody)
        right = jnp.sum(scores, axis=1, where=own)
        best = jnp.max(jnp.where(excluded | own, -jnp.inf, scores), axis=1)
        return right, right > best

    right, is_nearest = cosines(samples)
    right_text, is_nearest_text = cosines(z_t)
    others, _ = cosines(jnp.roll(samples, 1, axis=0))
    return {
        "cosine": jnp.mean(right),
        "cosine_text": jnp.mean(right_text),
        "cosine_shuffled": jnp.mean(others),
        "retrieval1": jnp.mean(is_nearest, dtype=jnp.float32),
        "retrieval1_text": jnp.mean(is_nearest_text, dtype=jnp.float32),
        "retrieval1_chance": jnp.float32(1 / len(z_i)),
    }


def _pca(config: cfg.ConfigDict, clip: ClipStage, shapes_only: bool) -> pca.Pca | None:
    """The PCA of an AR prior; None for the other, and in dry runs that name none."""
    if config.model.get("kind") != "ar" or (shapes_only and not config.stages.pca):
        return None
    if not config.stages.pca:
        raise UsageError(
            "stages.pca is empty; an AR prior needs the PCA of its CLIP's embeddings: make it with "
            "`python -m dalle_jax pca --clip=DIR --out=pca.npz` and give it with "
            "--config.stages.pca=pca.npz."
        )
    components = pca.load(config.stages.pca)
    if clip.fingerprint and components.clip != clip.fingerprint:
        raise UsageError(
            f"stages.pca={config.stages.pca!r} was fitted to the embeddings of a CLIP "
            f"{components.clip}, but {clip.folder!r} holds {clip.fingerprint}; make it again with "
            "`python -m dalle_jax pca`."
        )
    return components


def _table_shapes(c: prior_ar.ArPriorConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """`Pca.tables` of a file that is not there yet."""
    k, e, v = c.num_dims, c.joint_width, c.num_buckets
    shapes = {
        "mean": (e,), "components": (k, e), "edges": (k, v - 1), "levels": (k, v),
        "dot_edges": (v - 1,), "dot_levels": (v,),
    }  # fmt: skip
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def _warm_start(config: cfg.ConfigDict, clip: ClipStage, init):
    """`init_from`: the weights of another prior of the same shape and CLIP; None without."""
    if not config.init_from:
        return None
    stored = PriorStage.load(config.init_from, clip).params
    if run.same_shapes(jax.eval_shape(init, jax.random.key(0))[0], stored):
        raise UsageError(
            f"init_from={config.init_from!r} has other shapes than this config; use the same kind, "
            "model sizes and PCA."
        )
    return lambda params, extra: (stored, extra)
