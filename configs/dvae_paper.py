"""The dVAE of DALL·E (Ramesh et al. 2021, arXiv:2102.12092 §2.1, App. A): 256 px, 32x32 of 8192.

    python -m dalle_jax train --config=configs/dvae_paper.py --workdir=runs/dvae_paper \
        --config.data.source=YOUR_SET

Released model: 53,786,240 parameters in the encoder, 43,829,766 in the decoder. The paper trained
it for 3,000,000 updates of 512 pictures on 64 V100 of 16 GB, in float16; not run here. bfloat16
here, so there is no loss scaling. Look at it without a machine of that size:

    python -m dalle_jax train --config=configs/dvae_paper.py --workdir=runs/dvae_paper --dry_run

`size=smoke` is the same network and objective in miniature, a minute on a CPU: it shows that every
part runs, not that 40 steps of logit-Laplace draw anything.
"""

from dalle_jax import config as cfg


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """The paper's numbers, or the same in miniature."""
    args = cfg.parse_args(arg, size="paper")
    if args.size not in ("paper", "smoke"):
        raise cfg.UsageError(f"size={args.size!r} is unknown; use paper or smoke.")
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "autoencode"
    c.dtype.compute = "bfloat16"

    c.data.image_px = 256
    c.data.batch, c.data.eval_batch = 512, 512
    c.data.crop = "dvae"  # Listing 1
    c.model = cfg.ConfigDict(
        dict(
            kind="dvae",
            trunk="pyramid",
            halvings=3,  # four groups: 256, 512, 1024, 2048 wide
            width=256,
            num_blocks=2,
            use_remat=False,  # 8 pictures fit into 16 GB without
            num_codes=8192,
            n_init=128,
            likelihood="logit_laplace",
            kl_weight=6.6,
            kl_steps=5000,
            temperature_start=1.0,
            temperature_end=1 / 16,
            temperature_steps=150_000,
            entropy_bonus=0.0,
        )
    )

    c.optim.lr = 1e-4
    c.optim.end_lr_ratio = 0.0125  # 1.25e-6
    c.optim.decay_steps = 1_200_000
    c.optim.warmup_steps = 0
    c.optim.beta2 = 0.999
    c.optim.clip_norm = 0.0
    c.optim.ema_decay = 0.999
    c.train.steps = 3_000_000
    c.train.log_every_steps = 100
    c.train.eval_every_steps = c.train.preview_every_steps = 5000
    c.train.save_every_steps = 5000

    if args.size == "smoke":
        c.dtype.compute = "float32"
        c.data.image_px, c.data.batch, c.data.eval_batch, c.data.crop = 32, 8, 16, "none"
        c.model.width, c.model.num_codes, c.model.n_init = 16, 64, 32
        c.model.kl_steps, c.model.temperature_steps = 10, 30
        c.optim.lr = 1e-3
        c.train.steps, c.train.log_every_steps = 40, 10
        c.train.eval_every_steps = c.train.preview_every_steps = c.train.save_every_steps = 20
    return c
