"""VQ-VAE: the tokenizer that trains in minutes (van den Oord et al. 2017, arXiv:1711.00937).

  python -m dalle_jax train --config=configs/vqvae.py:size=shapes --workdir=runs/vqvae

Sizes: `smoke`, `shapes` (32 px, 8 x 8 codes of 512), `emoji` (64 px, 16 x 16 codes of 1024).
"""

from dalle_jax import config as cfg

base = cfg.sibling(__file__, "base")


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """See the module's docstring."""
    args = cfg.parse_args(arg, size="shapes")
    c = base.get_config()
    c.task = "autoencode"
    c.model = cfg.ConfigDict(
        dict(
            kind="vqvae",
            trunk="patch",
            halvings=2,
            width=96,
            num_blocks=2,
            use_remat=False,
            num_codes=512,
            code_dim=32,
            n_init=0,
            commitment=0.25,
            codebook="ema",
            ema_decay=0.98,
            revive_share=0.02,
            revive_steps=1760,
        )
    )
    c.optim.lr = 2e-3
    c.optim.warmup_steps = 50
    # The codebook follows the weights of the last hundred steps; averaged weights lag behind it.
    c.optim.ema_decay = 0.0
    c.train.steps = 2200
    c.train.eval_every_steps = 500
    if args.size == "smoke":
        c.data.batch = 16
        c.model.width = 48
        c.model.num_codes = 128
        c.train.steps = 300
    return c
