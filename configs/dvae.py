"""dVAE (Ramesh et al. 2021, arXiv:2102.12092 §2.1) for small pictures: Gumbel-softmax codes.

Start it from a VQ-VAE of the same sizes:

    python -m dalle_jax train --config=configs/vqvae.py:size=shapes --workdir=runs/vqvae
    python -m dalle_jax train --config=configs/dvae.py:size=shapes \
        --config.init_from=runs/vqvae --workdir=runs/dvae

The VQ-VAE's nearest code is written exactly into the two 1x1 layers beside the relaxation, so that
step 0 reproduces its pictures. Measured with shapes and one seed, from a VQ-VAE with 30.7 dB and
code perplexity 115:

    kl_weight   steps   PSNR    codes used   perplexity
    0           400     30.2    392          75
    0.125       600     30.2    428          148

The Gumbel steps without a KL term lower the perplexity at equal quality, which makes the codes
easier for a transformer. The paper's term pulls each position towards the uniform distribution. It
prevents a collapse that such a start does not have, and it spreads the codes again: here its weight
is 0.

Without a VQ-VAE, a small dVAE collapses to 3 to 20 codes in its first hundreds of steps, whatever
the temperature. `scratch` adds a remedy that needs no VQ-VAE, an entropy bonus on the batch's mean
code distribution. In a prototype, 185 of 256 codes were in use, but it was 3 dB behind at equal
steps:

    python -m dalle_jax train --config=configs/dvae.py:size=shapes,scratch --workdir=runs/dvae

Sizes (`size=`):

    smoke             under a minute on a CPU, from scratch
    demo, shapes      32 px generated scenes, 8x8 codes of 512
    emoji_demo, emoji captioned emoji
    pairs             your own pictures at 64 px, 16x16 codes of 1,024; not run to its end here

`px=` and `steps=` change a size; 0 keeps its own value. The paper's own model and schedules are
configs/dvae_paper.py. A kl_weight here is relative to squared errors in [-1, 1]; the paper's 6.6 is
relative to logit-Laplace.
"""

from dalle_jax import config as cfg

SCRATCH = {
    "model.temperature_start": 1.0,
    "model.entropy_bonus": 0.0125,
    "optim.ema_decay": 0.99,
}
SHAPES = {
    "data.image_px": 32,
    "model.width": 96,
    "model.num_codes": 512,
    "train.steps": 400,
}
EMOJI = {**SHAPES, "data.source": "emoji", "train.steps": 300}

SIZES = {
    "smoke": {
        **SCRATCH,
        "data.image_px": 32,
        "data.batch": 16,
        "data.eval_batch": 32,
        "model.width": 48,
        "model.num_codes": 128,
        "train.steps": 300,
        "train.save_every_steps": 100,
    },
    "demo": {**SHAPES, "train.steps": 150},
    "shapes": SHAPES,
    "emoji_demo": {**EMOJI, "train.steps": 200},
    "emoji": EMOJI,
    "pairs": {
        "data.source": "pairs",  # your set's name: --config.data.source=NAME
        "data.image_px": 64,
        "data.crop": "dvae",
        "model.width": 128,
        "model.num_codes": 1024,
        "train.steps": 1000,
    },
}
# The sizes with `scratch`.
FROM_SCRATCH = {
    "smoke": SIZES["smoke"],
    "demo": {**SIZES["demo"], **SCRATCH, "train.steps": 1200},
    "shapes": {**SIZES["shapes"], **SCRATCH, "train.steps": 2200},
    "emoji_demo": {**SIZES["emoji_demo"], **SCRATCH, "train.steps": 1200},
    "emoji": {**SIZES["emoji"], **SCRATCH, "train.steps": 6000},
    "pairs": {**SIZES["pairs"], **SCRATCH, "train.steps": 20_000},
}

# What follows from the number of steps.
DERIVED = {
    "model.temperature_steps": lambda c: c.train.steps * 4 // 5,
    "train.eval_every_steps": lambda c: max(100, c.train.steps // 5),
    "train.preview_every_steps": lambda c: max(100, c.train.steps // 5),
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A dVAE of the given size; `px` and `steps` change it, 0 keeps its own value."""
    args = cfg.parse_args(arg, size="shapes", px=0, steps=0, scratch=False)
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "autoencode"

    c.model = cfg.ConfigDict(
        dict(
            kind="dvae",
            trunk="patch",
            halvings=2,
            width=0,
            num_blocks=2,
            use_remat=False,
            num_codes=0,
            n_init=0,
            likelihood="mse",
            kl_weight=0.0,
            kl_steps=0,
            temperature_start=0.5,
            temperature_end=1 / 16,
            temperature_steps=0,
            entropy_bonus=0.0,
        )
    )

    c.optim.lr = 1e-3
    c.optim.warmup_steps = 20
    c.optim.ema_decay = 0.98  # an average over the last 50 steps; from scratch, 100

    sizes = FROM_SCRATCH if args.scratch else SIZES
    changes = cfg.size_overrides(args, sizes, px="data.image_px", steps="train.steps")
    cfg.apply(c, DERIVED, changes)
    return c


def get_hyper() -> list[dict]:
    """KL weight against the temperature at which a run from a VQ-VAE starts."""
    return cfg.product(
        cfg.sweep("model.kl_weight", [0.0, 0.05, 0.125]),
        cfg.sweep("model.temperature_start", [0.25, 0.5]),
    )
