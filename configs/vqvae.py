"""VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937): the tokenizer that trains in minutes.

    python -m dalle_jax train --config=configs/vqvae.py:size=shapes --workdir=runs/vqvae

Sizes (`size=`):

    smoke             under a minute on a CPU
    demo, shapes      32 px generated scenes, 8x8 codes of 512; they train for 2 and 12 minutes
    emoji_demo, emoji captioned emoji; they train for 2 and 6 minutes
    pairs             your own pictures at 64 px, 16x16 codes of 1,024; not run to its end here
    paper             the ImageNet-128 model, 32x32 codes of 512; not run here

`px=` and `steps=` change a size; 0 keeps its own value.

Measured with shapes at batch 32: a step takes 110 to 150 ms on one busy CPU core (90 ms of
processor time). With `steps=6500`, the PSNR of hard codes on unseen scenes is 26.8 dB after 1,000
steps (423 codes in use, perplexity 103) and 30.7 dB at the end (440 codes, perplexity 115). A
prototype of the same size reached 27.9 dB in 2,200 steps; captions could be read off 81 % of its
reconstructions.

Three choices prevent dead codes: the first batch initialises the codebook, moving averages replace
gradients, and unused codes are revived until four fifths of the run. The loss is the squared error,
because the absolute error and logit-Laplace learn the background first (it is a median) and small
shapes last. A dVAE that starts from this run has exactly its codes: configs/dvae.py.
"""

from dalle_jax import config as cfg

SHAPES = {
    "data.image_px": 32,
    "model.width": 96,
    "model.num_codes": 512,
    "model.code_dim": 32,
    "train.steps": 6500,
}
EMOJI = {**SHAPES, "data.source": "emoji", "train.steps": 3000}

SIZES = {
    "smoke": {
        "data.image_px": 32,
        "data.batch": 16,
        "data.eval_batch": 32,
        "model.width": 48,
        "model.num_codes": 128,
        "model.code_dim": 16,
        "train.steps": 300,
        "train.save_every_steps": 100,
    },
    "demo": {**SHAPES, "train.steps": 1100},
    "shapes": SHAPES,
    "emoji_demo": {**EMOJI, "train.steps": 1200},
    "emoji": EMOJI,
    "pairs": {
        "data.source": "pairs",  # your set's name: --config.data.source=NAME
        "data.image_px": 64,
        "data.crop": "dvae",
        "model.width": 128,
        "model.num_codes": 1024,
        "model.code_dim": 32,
        "train.steps": 20_000,
    },
    "paper": {
        "data.image_px": 128,
        "data.batch": 128,
        "data.crop": "dvae",
        "model.width": 256,
        "model.num_codes": 512,
        "model.code_dim": 64,
        "model.ema_decay": 0.99,
        "model.revive_share": 0.0,  # the paper revives no codes
        "optim.lr": 2e-4,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "optim.beta2": 0.999,
        "optim.weight_decay": 0.0,
        "optim.clip_norm": 0.0,
        "train.steps": 250_000,
        "train.save_every_steps": 5000,
    },
}

# What follows from the number of steps.
DERIVED = {
    "model.revive_steps": lambda c: c.train.steps * 4 // 5,
    "train.eval_every_steps": lambda c: max(100, c.train.steps // 5),
    "train.preview_every_steps": lambda c: max(100, c.train.steps // 5),
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A VQ-VAE of the given size; `px` and `steps` change it, 0 keeps its own value."""
    args = cfg.parse_args(arg, size="shapes", px=0, steps=0)
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "autoencode"

    c.model = cfg.ConfigDict(
        dict(
            kind="vqvae",
            trunk="patch",  # or pyramid, the released dVAE's
            halvings=2,
            width=0,
            num_blocks=2,
            use_remat=False,
            num_codes=0,
            code_dim=0,
            n_init=0,
            commitment=0.25,
            codebook="ema",
            # The paper's 0.99 is for ten times as many steps.
            ema_decay=0.98,
            revive_share=0.02,
            revive_steps=0,
        )
    )

    c.optim.lr = 2e-3
    c.optim.warmup_steps = 50
    # The codebook follows the encoder's outputs over the last fifty steps; averaged weights would
    # be another encoder than the one whose outputs it holds.
    c.optim.ema_decay = 0.0

    changes = cfg.size_overrides(args, SIZES, px="data.image_px", steps="train.steps")
    cfg.apply(c, DERIVED, changes)
    return c


def get_hyper() -> list[dict]:
    """Codebook size against width, at equal steps."""
    return cfg.product(
        cfg.sweep("model.num_codes", [256, 512, 1024]), cfg.sweep("model.width", [64, 96])
    )
