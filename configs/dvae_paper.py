"""The dVAE of DALL·E (Ramesh et al. 2021, arXiv:2102.12092 §2.1, App. A): 256 px, 32x32 of 8192.

    python -m dalle_jax train --config=configs/dvae_paper.py --workdir=runs/dvae_paper \
        --config.data.source=YOUR_SET

The released model has 53,786,240 parameters in the encoder and 43,829,766 in the decoder. The paper
trained it for 3,000,000 updates with 512 pictures each, on 64 V100 with 16 GB, in float16; it was
not run here. This config computes in bfloat16, so there is no loss scaling. A dry run shows the
model without a machine of that size:

    python -m dalle_jax train --config=configs/dvae_paper.py --workdir=runs/dvae_paper --dry_run

`size=smoke` is the same network and objective in miniature and takes a minute on a CPU. It shows
that every part runs, not that 40 steps with logit-Laplace learn to reconstruct anything.
"""

from dalle_jax import config as cfg

SIZES = {
    "paper": {
        "dtype.compute": "bfloat16",
        "data.image_px": 256,
        "data.batch": 512,
        "data.eval_batch": 512,
        "data.crop": "dvae",  # Listing 1
        "model.width": 256,
        "model.num_codes": 8192,
        "model.n_init": 128,
        "model.kl_steps": 5000,
        "model.temperature_steps": 150_000,
        "optim.lr": 1e-4,
        "train.steps": 3_000_000,
        "train.log_every_steps": 100,
        "train.eval_every_steps": 5000,
        "train.save_every_steps": 5000,
        "train.preview_every_steps": 5000,
    },
    "smoke": {
        "data.image_px": 32,
        "data.batch": 8,
        "data.eval_batch": 16,
        "model.width": 16,
        "model.num_codes": 64,
        "model.n_init": 32,
        "model.kl_steps": 10,
        "model.temperature_steps": 30,
        "optim.lr": 1e-3,
        "train.steps": 40,
        "train.log_every_steps": 10,
        "train.eval_every_steps": 20,
        "train.save_every_steps": 20,
        "train.preview_every_steps": 20,
    },
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """The paper's numbers, or the same in miniature."""
    args = cfg.parse_args(arg, size="paper")
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "autoencode"

    c.model = cfg.ConfigDict(
        dict(
            kind="dvae",
            trunk="pyramid",
            halvings=3,  # four groups: 256, 512, 1024, 2048 wide
            width=0,
            num_blocks=2,
            use_remat=False,  # 8 pictures fit into 16 GB without
            num_codes=0,
            n_init=0,
            likelihood="logit_laplace",
            kl_weight=6.6,
            kl_steps=0,
            temperature_start=1.0,
            temperature_end=1 / 16,
            temperature_steps=0,
            entropy_bonus=0.0,
        )
    )

    # The paper's rate ends at 1.25e-6.
    c.optim.end_lr_ratio = 0.0125
    c.optim.decay_steps = 1_200_000
    c.optim.warmup_steps = 0
    c.optim.beta2 = 0.999
    c.optim.clip_norm = 0.0
    c.optim.ema_decay = 0.999

    cfg.apply(c, cfg.size_overrides(args, SIZES))
    return c
