"""unCLIP's decoder (Ramesh et al. 2022, arXiv:2204.06125 §2.1) at sizes that one machine trains.

    python -m dalle_jax train --config=configs/decoder.py:size=shapes \
        --config.stages.clip=runs/clip --workdir=runs/decoder

Sizes (`size=`): smoke (a minute on a CPU), demo (generated scenes at 32 px, 13 minutes of two
cores), shapes (the same for an hour of one core), emoji (captioned emoji at 64 px; 114
minutes of one core), single_gpu (64 px, half the paper's width; not run here).
`width=`, `patch=` and `steps=` change a size; 0 keeps its own.

The CPU sizes begin on patches: at 32 px the first level of one on pixels costs most of the step.
And they predict x_0, without the variance: after 500 steps of 16 pictures eps and v drew noise
still, x_0 coloured blobs where they belong; the variance's gradient slowed it down.

To teach a trained one to inpaint, `--config.init_from=runs/decoder --config.loss.inpaint=true` with
a new workdir: it starts as the same function. The paper's model is configs/decoder_paper.py.
"""

from dalle_jax import config as cfg

# px, width, channel mults, blocks, patch, text (width, layers, heads), batch, steps
_SIZES = {
    "smoke": (32, 16, (1, 2), 1, 4, (32, 1, 2), 16, 60),
    "demo": (32, 48, (1, 2), 1, 2, (96, 2, 2), 16, 1700),
    "shapes": (32, 48, (1, 2), 1, 2, (128, 2, 2), 16, 7000),
    "emoji": (64, 64, (1, 2, 3), 1, 4, (128, 2, 2), 16, 5600),
    "single_gpu": (64, 256, (1, 2, 3, 4), 3, 1, (1024, 12, 16), 128, 400_000),
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A decoder of the given size."""
    args = cfg.parse_args(arg, size="shapes", width=0, patch=0, steps=0)
    if args.size not in _SIZES:
        raise cfg.UsageError(f"size={args.size!r} is unknown; use one of {', '.join(_SIZES)}.")
    px, width, mults, num_blocks, patch, text, batch, steps = _SIZES[args.size]
    width, patch, steps = args.width or width, args.patch or patch, args.steps or steps
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "diffusion"

    c.data.image_px = px
    c.data.batch, c.data.eval_batch = batch, 64
    c.data.add_bos_eos = True  # captions as the CLIP reads them
    is_small = args.size != "single_gpu"
    is_short = is_small and args.size != "smoke"  # smoke runs all parts of the paper's objective
    sides = tuple(px // patch >> level for level in range(len(mults)))
    c.model = cfg.ConfigDict(
        dict(
            width=width,
            channel_mults=mults,
            num_blocks=num_blocks,
            attention_px=tuple(s for s in sides if s <= 8) if is_small else (32, 16, 8),
            head_width=next(n for n in (64, 32, 16) if width % n == 0),
            dropout=0.0,
            patch_px=patch,
            predicts="x_0" if is_short else "eps",
            learned_variance=not is_short,
            text_width=text[0],
            text_layers=text[1],
            text_heads=text[2],
            clip_tokens=4,
            scan_layers=not is_small,
            remat="none" if is_small else "full",
        )
    )
    c.loss = cfg.ConfigDict(
        dict(
            schedule="cosine",
            num_steps=1000,
            clip_drop=0.1,  # no embedding: guidance, and drawing from captions alone
            text_drop=0.5,
            # Weights of the steps, see `gaussian.capped_weight`; 0 = none, the paper's.
            snr_cap=5.0 if is_short else 0.0,
            # Steps T u^p of an even u; 1 = evenly, the paper's; 0.5 noisy ones more often.
            time_power=1.0,
            inpaint=False,  # shown the known part of a picture
            low_res_px=0,  # above 0: an upsampler, see configs/upsampler.py
            corruption="none",
            crop=1.0,
            preview_spacing="25",
            preview_guidance=2.0,
        )
    )
    c.stages.clip = ""  # workdir of the CLIP: required
    # Its shape, for plans and dry runs.
    c.stages.clip_config = "configs/clip.py:size=" + (
        "b32" if not is_small else args.size if args.size != "demo" else "shapes"
    )

    c.optim.lr = 1e-3
    c.optim.beta2 = 0.99
    c.optim.weight_decay = 0.0
    c.optim.ema_decay = 0.999
    c.train.steps = steps

    if args.size == "smoke":
        c.optim.warmup_steps, c.optim.ema_decay = 10, 0.9
        c.data.eval_batch = 16
        c.train.save_every_steps, c.train.log_every_steps = 30, 10
        c.loss.preview_spacing = "5"
    if args.size in ("demo", "shapes"):
        # Captions of the grammar have at most 9 ids; the pretrained CLIP was trained so.
        c.data.text_len = 12
        c.train.eval_every_steps = steps // 4
        c.train.preview_every_steps = 0 if args.size == "demo" else steps // 4
    if args.size == "emoji":
        c.data.source, c.data.vocab_size, c.data.text_len = "emoji", 2048, 24
        c.model.dropout = 0.05
        c.train.eval_every_steps = c.train.preview_every_steps = 1000
    if args.size == "single_gpu":
        c.dtype.compute = "bfloat16"
        c.data.source, c.data.crop = "pairs", "clip"
        c.data.text_len, c.data.vocab_size = 77, 49408
        c.model.dropout = 0.1
        c.optim.lr, c.optim.warmup_steps, c.optim.schedule = 1.2e-4, 5000, "constant"
        c.optim.beta2, c.optim.ema_decay = 0.999, 0.9999
        c.train.eval_every_steps = c.train.preview_every_steps = 5000
        c.train.save_every_steps, c.train.log_every_steps = 2000, 100
    return c
