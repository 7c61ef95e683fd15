"""The autoregressive prior of DALL-E 2 (Ramesh et al. 2022, arXiv:2204.06125, §2.2, appendix C).

    python -m dalle_jax pca --clip=runs/clip --out=runs/pca.npz
    python -m dalle_jax train --config=configs/prior_ar.py:size=shapes \
        --config.stages.clip=runs/clip --config.stages.pca=runs/pca.npz --workdir=runs/prior_ar

Sizes (`size=`) as in configs/prior_diffusion.py; paper: 24 layers of 1664, 26 heads, 319 dimensions
of 1,024 buckets (0.80 billion parameters in the blocks; not run here).
"""

from dalle_jax import config as cfg

# What differs from the diffusion prior: batch, steps.
_SIZES = {
    "smoke": (32, 60),
    "demo": (64, 2000),
    "shapes": (64, 6000),
    "emoji": (64, 6000),
    "single_gpu": (512, 200_000),
    "paper": (4096, 1_000_000),
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """An autoregressive prior of the given size."""
    args = cfg.parse_args(arg, size="shapes", steps=0)
    if args.size not in _SIZES:
        raise cfg.UsageError(f"size={args.size!r} is unknown; use one of {', '.join(_SIZES)}.")
    c = cfg.sibling(__file__, "prior_diffusion").get_config(f"size={args.size}")
    c.data.batch, steps = _SIZES[args.size]
    c.train.steps = args.steps or steps

    c.stages.pca = ""  # of `python -m dalle_jax pca`: required
    c.model.kind = "ar"
    c.model.num_dims = 0  # leading components that are drawn; 0 = as many as the PCA keeps
    c.model.num_buckets = 0  # 0 = the PCA's
    for field in ("schedule", "num_steps"):
        del c.model[field]
    del c.loss.eval_steps

    c.optim.weight_decay = 4.0e-2
    if args.size in ("single_gpu", "paper"):
        c.optim.lr, c.optim.beta2, c.optim.eps = 1.6e-4, 0.91, 1e-10
        c.optim.ema_decay = 0.999
    if args.size == "paper":
        c.model.width, c.model.num_heads = 1664, 26
        c.model.num_dims, c.model.num_buckets = 319, 1024
    return c
