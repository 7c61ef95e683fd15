"""VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937): the tokenizer that trains in minutes.

    python -m dalle_jax train --config=configs/vqvae.py:size=shapes --workdir=runs/vqvae

Sizes (`size=`): smoke (under a minute on a CPU), demo and shapes (32 px generated scenes, 8x8 codes
of 512, for 2 and 12 minutes), emoji_demo and emoji (captioned emoji, for 2 and 6 minutes), pairs
(your own pictures at 64 px, 16x16 codes of 1,024; not run to its end here), paper (the ImageNet-128
model: 32x32 codes of 512; not run here).

Measured, shapes, batch 32: 110 to 150 ms a step on one busy CPU core (90 ms of processor time).
PSNR of hard codes on unseen scenes with `steps=6500`: 26.8 dB after 1,000 steps (423 codes in use,
perplexity 103), 30.7 dB at the end (440 codes, perplexity 115). A prototype of the same size
reached 27.9 dB in 2,200 steps, where captions could be read off 81 % of the reconstructions.

What matters here, all against dead codes: codes drawn from the first batch, moving averages
instead of gradients, and revival until four fifths of the run. Squared error, because absolute
error and logit-Laplace first learn the background (a median) and draw small shapes last. A dVAE
that starts from this run keeps its codes exactly: configs/dvae.py.
"""

from dalle_jax import config as cfg

# px, width, codes, code_dim, steps
_SIZES = {
    "smoke": (32, 48, 128, 16, 300),
    "demo": (32, 96, 512, 32, 1100),
    "shapes": (32, 96, 512, 32, 6500),
    "emoji_demo": (32, 96, 512, 32, 1200),
    "emoji": (32, 96, 512, 32, 3000),
    "pairs": (64, 128, 1024, 32, 20_000),
    "paper": (128, 256, 512, 64, 250_000),
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A VQ-VAE of the given size; `px` and `steps` change it, 0 keeps its own."""
    args = cfg.parse_args(arg, size="shapes", px=0, steps=0)
    if args.size not in _SIZES:
        raise cfg.UsageError(f"size={args.size!r} is unknown; use one of {', '.join(_SIZES)}.")
    px, width, num_codes, code_dim, steps = _SIZES[args.size]
    steps = args.steps or steps
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "autoencode"

    c.data.image_px = args.px or px
    c.model = cfg.ConfigDict(
        dict(
            kind="vqvae",
            trunk="patch",  # or pyramid, the released dVAE's
            halvings=2,
            width=width,
            num_blocks=2,
            use_remat=False,
            num_codes=num_codes,
            code_dim=code_dim,
            n_init=0,
            commitment=0.25,
            codebook="ema",
            ema_decay=0.98,  # paper 0.99: ten times more steps
            revive_share=0.02,
            revive_steps=steps * 4 // 5,
        )
    )

    c.optim.lr = 2e-3
    c.optim.warmup_steps = 50
    # The codebook follows the encoder of the last fifty steps; averaged weights would be another
    # encoder than the one whose outputs it holds.
    c.optim.ema_decay = 0.0
    c.train.steps = steps
    c.train.eval_every_steps = c.train.preview_every_steps = max(100, steps // 5)

    if args.size == "smoke":
        c.data.batch, c.data.eval_batch = 16, 32
        c.train.save_every_steps = 100
    if args.size in ("emoji_demo", "emoji"):
        c.data.source = "emoji"
    if args.size == "pairs":
        c.data.source, c.data.crop = "pairs", "dvae"  # --config.data.source=your set's name
    if args.size == "paper":
        c.data.batch, c.data.crop = 128, "dvae"
        c.model.ema_decay, c.model.revive_share = 0.99, 0.0  # no revival in the paper
        c.optim.lr, c.optim.schedule, c.optim.warmup_steps = 2e-4, "constant", 0
        c.optim.beta2, c.optim.weight_decay, c.optim.clip_norm = 0.999, 0.0, 0.0
        c.train.save_every_steps = 5000
    return c


def get_hyper() -> list[dict]:
    """Codebook size against width, at equal steps."""
    return cfg.product(
        cfg.sweep("model.num_codes", [256, 512, 1024]), cfg.sweep("model.width", [64, 96])
    )
