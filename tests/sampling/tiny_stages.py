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
from dalle_jax.data import tokenizer
from dalle_jax.engine import checkpoint
from dalle_jax.sampling import networks, stages

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
        return tokenizer.train(CAPTIONS, VOCAB, pathlib.Path(folder) / "t.model").model_bytes


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
    model = networks.autoencoder(made)
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
    params = weights.init(networks.clip(made), jnp.zeros((1, px, px, 3)), text, seed=seed)
    return write(folder, made, nn.meta.unbox(params)["params"])


def write_dalle(folder: pathlib.Path, codec: str, seed: int = 0, **overrides) -> str:
    made = config("dalle", **{"stages.dvae": codec} | overrides)
    loaded = stages.load_codec(codec)
    model = networks.dalle(made, loaded.grid, loaded.num_codes)
    text = jnp.zeros((1, made.data.text_len), jnp.int32)
    codes = jnp.zeros((1, loaded.grid**2), jnp.int32)
    params = weights.init(model, text, codes, seed=seed)
    return write(folder, made, nn.meta.unbox(params)["params"])
