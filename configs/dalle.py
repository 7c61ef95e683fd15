"""DALL-E (Ramesh et al. 2021, arXiv:2102.12092) at sizes that one machine trains.

    python -m dalle_jax train --config=configs/dalle.py:size=shapes \
        --config.stages.dvae=runs/dvae --workdir=runs/dalle

Sizes (`size=`): smoke (a minute on a CPU), demo (generated scenes in 8 minutes of one core), shapes
(the same for an hour: the pretrained model, docs/pretrained.md), emoji_demo and emoji (captioned
emoji), pairs (your own pictures at 64 px; not run to its end here), single_gpu (256 px, 32x32 codes
of the paper's dVAE, 16 layers of 1024; not run here).
`width=`, `layers=` and `steps=` change a size; 0 keeps its own.

The paper's 12-billion-parameter model is configs/dalle_12b.py.
"""

from dalle_jax import config as cfg

# width, layers, heads, steps
_SIZES = {
    "smoke": (64, 2, 1, 60),
    "demo": (128, 4, 2, 1300),
    "shapes": (160, 5, 5, 4000),
    "emoji_demo": (128, 4, 2, 1400),
    "emoji": (128, 4, 2, 8000),
    "pairs": (256, 8, 4, 50_000),
    "single_gpu": (1024, 16, 16, 200_000),
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A DALL-E of the given size."""
    args = cfg.parse_args(arg, size="shapes", width=0, layers=0, steps=0)
    if args.size not in _SIZES:
        raise cfg.UsageError(f"size={args.size!r} is unknown; use one of {', '.join(_SIZES)}.")
    width, layers, heads, steps = _SIZES[args.size]
    width, layers, steps = args.width or width, args.layers or layers, args.steps or steps
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "dalle"

    c.model = cfg.ConfigDict(
        dict(
            width=width,
            num_layers=layers,
            num_heads=max(1, width // 64) if args.width else heads,
            mlp_ratio=4,
            gated=False,
            attention=("row", "column", "row", "row"),  # of nn.masks; full is allowed
            last_attention="conv",
            conv_kernel=11,
            norm="rms",
            use_bias=False,
            dropout=0.0,
            # 0.5: at 128 to 256 wide a table entry then weighs as much as a block's output.
            embed_std=0.5,
            scan_layers=False,  # unrolled is 22 % faster on a CPU core
            remat="none",
            attention_impl="auto",  # dense | structured | splash | cudnn, see nn/attention.py
        )
    )
    c.stages.dvae = ""  # workdir of the codec: required
    is_small = args.size != "single_gpu"
    # Its shape, for plans and dry runs.
    c.stages.dvae_config = (
        f"configs/dvae.py:size={args.size}" if is_small else "configs/dvae_paper.py"
    )
    c.stages.from_codes = False  # the prepared set stores this codec's codes (`encode`)
    c.stages.encode_chunk = 0  # pictures that a device encodes at a time; 0 = its whole share

    # Muon reached the loss of AdamW in three quarters of the time although a step costs a quarter
    # more (two cores, width 128, 10k scenes).
    c.optim.name = "muon"
    c.optim.lr = 3e-3
    c.optim.beta2 = 0.96  # the paper's
    c.optim.weight_decay = 0.01
    c.train.steps = steps

    if args.size == "smoke":
        c.data.batch, c.data.eval_batch = 16, 32
        c.train.save_every_steps, c.train.log_every_steps = 30, 10
        c.optim.warmup_steps = 10
    if args.size == "demo":
        # Held-out image loss after 1,300 steps: 1.051 at 3e-3, 1.021 at 6e-3, 1.056 at 1.2e-2.
        c.optim.lr, c.optim.warmup_steps = 6e-3, 60
    if args.size in ("demo", "shapes"):
        # Captions of the grammar have at most 9 ids; every text slot costs as much as a code.
        c.data.text_len = 12
        # On an 8x8 grid the sparse masks save nothing and every key is near: one mask for all.
        c.model.attention, c.model.last_attention = ("full",), "full"
        c.data.caption_drop = 0.1  # for sample --guidance
    if args.size == "shapes":
        c.optim.ema_decay = 0.998
        c.train.eval_every_steps, c.train.save_every_steps = 500, 250
        c.train.preview_every_steps = 1000
    if args.size in ("demo", "emoji_demo", "emoji"):
        c.data.batch = 16
        c.optim.ema_decay = 0.99
        c.train.eval_every_steps, c.train.save_every_steps = 400, 200
        c.train.log_every_steps = 20
    if args.size == "emoji":
        c.optim.ema_decay = 0.998
        c.train.preview_every_steps = 1000
    if args.size in ("emoji_demo", "emoji"):
        # 99 % of the captions have at most 16 ids. No BPE-dropout: a label is shown fewer than a
        # hundred times, and at 0.1 a word of six merges would be in pieces half of the times.
        c.data.source, c.data.vocab_size, c.data.text_len = "emoji", 2048, 16
        c.data.caption_drop = 0.1
        c.model.dropout = 0.05  # about 10k pictures: it overfits
    if args.size == "pairs":
        c.data.source, c.data.image_px, c.data.crop = "pairs", 64, "dalle"
        c.data.vocab_size, c.data.text_len = 4096, 48
        c.data.bpe_dropout, c.data.caption_drop = 0.1, 0.1
        c.train.eval_every_steps, c.train.preview_every_steps = 1000, 1000
    if args.size == "single_gpu":
        c.dtype.compute = "bfloat16"
        c.data.image_px, c.data.text_len, c.data.vocab_size = 256, 128, 16384
        c.data.batch, c.data.eval_batch, c.data.crop = 64, 64, "dalle"
        c.data.bpe_dropout = 0.1
        c.model.norm, c.model.use_bias, c.model.embed_std = "layer", True, 0.02
        c.model.scan_layers, c.model.remat = True, "names"
        c.optim.name, c.optim.lr, c.optim.warmup_steps = "adamw", 4.5e-4, 5000
        c.optim.weight_decay, c.optim.clip_norm = 4.5e-2, 4.0
    return c
