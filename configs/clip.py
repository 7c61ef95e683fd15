"""CLIP (Radford et al. 2021, arXiv:2103.00020): the released ViTs, and small ones as rerankers.

    python -m dalle_jax train --config=configs/clip.py:size=shapes --workdir=runs/clip

Sizes (`size=`): smoke (a minute on a CPU), demo and shapes (32 px generated scenes), emoji_demo and
emoji (captioned emoji, 32 px), pairs (your own pictures at 64 px; not run to its end here), b32,
b16, l14 (the paper's ViT-B/32, B/16, L/14: 151,277,313, 149,620,737 and 427,616,513 parameters; not
run here). Expected, paper sizes: zero-shot ImageNet 63.2, 68.6, 75.3. h16 is the CLIP of DALL-E 2
(arXiv:2204.06125 appendix C; ViT-H/16 at 256 px; its SAM is not implemented, its heads are not
stated: 16).

To rank drawn pictures, show it what a codec draws: `--config.stages.dvae=runs/dvae
--config.loss.recon_prob=0.5`.
"""

from dalle_jax import config as cfg

# width, layers and heads of both towers; joint width.
_PAPER = {
    "b32": (32, (768, 12, 12), (512, 12, 8), 512),
    "b16": (16, (768, 12, 12), (512, 12, 8), 512),
    "l14": (14, (1024, 24, 16), (768, 12, 12), 768),
    "h16": (16, (1280, 32, 16), (1024, 24, 16), 1024),
}
_SMALL = {
    "smoke": (8, (64, 2, 2), (64, 2, 2), 32),
    "demo": (8, (96, 3, 3), (64, 2, 2), 64),
    "shapes": (4, (96, 3, 2), (64, 2, 2), 64),
    "emoji_demo": (8, (96, 3, 3), (96, 2, 3), 64),
    "emoji": (8, (128, 4, 4), (128, 2, 4), 128),
    "pairs": (8, (256, 6, 4), (256, 4, 4), 256),
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A CLIP of the given size."""
    args = cfg.parse_args(arg, size="shapes")
    sizes = _SMALL | _PAPER
    if args.size not in sizes:
        raise cfg.UsageError(f"size={args.size!r} is unknown; use one of {', '.join(sizes)}.")
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "clip"

    c.data.add_bos_eos = True
    c.data.batch = 128
    c.data.eval_batch = 256

    patch_px, image, text, joint = sizes[args.size]
    c.model = cfg.ConfigDict(
        dict(
            patch_px=patch_px,
            image_width=image[0],
            image_layers=image[1],
            image_heads=image[2],
            text_width=text[0],
            text_layers=text[1],
            text_heads=text[2],
            joint_width=joint,
            pixel_norm=args.size in _PAPER,  # small ones take [-1, 1]: no photographs, no WIT mean
            eos_id=3,  # SentencePiece; 49407 for openai/CLIP's tokenizer
            scan_layers=False,  # unrolled is 22 % faster on a CPU core
            remat="none",
        )
    )
    c.loss = cfg.ConfigDict(
        dict(
            mask_duplicates=True,  # identical captions of a batch are not negatives
            recon_prob=0.0,  # share of pictures replaced by the codec's reconstructions
        )
    )
    c.stages.dvae = ""  # the codec's workdir, for recon_prob
    c.stages.dvae_config = "configs/dvae.py"  # its shape, for plans and dry runs

    c.optim.lr = 2e-3
    c.optim.beta2 = 0.98
    c.optim.eps = 1e-6
    c.optim.weight_decay = 0.05
    c.train.steps = 4000

    if args.size == "smoke":
        c.data.batch, c.data.eval_batch = 32, 64
        c.train.steps, c.train.save_every_steps, c.train.log_every_steps = 60, 30, 10
        c.optim.warmup_steps = 10
    if args.size in ("demo", "shapes"):
        # Captions of the grammar have at most 9 ids, begin and end not counted.
        c.data.text_len = 12
    if args.size in ("demo", "emoji_demo"):
        c.data.batch = 64
        c.train.steps, c.train.log_every_steps = 2400, 25
    if args.size == "shapes":
        c.train.steps, c.train.eval_every_steps, c.train.save_every_steps = 3000, 500, 250
    if args.size in ("emoji_demo", "emoji"):
        c.data.source, c.data.vocab_size, c.data.text_len = "emoji", 2048, 24
        c.optim.weight_decay = 0.2  # about 10k pictures: it overfits
    if args.size == "emoji":
        c.train.steps = 2500
    if args.size == "pairs":
        c.data.source, c.data.image_px, c.data.crop = "pairs", 64, "clip"
        c.data.vocab_size, c.data.text_len = 4096, 48
        c.optim.weight_decay, c.train.steps = 0.2, 20_000
    if args.size in _PAPER:
        c.dtype.compute = "bfloat16"
        c.data.image_px, c.data.text_len, c.data.vocab_size = 224, 77, 49408
        c.data.batch, c.data.eval_batch, c.data.crop = 32768, 4096, "clip"
        c.model.scan_layers, c.model.remat = True, "full"
        c.optim.lr = {"l14": 4e-4, "h16": 3e-4}.get(args.size, 5e-4)
        c.optim.weight_decay, c.optim.warmup_steps = 0.2, 2000
        c.optim.end_lr_ratio = 0.0
        c.train.steps = 390_625  # 32 epochs of 400 million pairs
        c.mesh.rules = "fsdp"
    if args.size == "h16":
        c.data.image_px = 256
    return c
