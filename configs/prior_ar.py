"""The autoregressive prior of DALL-E 2 (Ramesh et al. 2022, arXiv:2204.06125, §2.2, appendix C).

    python -m dalle_jax pca --clip=runs/clip --out=runs/pca.npz
    python -m dalle_jax train --config=configs/prior_ar.py:size=shapes \
        --config.stages.clip=runs/clip --config.stages.pca=runs/pca.npz --workdir=runs/prior_ar

The sizes (`size=`) are those of configs/prior_diffusion.py with the changes below. The paper's has
24 layers of width 1664 with 26 heads and predicts 319 dimensions in 1,024 buckets each: 0.80
billion parameters in the blocks; not run here. `steps=` changes a size; 0 keeps its own value.
"""

from dalle_jax import config as cfg

LARGE = {
    "optim.lr": 1.6e-4,
    "optim.beta2": 0.91,
    "optim.eps": 1e-10,
    "optim.ema_decay": 0.999,
}

# What each size changes in the diffusion prior of that size.
SIZES = {
    "smoke": {"data.batch": 32, "train.steps": 60},
    "demo": {"data.batch": 64, "train.steps": 2000},
    "shapes": {"data.batch": 64, "train.steps": 6000},
    "emoji": {"data.batch": 64, "train.steps": 6000},
    "single_gpu": {**LARGE, "data.batch": 512, "train.steps": 200_000},
    "paper": {
        **LARGE,
        "data.batch": 4096,
        "model.width": 1664,
        "model.num_heads": 26,
        "model.num_dims": 319,
        "model.num_buckets": 1024,
        "train.steps": 1_000_000,
    },
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """An autoregressive prior of the given size; `steps` changes it, 0 keeps its own value."""
    args = cfg.parse_args(arg, size="shapes", steps=0)
    changes = cfg.size_overrides(args, SIZES, steps="train.steps")
    c = cfg.sibling(__file__, "prior_diffusion").get_config(f"size={args.size}")

    c.model.kind = "ar"
    c.model.num_dims = 0  # leading components that the prior samples; 0 = all that the PCA keeps
    c.model.num_buckets = 0  # 0 = the PCA's
    for field in ("schedule", "num_steps"):
        del c.model[field]
    c.stages.pca = ""  # file written by `python -m dalle_jax pca`: required
    del c.loss.eval_steps
    c.optim.weight_decay = 4.0e-2

    cfg.apply(c, changes)
    return c
