"""unCLIP's upsamplers (Ramesh et al. 2022, arXiv:2204.06125 §2.2, table 3), large and small.

    python -m dalle_jax train --config=configs/upsampler.py:size=shapes64 --workdir=runs/up1

Sizes (`size=`):

    smoke      16 to 32 px, a minute on a CPU
    demo       32 to 64 px generated scenes, minutes on one core
    shapes64   32 to 64 px, the small twin of paper256; trained here for 2,000 steps
    shapes128  64 to 128 px, the small twin of paper1024; trained here for 2,000 steps
    emoji256   64 to 256 px; not trained here
    paper256   64 to 256 px, 729.7 million parameters; 1,000,000 updates at batch 1024; not run here
    paper1024  256 to 1024 px, 282.1 million parameters; 1,000,000 updates at batch 512; not run
               here

`width=`, `patch=` and `steps=` change a size; 0 keeps its own value. docs/pretrained.md has the
results of shapes64 and shapes128. The paper's learning rates are constant, because it names no
schedule; warm-up and clipping are ours.

An upsampler trains on crops and is applied to whole pictures. `prepare shapes --image_px=64` writes
a set of the larger size. DDIM samples in 27 steps (fast27) and 15, as in the paper.
"""

from dalle_jax import config as cfg

# Objective and network of the small sizes but smoke, which has the paper's objective.
SHORT = {
    "data.batch": 16,
    "model.num_blocks": 1,
    "model.predicts": "x_0",
    "loss.snr_cap": 5.0,
}
SHAPES64 = {
    **SHORT,
    "data.image_px": 64,
    "model.width": 32,
    "model.channel_mults": (1, 2),
    "model.patch_px": 2,
    "loss.low_res_px": 32,
    "loss.corruption": "blur",
    "loss.crop": 0.5,
    "train.steps": 2500,
}
PAPER = {
    "dtype.compute": "bfloat16",
    "data.source": "pairs",
    "data.crop": "clip",
    "model.patch_px": 1,
    "model.remat": "full",
    "loss.crop": 0.25,
    "optim.schedule": "constant",
    "optim.warmup_steps": 5000,
    "optim.beta2": 0.999,
    "optim.eps": 1e-8,
    "optim.ema_decay": 0.9999,
    "train.steps": 1_000_000,
    "train.log_every_steps": 100,
    "train.eval_every_steps": 10_000,
    "train.save_every_steps": 2000,
    "train.preview_every_steps": 10_000,
    "mesh.fsdp": 8,
    "mesh.rules": "fsdp",
}

SIZES = {
    "smoke": {
        "data.image_px": 32,
        "data.batch": 16,
        "data.eval_batch": 16,
        "model.width": 16,
        "model.channel_mults": (1, 2),
        "model.num_blocks": 1,
        "model.patch_px": 4,
        "loss.low_res_px": 16,
        "loss.corruption": "bsr",
        "loss.crop": 0.5,
        "loss.preview_spacing": "5",
        "optim.warmup_steps": 10,
        "optim.ema_decay": 0.9,
        "train.steps": 60,
        "train.log_every_steps": 10,
        "train.save_every_steps": 30,
    },
    "demo": {**SHAPES64, "train.steps": 800, "train.preview_every_steps": 0},
    "shapes64": SHAPES64,
    "shapes128": {
        **SHORT,
        "data.image_px": 128,
        "data.eval_batch": 16,  # whole pictures: each is 16 crops
        "model.width": 32,
        "model.channel_mults": (1, 2),
        "model.patch_px": 2,
        "loss.schedule": "linear",
        "loss.low_res_px": 64,
        "loss.corruption": "bsr",
        "loss.crop": 0.25,
        "train.steps": 2500,
    },
    "emoji256": {
        **SHORT,
        "data.source": "emoji",
        "data.image_px": 256,
        "data.eval_batch": 16,  # whole pictures: each is 16 crops
        "model.width": 64,
        "model.channel_mults": (1, 2, 2),
        "model.patch_px": 4,
        "loss.low_res_px": 64,
        "loss.corruption": "blur",
        "loss.crop": 0.25,
        "loss.preview_spacing": "fast27",
        "train.steps": 3000,
    },
    "paper256": {
        **PAPER,
        "data.image_px": 256,
        "data.batch": 1024,
        "data.eval_batch": 1024,
        "model.width": 320,
        "model.channel_mults": (1, 2, 3, 4),
        "model.num_blocks": 3,
        "model.dropout": 0.1,
        "loss.low_res_px": 64,
        "loss.corruption": "blur",
        "loss.preview_spacing": "fast27",
        "optim.lr": 1.2e-4,
    },
    "paper1024": {
        **PAPER,
        "data.image_px": 1024,
        "data.batch": 512,
        "data.eval_batch": 512,
        "model.width": 192,
        "model.channel_mults": (1, 1, 2, 2, 4, 4),
        "model.num_blocks": 2,
        "loss.schedule": "linear",
        "loss.low_res_px": 256,
        "loss.corruption": "bsr",
        "optim.lr": 1e-4,
    },
}

# What follows from the number of steps, where a size does not set it.
DERIVED = {
    "train.eval_every_steps": lambda c: max(1, c.train.steps // 4),
    "train.preview_every_steps": lambda c: max(1, c.train.steps // 4),
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """An upsampler of the given size; `width`, `patch` and `steps` change it, 0 keeps its own."""
    args = cfg.parse_args(arg, size="shapes64", width=0, patch=0, steps=0)
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "diffusion"

    c.data.eval_batch = 64
    c.model = cfg.ConfigDict(
        dict(
            width=0,
            channel_mults=(),
            num_blocks=0,
            attention_px=(),  # none: whole pictures are larger than the crops it learns from
            head_width=64,
            dropout=0.0,
            patch_px=0,
            predicts="eps",
            learned_variance=False,
            text_width=0,
            text_layers=0,
            text_heads=1,
            clip_tokens=4,
            scan_layers=False,
            remat="none",
        )
    )
    c.loss = cfg.ConfigDict(
        dict(
            schedule="cosine",
            num_steps=1000,
            clip_drop=0.0,
            text_drop=0.0,
            snr_cap=0.0,  # cap on the steps' weights, `gaussian.capped_weight`; 0 = none, the paper
            time_power=1.0,  # steps T u^p, u uniform; 1 = the paper, 0.5 = noisy ones more often
            inpaint=False,  # the network also sees the known part of a picture
            low_res_px=0,  # side of the smaller picture
            corruption="none",  # none | blur | bsr, see diffusion/corrupt.py
            crop=1.0,  # share of the side that a training crop has
            preview_spacing="15",
            preview_guidance=1.0,
        )
    )

    c.optim.lr = 1e-3
    c.optim.weight_decay = 0.0

    changes = cfg.size_overrides(
        args, SIZES, width="model.width", patch="model.patch_px", steps="train.steps"
    )
    cfg.apply(c, DERIVED, changes)
    return c
