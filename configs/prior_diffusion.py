"""The diffusion prior of DALL-E 2 (Ramesh et al. 2022, arXiv:2204.06125, §2.2 and appendix C).

    python -m dalle_jax train --config=configs/prior_diffusion.py:size=shapes \
        --config.stages.clip=runs/clip --workdir=runs/prior

Sizes (`size=`): smoke (a minute on a CPU), demo and shapes (32 px generated scenes), emoji
(captioned emoji), single_gpu (your own pairs; not run here), paper (24 layers of 2048, 32 heads:
1.21 billion parameters in the blocks, over ViT-H/16 embeddings; not run here).

Text length, vocabulary and tokenizer are the CLIP's. Watch eval/cosine against eval/cosine_text
and eval/retrieval1 against eval/retrieval1_text: tasks/prior.py tells what they are.
"""

from dalle_jax import config as cfg

# width, layers, heads, batch, steps
_SIZES = {
    "smoke": (64, 2, 2, 32, 60),
    "demo": (128, 3, 4, 64, 800),
    "shapes": (192, 6, 6, 128, 6000),
    "emoji": (192, 6, 6, 128, 6000),
    "single_gpu": (768, 12, 12, 512, 200_000),
    "paper": (2048, 24, 32, 4096, 600_000),
}
_CLIPS = {"single_gpu": "b32", "paper": "h16"}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A diffusion prior of the given size."""
    args = cfg.parse_args(arg, size="shapes", steps=0)
    if args.size not in _SIZES:
        raise cfg.UsageError(f"size={args.size!r} is unknown; use one of {', '.join(_SIZES)}.")
    width, layers, heads, batch, steps = _SIZES[args.size]
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "prior"

    c.stages.clip = ""  # workdir of the CLIP: required
    # Its shape, for plans and dry runs.
    c.stages.clip_config = f"configs/clip.py:size={_CLIPS.get(args.size, args.size)}"
    clip = cfg.sibling(__file__, "clip").get_config(f"size={_CLIPS.get(args.size, args.size)}")
    for field in ("source", "image_px", "crop", "text_len", "vocab_size", "add_bos_eos"):
        c.data[field] = clip.data[field]
    c.data.batch, c.data.eval_batch = batch, 256

    is_small = args.size not in _CLIPS
    c.model = cfg.ConfigDict(
        dict(
            kind="diffusion",
            width=width,
            num_layers=layers,
            num_heads=heads,
            mlp_ratio=4,
            norm="rms" if is_small else "layer",
            activation="gelu",
            use_bias=not is_small,
            dropout=0.0,
            embed_std=0.5 if is_small else 0.02,
            schedule="cosine",
            num_steps=1000,
            scan_layers=not is_small,  # unrolled is faster on a CPU core
            remat="none",
        )
    )
    c.loss = cfg.ConfigDict(
        dict(
            text_drop=0.1,  # share of examples without caption and text embedding, for guidance
            eval_steps=16,  # of the sampler that held-out batches are judged by; paper 64
        )
    )

    c.optim.lr = 1e-3
    c.optim.beta2 = 0.96  # the paper's, as weight decay and eps
    c.optim.eps = 1e-6
    c.optim.weight_decay = 6.0e-2
    c.train.steps = args.steps or steps

    if args.size == "smoke":
        c.data.eval_batch = 64
        c.train.save_every_steps, c.train.log_every_steps = 30, 10
        c.optim.warmup_steps = 10
    if args.size == "shapes":
        c.train.eval_every_steps, c.train.save_every_steps = 1000, 500
    if args.size == "emoji":
        c.model.dropout = 0.1  # about 10k pictures: it overfits
        c.train.eval_every_steps, c.train.save_every_steps = 1000, 500
    if not is_small:
        c.dtype.compute = "bfloat16"
        c.data.source = "pairs"
        c.train.log_every_steps, c.train.eval_every_steps = 100, 10_000
        c.train.save_every_steps = 2_000
        # Warm-up and decay are not given in the paper.
        c.optim.lr, c.optim.schedule, c.optim.warmup_steps = 1.1e-4, "constant", 1000
        c.optim.ema_decay = 0.9999
    if args.size == "paper":
        c.data.eval_batch = 4096
        c.model.remat = "full"
        c.mesh.fsdp, c.mesh.rules = 16, "fsdp"
    return c
