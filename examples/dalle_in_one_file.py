"""DALL-E in one file: a codec, a transformer and a CLIP, trained from nothing on captioned shapes.

    pip install -e .
    python examples/dalle_in_one_file.py             # about 20 minutes of processor time
    python examples/dalle_in_one_file.py --smoke     # a thirtieth of everything, hardly trained

DALL-E (Ramesh et al. 2021, arXiv:2102.12092) turns a caption into pictures with three networks:

  1. The codec turns a picture into a grid of 8 x 8 codes, and codes back into a picture.
  2. The transformer reads a caption and predicts the 64 codes, one after another.
  3. CLIP scores how well a picture fits a caption. We sample 32 pictures and show its best 8.

A network is a function of a dict of arrays `p`, which an `init_` function fills. In shapes, B
counts examples, T positions, S keys, H heads, V codes and M vectors; D is the width. The package
has the same networks at every size in dalle_jax/models: vqvae.py, dalle.py and clip.py.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageDraw

from dalle_jax.data import scenes

SCENES, HELD_OUT = 30_720, 512  # no network is trained on the last 512 scenes
IMAGE_PX, TEXT_LEN = 32, 14  # the longest caption has 14 words
PATCH_PX, GRID = 4, 8  # each of the 8 x 8 codes stands for a square of 4 x 4 pixels
NUM_CODES, CODE_DIM, CODEC_WIDTH = 512, 32, 96
WIDTH, LAYERS, HEAD_DIM = 128, 4, 32  # the transformer of DALL-E
CLIP_PATCH_PX, CLIP_WIDTH, CLIP_LAYERS, CLIP_DIM = 8, 96, 3, 64
# Training steps of the codec, DALL-E and CLIP. On held-out scenes the codec's squared error is then
# 0.008, DALL-E has 1.25 nats per code, and CLIP finds 60 % of the captions among 512.
STEPS = 1200, 3000, 1500
TEMPERATURE, TOP_P = 1.0, 0.9
CANDIDATES, BEST = 32, 8
PROMPTS = (
    "a red circle on a white background",
    "a pink star on a black background",
    "a green cube on a gray background",
    "two purple rings on a white background",
    "a red cube and a green star on a white background",
    "a cyan ring above an orange triangle on a gray background",
)
LENGTH = TEXT_LEN + GRID * GRID  # positions of DALL-E's stream: the words, then the codes
CAUSAL = np.tril(np.ones((1, 1, LENGTH, LENGTH), bool))  # a position sees itself and those before
cross_entropy = optax.softmax_cross_entropy_with_integer_labels  # in nats


def render_scenes(num: int) -> tuple[np.ndarray, list[str]]:
    """Pictures [num, 32, 32, 3] in [-1, 1] and their captions. Half of them have one object."""
    kinds = ("single", "count", "single", "binding", "single", "relation")
    pictures, captions = np.empty((num, IMAGE_PX, IMAGE_PX, 3), np.float32), []
    for i in range(num):
        scene = scenes.sample_scene(scenes.example_rng(0, "one file", i), kinds[i % len(kinds)])
        pictures[i] = scenes.render(scene, IMAGE_PX) / 127.5 - 1
        captions.append(scene.caption)
    return pictures, captions


def tokenize(captions, vocabulary: list[str]) -> np.ndarray:
    """Captions as int32 [B, TEXT_LEN]: the number of each word, then 0 for every empty slot."""
    rows = [[vocabulary.index(word) for word in caption.split()] for caption in captions]
    return np.array([row + [0] * (TEXT_LEN - len(row)) for row in rows], np.int32)


def normal(rng: np.random.Generator, *shape: int, gain: float = 1.0, std: float | None = None):
    """Random weights [..., inputs, outputs]: outputs have `gain` times the deviation of inputs."""
    std = gain * np.prod(shape[:-1]) ** -0.5 if std is None else std
    return jnp.asarray(rng.normal(scale=std, size=shape), jnp.float32)


# ---- 1. The codec: a VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937) -------------------------
def init_codec(rng, pictures) -> tuple[dict, dict]:
    """The weights of encoder and decoder, and a codebook."""
    width = CODEC_WIDTH

    def block():
        kernel = normal(rng, 3, 3, width, width, gain=2**0.5)
        return {"conv": kernel, "out": normal(rng, width, width, gain=0.3)}

    p = {
        "patch": normal(rng, PATCH_PX, PATCH_PX, 3, 2 * width),
        "down": normal(rng, 2 * width, width, gain=2**0.5),
        "encoder": [block(), block()],
        "to_code": normal(rng, width, CODE_DIM),
        "from_code": normal(rng, CODE_DIM, width),
        "decoder": [block(), block()],
        "up": normal(rng, width, 2 * width, gain=2**0.5),
        "pixels": normal(rng, 2 * width, PATCH_PX * PATCH_PX * 3, gain=0.5),
    }
    # The first codes are outputs of the encoder. A code far from them all would never be chosen.
    vectors = encode(p, pictures).reshape(-1, CODE_DIM)
    codes = vectors[rng.choice(len(vectors), NUM_CODES)]
    count = jnp.full((NUM_CODES, 1), len(vectors) / NUM_CODES, jnp.float32)
    return p, {"codes": codes, "count": count, "sum": codes * count}


def convolve(x, kernel, stride: int = 1):
    """x [B, h, w, C] with kernel [k, k, C, D] -> [B, h / stride, w / stride, D]."""
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, [stride] * 2, "SAME", dimension_numbers=dims)


def residual_blocks(blocks, x):
    """Each block adds a correction to x, which it computes from the 3 x 3 neighbours."""
    for block in blocks:
        x = x + jax.nn.relu(convolve(jax.nn.relu(x), block["conv"])) @ block["out"]
    return jax.nn.relu(x)


def encode(p, pictures):
    """Pictures [B, 32, 32, 3] -> a vector for each square of the grid, [B, 8, 8, CODE_DIM]."""
    x = jax.nn.relu(convolve(pictures, p["patch"], PATCH_PX)) @ p["down"]
    return residual_blocks(p["encoder"], x) @ p["to_code"]


def decode(p, vectors):
    """The vectors of codes, [B, 8, 8, CODE_DIM] -> pictures [B, 32, 32, 3]."""
    x = residual_blocks(p["decoder"], vectors @ p["from_code"])
    x = jax.nn.relu(x @ p["up"]) @ p["pixels"]
    x = x.reshape(-1, GRID, GRID, PATCH_PX, PATCH_PX, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, IMAGE_PX, IMAGE_PX, 3)


def nearest(vectors, codes):
    """Which of the codes [V, CODE_DIM] is nearest to each vector: [M, CODE_DIM] -> int [M]."""
    # The smallest |z - e|^2 has the largest z.e - |e|^2 / 2.
    return jnp.argmax(vectors @ codes.T - (codes**2).sum(axis=1)[None] / 2, axis=1)


def update_codebook(book, vectors, chosen, key, decay: float = 0.98, least: float = 0.02) -> dict:
    """Moves each code to the mean of the vectors [M, CODE_DIM] that have chosen it.

    The sum and the count behind that mean are moving averages over about fifty batches. A code
    that hardly any vector chooses would never move again, so it jumps to a random vector.
    """
    one_hot = jax.nn.one_hot(chosen, NUM_CODES)  # [M, V]
    count = decay * book["count"] + (1 - decay) * one_hot.sum(axis=0)[:, None]
    total = decay * book["sum"] + (1 - decay) * one_hot.T @ vectors
    fair_share = len(vectors) / NUM_CODES
    is_dead = count < least * fair_share
    random = vectors[jax.random.randint(key, (NUM_CODES,), 0, len(vectors))]
    count = jnp.where(is_dead, 5 * least * fair_share, count)
    total = jnp.where(is_dead, random * count, total)
    return {"codes": total / count, "count": count, "sum": total}


def codec_loss(p, book, batch, key):
    """The squared error of the pictures, plus that of the encoder's vectors from their codes."""
    (pictures,) = batch
    z = encode(p, pictures)
    vectors = z.reshape(-1, CODE_DIM)
    chosen = nearest(vectors, book["codes"])
    rounded = book["codes"][chosen].reshape(z.shape)
    # Rounding has no gradient. The decoder sees the rounded vectors, and the encoder receives the
    # decoder's gradient as if nothing had been rounded (the straight-through estimator).
    output = decode(p, z + jax.lax.stop_gradient(rounded - z))
    mse, commitment = jnp.mean((output - pictures) ** 2), jnp.mean((z - rounded) ** 2)
    used = jnp.sum(jnp.bincount(chosen, length=NUM_CODES) > 0)
    book = update_codebook(book, jax.lax.stop_gradient(vectors), chosen, key)
    return mse + 0.25 * commitment, (book, {"mse": mse, "codes used": used})


# ---- The transformer that DALL-E and CLIP share --------------------------------------------------
def init_transformer(rng, width: int, layers: int) -> list[dict]:
    """The four matrices of every layer."""
    gain = (2 * layers) ** -0.5  # each layer adds two outputs to x
    return [
        {
            "qkv": normal(rng, width, 3 * width),
            "out": normal(rng, width, width, gain=gain),
            "up": normal(rng, width, 4 * width),
            "down": normal(rng, 4 * width, width, gain=gain),
        }
        for _ in range(layers)
    ]


def norm(x):
    """Every vector of x scaled to a mean square of 1 (RMS norm, its gains left to what follows)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def transformer(layers, x, mask, caches=None, start=0):
    """x [B, T, D] -> [B, T, D], and the keys and values of every layer.

    Query t sees key s where mask [1, 1, T, S] is true. In training both are the positions of x. In
    sampling, x is the new positions, from `start` on, and `caches` has the keys and values of all.
    """
    updated = []
    for i, p in enumerate(layers):
        qkv = (norm(x) @ p["qkv"]).reshape(*x.shape[:2], 3, -1, HEAD_DIM)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # [B, H, T, HEAD_DIM] each
        if caches:
            k = jax.lax.dynamic_update_slice(caches[i][0], k, (0, 0, start, 0))
            v = jax.lax.dynamic_update_slice(caches[i][1], v, (0, 0, start, 0))
        updated.append((k, v))
        scores = jnp.where(mask, q @ k.swapaxes(2, 3) * HEAD_DIM**-0.5, -1e30)  # [B, H, T, S]
        x = x + (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(x.shape) @ p["out"]
        x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
    return norm(x), updated


# ---- 2. DALL-E: one stream of words and codes ----------------------------------------------------
def init_dalle(rng, num_words: int) -> dict:
    """Words and codes have their own vectors, their own positions and their own output heads."""
    return {
        # An empty slot is not masked: it has a learned vector, another one in each position.
        "words": normal(rng, num_words + TEXT_LEN, WIDTH, std=0.5),
        "word_positions": normal(rng, 1, TEXT_LEN, WIDTH, std=0.5),
        "codes": normal(rng, NUM_CODES, WIDTH, std=0.5),
        "rows": normal(rng, GRID, WIDTH, std=0.5),
        "columns": normal(rng, GRID, WIDTH, std=0.5),
        "layers": init_transformer(rng, WIDTH, LAYERS),
        # The heads start small: at first all words and all codes are about equally likely.
        "word_head": normal(rng, WIDTH, num_words, gain=0.2),
        "code_head": normal(rng, WIDTH, NUM_CODES, gain=0.2),
    }


def embed_text(p, text):
    """int [B, TEXT_LEN] -> [B, TEXT_LEN, D]."""
    empty = p["word_head"].shape[1] + jnp.arange(TEXT_LEN)[None]
    return p["words"][jnp.where(text == 0, empty, text)] + p["word_positions"]


def embed_codes(p, codes, positions):
    """int [B, n] at positions [n] of the grid, row by row -> [B, n, D]."""
    return p["codes"][codes] + (p["rows"][positions // GRID] + p["columns"][positions % GRID])[None]


def dalle_loss(p, state, batch, key):
    """The cross-entropy of every next word and code, weighed 1 to 7 as in the paper."""
    text, codes = batch
    stream = [embed_text(p, text), embed_codes(p, codes, jnp.arange(GRID * GRID))]
    x, _ = transformer(p["layers"], jnp.concatenate(stream, axis=1), CAUSAL)
    # Each position predicts the next one, so the last slot of the text predicts the first code.
    image_loss = cross_entropy(x[:, TEXT_LEN - 1 : -1] @ p["code_head"], codes).mean()
    text_loss = cross_entropy(x[:, : TEXT_LEN - 1] @ p["word_head"], text[:, 1:])
    text_loss = text_loss.mean(where=text[:, 1:] != 0)  # empty slots are not predicted
    metrics = {"nats per code": image_loss, "nats per word": text_loss}
    return text_loss / 8 + image_loss * 7 / 8, (state, metrics)


def choose(logits, key):
    """A random code for each row of [B, V], out of the likeliest that together reach TOP_P."""
    logits = logits / TEMPERATURE
    ordered = jnp.sort(logits, descending=True)
    probability = jax.nn.softmax(ordered)
    is_in = jnp.cumsum(probability, axis=1) - probability < TOP_P
    lowest = jnp.min(ordered, axis=1, keepdims=True, where=is_in, initial=jnp.inf)
    return jax.random.categorical(key, jnp.where(logits >= lowest, logits, -jnp.inf))


@jax.jit
def sample_codes(p, text, key):
    """Codes, int [B, 64], for captions [B, TEXT_LEN]."""
    empty = jnp.zeros((len(text), WIDTH // HEAD_DIM, LENGTH, HEAD_DIM))
    caches = [(empty, empty)] * LAYERS
    # The text is read once and leaves its keys and values in the caches. After that, each code
    # costs one position instead of the whole stream.
    x, caches = transformer(p["layers"], embed_text(p, text), CAUSAL[:, :, :TEXT_LEN], caches)

    def step(carry, position):
        x, caches = carry
        codes = choose(x[:, -1] @ p["code_head"], jax.random.fold_in(key, position))
        x, start = embed_codes(p, codes[:, None], position[None]), TEXT_LEN + position
        mask = jax.lax.dynamic_slice_in_dim(jnp.asarray(CAUSAL), start, 1, axis=2)
        return transformer(p["layers"], x, mask, caches, start), codes

    return jax.lax.scan(step, (x[:, -1:], caches), jnp.arange(GRID * GRID))[1].T


# ---- 3. CLIP (Radford et al. 2021, arXiv:2103.00020) ---------------------------------------------
def init_clip(rng, num_words: int) -> dict:
    """Two transformers into one space, and the temperature of the comparison there."""
    width, px = CLIP_WIDTH, CLIP_PATCH_PX

    def tower(inputs, length):
        positions, out = normal(rng, 1, length, width, std=0.1), normal(rng, width, CLIP_DIM)
        layers = init_transformer(rng, width, CLIP_LAYERS)
        return {"inputs": inputs, "positions": positions, "layers": layers, "out": out}

    return {
        "image": tower(normal(rng, px, px, 3, width), length=(IMAGE_PX // px) ** 2),
        "text": tower(normal(rng, num_words, width, std=0.1), length=TEXT_LEN),
        "log_scale": jnp.log(jnp.float32(1 / 0.07)),
    }


def similarity(p, pictures, text):
    """How well pictures [B, 32, 32, 3] fit captions [C, TEXT_LEN]: cosines [B, C]."""
    image, caption = p["image"], p["text"]
    x = convolve(pictures, image["inputs"], CLIP_PATCH_PX).reshape(len(pictures), -1, CLIP_WIDTH)
    x, _ = transformer(image["layers"], x + image["positions"], np.ones((1, 1, 1, 1), bool))
    x = x.mean(axis=1) @ image["out"]
    y, mask = caption["inputs"][text] + caption["positions"], CAUSAL[:, :, :TEXT_LEN, :TEXT_LEN]
    y, _ = transformer(caption["layers"], y, mask)
    # A caption is read at its last word, which has seen the others and no empty slot.
    y = y[jnp.arange(len(y)), jnp.sum(text != 0, axis=1) - 1] @ caption["out"]
    x, y = (vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (x, y))
    return x @ y.T


def clip_loss(p, state, batch, key):
    """Each picture has to find its caption in the batch, and each caption its picture."""
    text, pictures = batch
    logits = jnp.exp(p["log_scale"]) * similarity(p, pictures, text)  # right on the diagonal
    # A picture that has the same caption is no wrong answer, and is left out.
    same = (text[:, None] == text[None]).all(axis=2) & ~jnp.eye(len(text), dtype=bool)
    logits, own = jnp.where(same, -1e30, logits), jnp.arange(len(text))
    loss = (cross_entropy(logits, own).mean() + cross_entropy(logits.T, own).mean()) / 2
    return loss, (state, {"nats": loss, "right": jnp.mean(jnp.argmax(logits, axis=1) == own)})


# ---- One training loop for all three -------------------------------------------------------------
def train(name: str, loss, p, state, data, steps: int, batch: int, lr: float):
    """Trains p on random rows of the arrays in `data`, all but the last HELD_OUT.

    `loss(p, state, rows, key)` gives a scalar and (the next state, metrics); the state is what
    changes without a gradient, such as a codebook. Returns p, state and the held-out metrics.
    """
    schedule = optax.warmup_cosine_decay_schedule(lr / 100, lr, min(100, steps // 4), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))
    moments, rng, began = optimizer.init(p), np.random.default_rng(0), time.time()

    @jax.jit
    def update(p, state, moments, rows, step):
        key = jax.random.fold_in(jax.random.key(0), step)
        grads, (state, metrics) = jax.grad(loss, has_aux=True)(p, state, rows, key)
        updates, moments = optimizer.update(grads, moments, p)
        return optax.apply_updates(p, updates), state, moments, metrics

    for step in range(1, steps + 1):
        chosen = rng.integers(len(data[0]) - HELD_OUT, size=batch)
        rows = [array[chosen] for array in data]
        p, state, moments, metrics = update(p, state, moments, rows, step)
        if step % max(1, steps // 10) == 0:
            report = ", ".join(f"{float(x):.4g} {unit}" for unit, x in metrics.items())
            left = (time.time() - began) / step * (steps - step)
            print(f"{name} step {step} of {steps}: {report}, {left:.0f} s left", flush=True)
    rows = [array[-HELD_OUT:] for array in data]
    _, (_, metrics) = jax.jit(loss)(p, state, rows, jax.random.key(0))
    print(name, "on held-out scenes:", *(f"{float(x):.4g} {unit}" for unit, x in metrics.items()))
    return p, state, metrics


def main(argv: list[str] | None = None):
    """Trains the three networks, samples and ranks pictures, and writes them to one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a thirtieth of everything")
    parser.add_argument("--steps_scale", type=float, default=1.0, help="multiplies all steps")
    parser.add_argument("--out", default="dalle.png", help="the file of pictures")
    args = parser.parse_args(argv)
    width, height, line = BEST * 3 * (IMAGE_PX + 1), 3 * IMAGE_PX, 20
    sheet = Image.new("RGB", (width, len(PROMPTS) * (height + line)), "white")
    sheet.save(args.out)  # so that a wrong path is an error now, and not after the training
    shrink = 30 if args.smoke else 1
    codec_steps, dalle_steps, clip_steps = (round(args.steps_scale * n / shrink) for n in STEPS)
    rng = np.random.default_rng(0)
    pictures, captions = render_scenes(SCENES // shrink)
    vocabulary = ["", *sorted({word for caption in captions for word in caption.split()})]
    text, prompts = tokenize(captions, vocabulary), tokenize(PROMPTS, vocabulary)
    codec, book = init_codec(rng, pictures[:32])
    codec, book, _ = train("codec", codec_loss, codec, book, [pictures], codec_steps, 32, 2e-3)

    @jax.jit
    def to_codes(pictures):
        vectors = encode(codec, pictures).reshape(-1, CODE_DIM)
        return nearest(vectors, book["codes"]).reshape(len(pictures), -1)

    @jax.jit
    def to_pictures(codes):
        return decode(codec, book["codes"][codes].reshape(-1, GRID, GRID, CODE_DIM))

    # From here on a picture is its codes. CLIP sees decoded pictures, because it will rank those.
    chunks = len(text) // 512
    codes = np.concatenate([to_codes(x) for x in np.array_split(pictures, chunks)])
    decoded = np.concatenate([to_pictures(x) for x in np.array_split(codes, chunks)])
    dalle, clip = init_dalle(rng, len(vocabulary)), init_clip(rng, len(vocabulary))
    dalle, _, _ = train("DALL-E", dalle_loss, dalle, None, [text, codes], dalle_steps, 32, 3e-3)
    clip, _, _ = train("CLIP", clip_loss, clip, None, [text, decoded], clip_steps, 64, 2e-3)
    for i, prompt in enumerate(PROMPTS):
        text, top = np.repeat(prompts[i : i + 1], CANDIDATES, axis=0), i * (height + line)
        pictures = to_pictures(sample_codes(dalle, text, jax.random.key(i)))
        scores = similarity(clip, pictures, text[:1])[:, 0]
        best = np.pad(pictures[jnp.argsort(-scores)[:BEST]], [(0, 0), (0, 0), (0, 1), (0, 0)])
        row = np.uint8(np.clip(127.5 * np.concatenate(best, axis=1) + 128, 0, 255))
        ImageDraw.Draw(sheet).text((4, top + 2), prompt, "black")
        sheet.paste(Image.fromarray(row).resize((width, height), Image.NEAREST), (0, top + line))
    sheet.save(args.out)
    print(f"{args.out} shows the best {BEST} of {CANDIDATES} pictures for each caption.")


if __name__ == "__main__":
    main()
