"""examples/dalle_in_one_file.py runs from end to end and learns as the product's networks do."""

import ast
import importlib.util
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle_jax.models import dalle, vqvae
from dalle_jax.nn.transformer import TransformerConfig

SIZES = dict(
    HELD_OUT=128, NUM_CODES=128, CODEC_WIDTH=48, WIDTH=64, LAYERS=2, CLIP_WIDTH=32, CLIP_LAYERS=1,
    CANDIDATES=4, BEST=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(root):
    return root / "examples" / "dalle_in_one_file.py"


@pytest.fixture
def one_file(path):
    """The example at small sizes: a fresh module for each test, because its sizes are globals."""
    spec = importlib.util.spec_from_file_location("dalle_in_one_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(SIZES)
    return module


def test_it_is_short_and_imports_nothing_of_ours_but_the_scenes(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    ours = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dalle_jax")
        for alias in node.names
    ]
    assert ours == ["dalle_jax.data.scenes"]


def test_its_losses_fall_and_it_writes_the_pictures(one_file, tmp_path, capsys):
    path = tmp_path / "pictures.png"
    one_file.main(["--smoke", "--steps_scale=0.5", f"--out={path}"])
    with Image.open(path) as sheet:  # rows of a caption and its best pictures, each with a border
        assert sheet.size == (2 * 3 * 33, len(one_file.PROMPTS) * (3 * 32 + 20))
    text = capsys.readouterr().out
    # Measured, last over first printed loss: 0.31, 0.34, 0.78.
    for name, unit, bound in (
        ("codec", "mse", 0.6), ("DALL-E", "nats per code", 0.6), ("CLIP", "nats", 0.9),
    ):  # fmt: skip
        losses = [float(x) for x in re.findall(rf"{name} step .*? ([\d.]+) {unit},", text)]
        assert len(losses) >= 10 and losses[-1] < bound * losses[0], (name, losses)


def test_its_codec_learns_as_the_products_does(one_file):
    """The same scenes, batches, optimiser and steps; only the networks and their losses differ."""
    pictures, _ = one_file.render_scenes(512)

    def held_out_mse(loss, p, book):
        metrics = one_file.train("codec", loss, p, book, [pictures], 80, 16, 2e-3)[-1]
        return float(metrics["mse"])

    p, book = one_file.init_codec(np.random.default_rng(0), pictures[:16])
    ours = held_out_mse(one_file.codec_loss, p, book)

    sizes = dict(width=one_file.CODEC_WIDTH, num_codes=one_file.NUM_CODES, ema_decay=0.98)
    model = vqvae.Vqvae(vqvae.VqvaeConfig(**sizes))
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), pictures[:1]))

    def loss(p, extra, batch, key):
        total, metrics, extra = vqvae.loss(model, p, extra, *batch, key, jnp.int32(0))
        return total, (extra, {"mse": metrics["recon"]})

    theirs = held_out_mse(loss, variables.pop("params"), variables)
    assert theirs < 0.25 * np.var(pictures)
    assert ours < 1.4 * theirs


def test_its_transformer_learns_as_the_products_does(one_file):
    """The same stream, batches, optimiser and steps; only the networks and their losses differ."""
    rng = np.random.default_rng(0)
    pictures, captions = one_file.render_scenes(512)
    vocabulary = ["", *sorted({word for caption in captions for word in caption.split()})]
    text = one_file.tokenize(captions, vocabulary)
    # A codec that needs no training: each square of 4 x 4 pixels gets one of 128 directions.
    squares = pictures.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 64, 48)
    codes = np.argmax(squares @ rng.normal(size=(48, one_file.NUM_CODES)), axis=-1)

    def held_out_nats(loss, p):
        metrics = one_file.train("DALL-E", loss, p, None, [text, codes], 60, 16, 3e-3)[-1]
        return float(metrics["nats per code"]), float(metrics["nats per word"])

    ours = held_out_nats(one_file.dalle_loss, one_file.init_dalle(rng, len(vocabulary)))

    config = dalle.DalleConfig(
        text_len=one_file.TEXT_LEN, vocab_size=len(vocabulary), num_codes=one_file.NUM_CODES,
        grid=one_file.GRID, attention=("full",), last_attention="full", embed_std=0.5,
        transformer=TransformerConfig(
            width=one_file.WIDTH, num_layers=one_file.LAYERS,
            num_heads=one_file.WIDTH // one_file.HEAD_DIM, norm="rms", use_bias=False,
        ),
    )  # fmt: skip
    model = dalle.Dalle(config)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), text[:1], codes[:1]))["params"]

    def loss(p, state, batch, key):
        total, metrics = dalle.loss(*model.apply({"params": p}, *batch), *batch)
        names = {"nats per code": "image_loss", "nats per word": "text_loss"}
        return total, (state, {ours: metrics[theirs] for ours, theirs in names.items()})

    theirs = held_out_nats(loss, params)
    assert theirs[0] < 0.5 * np.log(one_file.NUM_CODES)
    assert ours[0] < 1.15 * theirs[0] and ours[1] < 1.15 * theirs[1]


def test_sampling_with_caches_agrees_with_the_whole_stream(one_file, rng, key):
    """With a tiny TOP_P the sampler takes the likeliest code, which the training pass shows too."""
    one_file.TOP_P = 1e-6
    p = one_file.init_dalle(rng, num_words=20)
    text = jnp.asarray(rng.integers(0, 20, (3, one_file.TEXT_LEN)), jnp.int32)
    codes = one_file.sample_codes(p, text, key)

    @jax.jit
    def likeliest(codes):
        stream = [one_file.embed_text(p, text), one_file.embed_codes(p, codes, jnp.arange(64))]
        x, _ = one_file.transformer(p["layers"], jnp.concatenate(stream, axis=1), one_file.CAUSAL)
        return jnp.argmax(x[:, one_file.TEXT_LEN - 1 : -1] @ p["code_head"], axis=-1)

    np.testing.assert_array_equal(codes, likeliest(codes))
    assert len(np.unique(codes)) > 10
