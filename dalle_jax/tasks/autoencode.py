"""Stage one: teach a dVAE or a VQ-VAE to write pictures as a grid of codes.

One task for both: `config.model.kind` picks the module, whose `loss`, `evaluate` and
`forward_macs` are the whole difference.
"""

import jax
import jax.numpy as jnp

from dalle_jax import config as cfg
from dalle_jax import images
from dalle_jax.engine import checkpoint
from dalle_jax.engine.task import Output, Task
from dalle_jax.models import build, dvae, vqvae
from dalle_jax.types import Array, Batch, Key, Params, UsageError

NAME = "autoencode"
PREVIEW = 16  # pictures

COLLAPSED = "alarm/collapsed"
ALARMS = {
    COLLAPSED: (
        "the codes have collapsed: almost every position chooses the same few codes, and the "
        "pictures will stay blurred. Remedy: train configs/vqvae.py with the same sizes first and "
        "start from it with --config.init_from=<its workdir>; or raise model.kl_weight or "
        "model.entropy_bonus (0.01 to 0.1). See perplexity in the log."
    )
}


def make(config: cfg.ConfigDict, read_tokenizer=None, *, shapes_only: bool = False) -> Task:
    """The task of a config whose model.kind is "dvae" or "vqvae"; `shapes_only` changes nothing.

    Raises:
      UsageError: for an unknown kind, or sizes that do not fit, before anything compiles.
    """
    del read_tokenizer, shapes_only  # pictures only, no frozen network
    model = build.autoencoder(config)
    module = dvae if config.model.kind == "dvae" else vqvae
    image_px = config.data.image_px
    # Early codes are few in a healthy run too; a run has collapsed if they still are later.
    judged_from = max(100, min(2000, config.train.steps // 5))

    def init(key: Key) -> tuple[Params, dict]:
        variables = model.init(key, jnp.zeros((1, image_px, image_px, 3), jnp.float32))
        return variables.pop("params"), variables

    def loss(params: Params, extra, frozen, batch: Batch, key: Key, step: Array):
        del frozen
        pictures = images.to_float(batch["image"])
        total, metrics, extra = module.loss(model, params, extra, pictures, key, step)
        most = min(model.config.num_codes, len(pictures) * model.config.grid**2)
        metrics["loss"] = total
        metrics[COLLAPSED] = is_collapsed(metrics["perplexity"], most) * (step >= judged_from)
        return total, Output(metrics, extra)

    def evaluate(params: Params, extra, frozen, batch: Batch, key: Key) -> dict[str, Array]:
        del frozen, key
        metrics = vqvae.evaluate(model, params, extra, images.to_float(batch["image"]))
        return metrics | {"loss": metrics["recon"]}  # what every task has, and a sweep ranks by

    @jax.jit
    def reconstruct(params: Params, extra, pictures: Array) -> Array:
        variables = {"params": params, **(extra or {})}
        codes = model.apply(variables, pictures, method="encode")
        return model.apply(variables, codes, method="decode_codes")

    def preview(params: Params, extra, frozen, batch: Batch, key: Key) -> dict[str, Array]:
        """Each cell is an original over its reconstruction from hard codes."""
        del frozen, key
        originals = images.to_float(batch["image"][:PREVIEW])
        copies = reconstruct(params, extra, originals)
        return {"reconstructions": jnp.concatenate([originals, copies], 1)}

    def warm_start(params: Params, extra) -> tuple[Params, dict]:
        return _warm_start(config, model.config, params, extra)

    batch = config.data.batch
    return Task(
        name=NAME,
        batch_spec={"image": jax.ShapeDtypeStruct((batch, image_px, image_px, 3), jnp.uint8)},
        init=init,
        loss=loss,
        preview=preview,
        evaluate=evaluate,
        # forward + backward = 3 x, 2 FLOPs per multiply-add
        flops=6.0 * batch * module.forward_macs(model.config),
        warm_start=warm_start if config.init_from else None,
        alarms=ALARMS,
    )


def is_collapsed(perplexity: Array, most: int) -> Array:
    """1.0 where a batch uses hardly any codes, else 0.0.

    Args:
      perplexity: of the batch's code histogram.
      most: what it could be at most: min(codes, positions of the batch).

    The line is 2 % of that, and at least 3: on captioned shapes collapsed runs stood at 3 to 8 of
    256 codes and healthy ones at 60 to 160 of 512 (32 px, 64 positions a picture).
    """
    return (perplexity < max(3.0, 0.02 * most)).astype(jnp.float32)


def _warm_start(config: cfg.ConfigDict, new, params: Params, extra) -> tuple[Params, dict]:
    """Weights of config.init_from: a run of the same kind, or a VQ-VAE that becomes a dVAE."""
    source_dir = config.init_from
    source = checkpoint.load_config(source_dir)
    if source.task != NAME:
        raise UsageError(
            f"init_from {source_dir!r} holds a {source.task!r} run; expected an {NAME!r} run."
        )
    old = build.autoencoder(source).config
    converts = (old.kind, new.kind) == ("vqvae", "dvae")
    if old.kind != new.kind and not converts:
        raise UsageError(
            f"init_from {source_dir!r} holds a {old.kind}; a {new.kind} starts from a {new.kind}"
            f"{' or a vqvae' if new.kind == 'dvae' else ''}."
        )
    # n_init by its value: 0 stands for the width.
    same = ["trunk", "halvings", "width", "num_blocks", "num_codes"]
    same += [] if converts else (["likelihood"] if new.kind == "dvae" else ["code_dim", "codebook"])
    pairs = [(f"model.{name}", getattr(old, name), getattr(new, name)) for name in same]
    pairs.append(("model.n_init", old.n_init or old.width, new.n_init or new.width))
    if converts:  # a VQ-VAE's decoder gives the picture itself, no log-scales
        pairs.append(("model.likelihood", "mse", new.likelihood))
    for field, theirs, ours in pairs:
        if theirs != ours:
            raise UsageError(
                f"{field} is {ours!r} here and {theirs!r} in init_from {source_dir!r}; the weights"
                f" fit only if they are equal: use --config.{field}={theirs}."
            )
    loaded = checkpoint.load_variables(source_dir)
    if converts:
        vectors = (loaded.extra or {}).get("codebook", {}).get("vectors")
        vectors = loaded.params["codebook"] if vectors is None else vectors
        return dvae.from_vqvae(loaded.params, vectors), extra
    return loaded.params, loaded.extra or extra
