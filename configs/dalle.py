"""DALL-E (Ramesh et al. 2021, arXiv:2102.12092) at sizes that one machine trains.

    python -m dalle_jax train --config=configs/dalle.py:size=shapes \
        --config.stages.dvae=runs/dvae --workdir=runs/dalle

Sizes (`size=`):

    smoke             a minute on a CPU
    demo              generated scenes; it trains for 8 minutes on one core
    shapes            the same scenes for an hour: the pretrained model, docs/pretrained.md
    emoji_demo, emoji captioned emoji
    pairs             your own pictures at 64 px; not run to its end here
    single_gpu        256 px, 32x32 codes of the paper's dVAE, 16 layers of width 1024; not run here

`width=`, `layers=` and `steps=` change a size; 0 keeps its own value.

The paper's 12-billion-parameter model is configs/dalle_12b.py.
"""

from dalle_jax import config as cfg

SCENES = {
    # Captions of the grammar have at most 9 ids; every text slot costs as much as a code.
    "data.text_len": 12,
    "data.caption_drop": 0.1,  # for sample --guidance
    # On an 8x8 grid the sparse masks save nothing and every key is near: one mask for all.
    "model.attention": ("full",),
    "model.last_attention": "full",
}
SHORT = {
    "data.batch": 16,
    "optim.ema_decay": 0.99,
    "train.log_every_steps": 20,
    "train.eval_every_steps": 400,
    "train.save_every_steps": 200,
}
EMOJI = {
    **SHORT,
    # 99 % of the captions have at most 16 ids. There is no BPE-dropout: a label is shown fewer than
    # a hundred times, and at 0.1 a word of six merges would be in pieces half of the times.
    "data.source": "emoji",
    "data.text_len": 16,
    "data.vocab_size": 2048,
    "data.caption_drop": 0.1,
    "model.width": 128,
    "model.num_layers": 4,
    "model.num_heads": 2,
    "model.dropout": 0.05,  # about 10k pictures: it overfits
}

SIZES = {
    "smoke": {
        "data.batch": 16,
        "data.eval_batch": 32,
        "model.width": 64,
        "model.num_layers": 2,
        "model.num_heads": 1,
        "stages.dvae_config": "configs/dvae.py:size=smoke",
        "optim.warmup_steps": 10,
        "train.steps": 60,
        "train.log_every_steps": 10,
        "train.save_every_steps": 30,
    },
    "demo": {
        **SCENES,
        **SHORT,
        "model.width": 128,
        "model.num_layers": 4,
        "model.num_heads": 2,
        "stages.dvae_config": "configs/dvae.py:size=demo",
        # Held-out image loss after 1,300 steps: 1.051 at 3e-3, 1.021 at 6e-3, 1.056 at 1.2e-2.
        "optim.lr": 6e-3,
        "optim.warmup_steps": 60,
        "train.steps": 1300,
    },
    "shapes": {
        **SCENES,
        "model.width": 160,
        "model.num_layers": 5,
        "model.num_heads": 5,
        "stages.dvae_config": "configs/dvae.py:size=shapes",
        "optim.ema_decay": 0.998,
        "train.steps": 4000,
        "train.eval_every_steps": 500,
        "train.save_every_steps": 250,
        "train.preview_every_steps": 1000,
    },
    "emoji_demo": {
        **EMOJI,
        "stages.dvae_config": "configs/dvae.py:size=emoji_demo",
        "train.steps": 1400,
    },
    "emoji": {
        **EMOJI,
        "stages.dvae_config": "configs/dvae.py:size=emoji",
        "optim.ema_decay": 0.998,
        "train.steps": 8000,
        "train.preview_every_steps": 1000,
    },
    "pairs": {
        "data.source": "pairs",
        "data.image_px": 64,
        "data.crop": "dalle",
        "data.text_len": 48,
        "data.vocab_size": 4096,
        "data.bpe_dropout": 0.1,
        "data.caption_drop": 0.1,
        "model.width": 256,
        "model.num_layers": 8,
        "model.num_heads": 4,
        "stages.dvae_config": "configs/dvae.py:size=pairs",
        "train.steps": 50_000,
        "train.eval_every_steps": 1000,
        "train.preview_every_steps": 1000,
    },
    "single_gpu": {
        "dtype.compute": "bfloat16",
        "data.image_px": 256,
        "data.batch": 64,
        "data.eval_batch": 64,
        "data.crop": "dalle",
        "data.text_len": 128,
        "data.vocab_size": 16384,
        "data.bpe_dropout": 0.1,
        "model.width": 1024,
        "model.num_layers": 16,
        "model.num_heads": 16,
        "model.norm": "layer",
        "model.use_bias": True,
        "model.embed_std": 0.02,
        "model.scan_layers": True,
        "model.remat": "names",
        "stages.dvae_config": "configs/dvae_paper.py",
        "optim.name": "adamw",
        "optim.lr": 4.5e-4,
        "optim.warmup_steps": 5000,
        "optim.weight_decay": 4.5e-2,
        "optim.clip_norm": 4.0,
        "train.steps": 200_000,
    },
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A DALL-E of the given size; `width`, `layers` and `steps` change it, 0 keeps its own value.

    A width of one's own has heads of 64.
    """
    args = cfg.parse_args(arg, size="shapes", width=0, layers=0, steps=0)
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "dalle"

    c.model = cfg.ConfigDict(
        dict(
            width=0,
            num_layers=0,
            num_heads=0,
            mlp_ratio=4,
            gated=False,
            attention=("row", "column", "row", "row"),  # of nn.masks; full is allowed
            last_attention="conv",
            conv_kernel=11,
            norm="rms",
            use_bias=False,
            dropout=0.0,
            # 0.5: at a width of 128 to 256, a table entry then weighs as much as a block's output.
            embed_std=0.5,
            # Unrolled layers are 22 % faster on a CPU core.
            scan_layers=False,
            remat="none",
            attention_impl="auto",  # dense | structured | splash | cudnn, see nn/attention.py
        )
    )
    c.stages.dvae = ""  # workdir of the codec: required
    c.stages.dvae_config = ""  # the codec's shape, for plans and dry runs
    c.stages.from_codes = False  # the prepared set stores this codec's codes (`encode`)
    c.stages.encode_chunk = 0  # pictures that a device encodes at a time; 0 = its whole share

    # Muon reached the loss of AdamW in three quarters of the time although a step costs a quarter
    # more (two cores, width 128, 10k scenes).
    c.optim.name = "muon"
    c.optim.lr = 3e-3
    # beta2 is the paper's.
    c.optim.beta2 = 0.96
    c.optim.weight_decay = 0.01

    changes = cfg.size_overrides(
        args, SIZES, width="model.width", layers="model.num_layers", steps="train.steps"
    )
    if args.width:
        changes["model.num_heads"] = max(1, args.width // 64)
    cfg.apply(c, changes)
    return c
