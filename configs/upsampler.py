"""unCLIP's upsamplers (Ramesh et al. 2022, arXiv:2204.06125 §2.2, table 3): the paper's sizes, and
some that one machine trains.

    python -m dalle_jax train --config=configs/upsampler.py:size=shapes64 --workdir=runs/up1

Sizes (`size=`): smoke (16 to 32 px, a minute on a CPU), demo (32 to 64 px generated scenes, minutes
of one core), shapes64 (32 to 64 px) and shapes128 (64 to 128 px), the small twins of paper256 (64
to 256 px, 729.7 million parameters) and paper1024 (256 to 1024 px, 282.1 million); emoji256 (64 to
256 px). shapes64 and shapes128 were trained for 2,000 steps (docs/pretrained.md), emoji256 and the
paper's two not here; those: 1,000,000 updates of batch 1024 and 512, learning rates without a
schedule, as it names none; warm-up and clipping are ours.

An upsampler learns from crops and is applied to whole pictures. Sets of the larger size:
`prepare shapes --image_px=64`. DDIM draws, paper: 27 steps (fast27) and 15.
"""

from dalle_jax import config as cfg

# px from, to; width, mults, blocks, patch; corruption, crop, schedule; batch, steps
_SIZES = {
    "smoke": (16, 32, 16, (1, 2), 1, 4, "bsr", 0.5, "cosine", 16, 60),
    "demo": (32, 64, 32, (1, 2), 1, 2, "blur", 0.5, "cosine", 16, 800),
    "shapes64": (32, 64, 32, (1, 2), 1, 2, "blur", 0.5, "cosine", 16, 2500),
    "shapes128": (64, 128, 32, (1, 2), 1, 2, "bsr", 0.25, "linear", 16, 2500),
    "emoji256": (64, 256, 64, (1, 2, 2), 1, 4, "blur", 0.25, "cosine", 16, 3000),
    "paper256": (64, 256, 320, (1, 2, 3, 4), 3, 1, "blur", 0.25, "cosine", 1024, 1_000_000),
    "paper1024": (256, 1024, 192, (1, 1, 2, 2, 4, 4), 2, 1, "bsr", 0.25, "linear", 512, 1_000_000),
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """An upsampler of the given size; `width`, `patch` and `steps` change it, 0 keeps its own."""
    args = cfg.parse_args(arg, size="shapes64", width=0, patch=0, steps=0)
    if args.size not in _SIZES:
        raise cfg.UsageError(f"size={args.size!r} is unknown; use one of {', '.join(_SIZES)}.")
    low, px, width, mults, num_blocks, patch, *rest = _SIZES[args.size]
    corruption, crop, schedule, batch, steps = rest
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "diffusion"
    is_paper = args.size.startswith("paper")
    is_short = not is_paper and args.size != "smoke"  # smoke has the paper's objective

    c.data.image_px = px
    c.data.batch, c.data.eval_batch = batch, 64
    c.model = cfg.ConfigDict(
        dict(
            width=args.width or width,
            channel_mults=mults,
            num_blocks=num_blocks,
            attention_px=(),  # none: whole pictures are larger than the crops it learns from
            head_width=64,
            dropout=0.0,
            patch_px=args.patch or patch,
            predicts="x_0" if is_short else "eps",
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
            schedule=schedule,
            num_steps=1000,
            clip_drop=0.0,
            text_drop=0.0,
            # Weights of the steps, see `gaussian.capped_weight`; 0 = none, the paper's.
            snr_cap=5.0 if is_short else 0.0,
            # Steps T u^p of an even u; 1 = evenly, the paper's; 0.5 noisy ones more often.
            time_power=1.0,
            inpaint=False,  # shown the known part of a picture
            low_res_px=low,  # side of the smaller picture
            corruption=corruption,  # none | blur | bsr, see diffusion/corrupt.py
            crop=crop,  # share of the side that is learnt from
            preview_spacing="fast27" if px == 256 else "15",
            preview_guidance=1.0,
        )
    )

    c.optim.lr = 1e-3
    c.optim.weight_decay = 0.0
    c.train.steps = args.steps or steps
    c.train.eval_every_steps = c.train.preview_every_steps = max(1, c.train.steps // 4)

    if args.size == "smoke":
        c.optim.warmup_steps, c.optim.ema_decay = 10, 0.9
        c.data.eval_batch = 16
        c.train.save_every_steps, c.train.log_every_steps = 30, 10
        c.loss.preview_spacing = "5"
    if args.size == "demo":
        c.train.preview_every_steps = 0
    if px > 64 and not is_paper:
        c.data.eval_batch = 16  # whole pictures: each is 16 crops
    if args.size == "emoji256":
        c.data.source = "emoji"
    if is_paper:
        c.dtype.compute = "bfloat16"
        c.data.source, c.data.crop, c.data.eval_batch = "pairs", "clip", batch
        c.model.remat = "full"
        c.model.dropout = 0.1 if args.size == "paper256" else 0.0
        c.optim.lr = 1.2e-4 if args.size == "paper256" else 1e-4
        c.optim.schedule, c.optim.warmup_steps = "constant", 5000
        c.optim.beta2, c.optim.eps = 0.999, 1e-8
        c.optim.ema_decay = 0.9999
        c.train.eval_every_steps = c.train.preview_every_steps = 10_000
        c.train.save_every_steps, c.train.log_every_steps = 2000, 100
        c.mesh.rules = "fsdp"
        c.mesh.fsdp = 8
    return c
