"""Untrained stages on disk as exported folders: made in seconds, all that loading needs."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import weights
from safetensors import numpy as safetensors

from dalle_jax import config as cfg
from dalle_jax.data import tokenizers
from dalle_jax.engine import checkpoint
from dalle_jax.models import build, unet
from dalle_jax.stages import pca, run
from dalle_jax.stages.clip import ClipStage
from dalle_jax.stages.codec import Codec
from dalle_jax.stages.prior import PriorStage

ROOT = pathlib.Path(__file__).resolve().parents[2]
CAPTIONS = [
    f"{article} {colour} {shape} on a {ground} background"
    for article in ("a", "one", "two")
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("cube", "star", "ring", "cross")
    for ground in ("white", "black", "gray")
]
VOCAB = 400
PX = 16


@functools.cache
def tokenizer_bytes() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return tokenizers.train(CAPTIONS, VOCAB, pathlib.Path(folder) / "t.model").model_bytes


def config(name: str, **overrides):
    """configs/NAME.py:size=smoke at 16 px."""
    small = {"data.image_px": PX, "data.vocab_size": VOCAB, "data.text_len": 12}
    return cfg.override(cfg.load(f"{ROOT}/configs/{name}.py:size=smoke"), small | overrides)


def write(folder: pathlib.Path, config, params, extra=None, has_text: bool = True) -> str:
    """An exported folder; returns its path as text."""
    folder.mkdir(parents=True)
    checkpoint.save_config(str(folder), config)
    flat = checkpoint.flatten(jax.tree.map(np.asarray, params))
    flat |= {"extra/" + k: np.asarray(v) for k, v in checkpoint.flatten(extra or {}).items()}
    (folder / "params.safetensors").write_bytes(safetensors.save(flat, metadata={"step": "7"}))
    if has_text:
        (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    return str(folder)


def write_codec(folder: pathlib.Path, name: str = "vqvae", seed: int = 0, **overrides) -> str:
    made = config(name, **overrides)
    model = build.autoencoder(made)
    variables = weights.init(model, jnp.zeros((1, PX, PX, 3)), seed=seed)
    variables = dict(nn.meta.unbox(variables))
    extra = {k: v for k, v in variables.items() if k != "params"}
    if "codebook" in extra:  # as after the first batch; it starts at zeros
        vectors = extra["codebook"]["vectors"]
        spread = jax.random.normal(jax.random.key(seed + 1), vectors.shape)
        extra = {"codebook": {**extra["codebook"], "vectors": spread}}
    return write(folder, made, variables["params"], extra, has_text=False)


def write_clip(folder: pathlib.Path, seed: int = 0, **overrides) -> str:
    made = config("clip", **overrides)
    text = jnp.zeros((1, made.data.text_len), jnp.int32)
    px = made.data.image_px
    params = weights.init(build.clip(made), jnp.zeros((1, px, px, 3)), text, seed=seed)
    return write(folder, made, nn.meta.unbox(params)["params"])


def write_dalle(folder: pathlib.Path, codec: str, seed: int = 0, **overrides) -> str:
    made = config("dalle", **{"stages.dvae": codec} | overrides)
    loaded = Codec.load(codec)
    model = build.dalle(made, loaded.grid, loaded.num_codes)
    text = jnp.zeros((1, made.data.text_len), jnp.int32)
    codes = jnp.zeros((1, loaded.grid**2), jnp.int32)
    params = weights.init(model, text, codes, seed=seed)
    return write(folder, made, nn.meta.unbox(params)["params"])


def write_prior(folder: pathlib.Path, clip: str, kind: str = "diffusion", seed: int = 0) -> str:
    loaded = ClipStage.load(clip)
    small = {"model.width": 32, "model.num_layers": 1, "model.num_heads": 2}
    made = config(f"prior_{kind}", **{"stages.clip": clip} | small)
    fitted = None if kind == "diffusion" else write_pca(folder.parent / "pca.npz", clip)
    model = PriorStage.build(made, loaded, fitted)
    inputs = [jnp.zeros(x.shape, x.dtype) for x in PriorStage.example_inputs(model)]
    params = nn.meta.unbox(weights.init(model, *inputs, seed=seed))["params"]
    return _keep(
        write(folder, made, params),
        run.identity_files(clip=loaded, pca=b"" if fitted is None else pca.to_bytes(fitted)),
    )


def write_pca(file: pathlib.Path, clip: str) -> pca.Pca:
    loaded, rng = ClipStage.load(clip), np.random.default_rng(0)
    z = rng.normal(size=(2, 64, loaded.model.config.joint_width))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    fitted = pca.fit(*z, num_dims=4, num_buckets=8, fingerprint=loaded.fingerprint)
    file.write_bytes(pca.to_bytes(fitted))
    return fitted


def write_unet(folder: pathlib.Path, clip: str = "", seed: int = 0, **overrides) -> str:
    """A decoder of 8 px for this CLIP; without one an upsampler from 8 to 16 px."""
    px, name = (8, "decoder") if clip else (16, "upsampler")
    patch = 1 if clip else 2
    small = {"model.width": 16, "model.head_width": 16, "model.patch_px": patch}
    if clip:
        text = {"model.text_width": 16, "model.text_layers": 1, "model.text_heads": 2}
        small |= {"model.attention_px": (4,), "stages.clip": clip} | text
    else:
        small |= {"loss.low_res_px": 8}
    made = config(name, **{"data.image_px": px} | small | overrides)
    loaded = ClipStage.load(clip) if clip else None
    model = build.unet(made, loaded.model.config.joint_width if clip else 0)
    spec = unet.cond_spec(model.config, 1, px)
    cond = {k: jnp.zeros(v.shape, v.dtype) for k, v in spec.items()}
    x, t = jnp.zeros((1, px, px, 3)), jnp.zeros(1, jnp.int32)
    params = nn.meta.unbox(weights.init(model, x, t, cond, seed=seed))["params"]
    path = write(folder, made, params, has_text=bool(clip))
    return _keep(path, run.identity_files(clip=loaded) if clip else {})


def write_unclip(root: pathlib.Path) -> dict[str, str]:
    """Folders of a whole pipeline, as a pretrained set is laid out."""
    clip = write_clip(root / "clip")
    return {
        "clip": clip,
        "prior": write_prior(root / "prior", clip),
        "prior_ar": write_prior(root / "prior_ar", clip, "ar"),
        "decoder": write_unet(root / "decoder", clip),
        "inpaint": write_unet(root / "inpaint", clip, **{"loss.inpaint": True}),
        "upsampler_1": write_unet(root / "upsampler_1"),
    }


def _keep(folder: str, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (pathlib.Path(folder) / name).write_bytes(data)
    return folder
