"""dVAE (Ramesh et al. 2021, arXiv:2102.12092 §2.1) for small pictures: Gumbel-softmax codes.

Start it from a VQ-VAE of the same sizes:

    python -m dalle_jax train --config=configs/vqvae.py:size=shapes --workdir=runs/vqvae
    python -m dalle_jax train --config=configs/dvae.py:size=shapes \
        --config.init_from=runs/vqvae --workdir=runs/dvae

The VQ-VAE's nearest code is written exactly into the two 1x1 layers beside the relaxation, so step
0 has its pictures. Measured, shapes, from a VQ-VAE of 30.7 dB and code perplexity 115, one seed:

    kl_weight   steps   PSNR    codes used   perplexity
    0           400     30.2    392          75
    0.125       600     30.2    428          148

The Gumbel steps without a KL term lower the perplexity at equal quality, which makes the codes
easier for a transformer. The paper's term pulls each position towards the uniform distribution,
against a collapse that such a start does not have, and spreads the codes again: here it is 0.

Without a VQ-VAE, a small dVAE collapses to 3 to 20 codes in its first hundreds of steps, whatever
the temperature. `scratch` adds the remedy that needs none, an entropy bonus on the batch's mean
code distribution (185 of 256 codes in use in a prototype, but 3 dB behind at equal steps):

    python -m dalle_jax train --config=configs/dvae.py:size=shapes,scratch --workdir=runs/dvae

Sizes (`size=`): smoke (under a minute on a CPU, from scratch), demo and shapes (32 px, 8x8 codes of
512), emoji_demo and emoji (captioned emoji), pairs (your own pictures at 64 px, 16x16 codes of
1,024; not run to its end here). The paper's own model and schedules: configs/dvae_paper.py.
A kl_weight here is one against squared errors in [-1, 1]; the paper's 6.6 is one against
logit-Laplace.
"""

from dalle_jax import config as cfg

# px, width, codes, steps from a VQ-VAE, steps from scratch
_SIZES = {
    "smoke": (32, 48, 128, 200, 300),
    "demo": (32, 96, 512, 150, 1200),
    "shapes": (32, 96, 512, 400, 2200),
    "emoji_demo": (32, 96, 512, 200, 1200),
    "emoji": (32, 96, 512, 300, 6000),
    "pairs": (64, 128, 1024, 1000, 20_000),
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A dVAE of the given size; `px` and `steps` change it, 0 keeps its own."""
    args = cfg.parse_args(arg, size="shapes", px=0, steps=0, scratch=False)
    if args.size not in _SIZES:
        raise cfg.UsageError(f"size={args.size!r} is unknown; use one of {', '.join(_SIZES)}.")
    px, width, num_codes, *steps = _SIZES[args.size]
    scratch = args.scratch or args.size == "smoke"
    steps = args.steps or steps[scratch]
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "autoencode"

    c.data.image_px = args.px or px
    c.model = cfg.ConfigDict(
        dict(
            kind="dvae",
            trunk="patch",
            halvings=2,
            width=width,
            num_blocks=2,
            use_remat=False,
            num_codes=num_codes,
            n_init=0,
            likelihood="mse",
            kl_weight=0.0,
            kl_steps=0,
            temperature_start=1.0 if scratch else 0.5,
            temperature_end=1 / 16,
            temperature_steps=steps * 4 // 5,
            entropy_bonus=0.0125 if scratch else 0.0,
        )
    )

    c.optim.lr = 1e-3
    c.optim.warmup_steps = 20
    c.optim.ema_decay = 0.99 if scratch else 0.98  # an average of the last 50 to 100 steps
    c.train.steps = steps
    c.train.eval_every_steps = c.train.preview_every_steps = max(100, steps // 5)

    if args.size == "smoke":
        c.data.batch, c.data.eval_batch = 16, 32
        c.train.save_every_steps = 100
    if args.size in ("emoji_demo", "emoji"):
        c.data.source = "emoji"
    if args.size == "pairs":
        c.data.source, c.data.crop = "pairs", "dvae"  # --config.data.source=your set's name
    return c


def get_hyper() -> list[dict]:
    """KL weight against the temperature at which a run from a VQ-VAE starts."""
    return cfg.product(
        cfg.sweep("model.kl_weight", [0.0, 0.05, 0.125]),
        cfg.sweep("model.temperature_start", [0.25, 0.5]),
    )
