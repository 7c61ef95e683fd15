"""The networks that `bench` times: sizes at which they can be compared with other projects.

    python -m dalle_jax bench dalle_train --attention=axial
    python -m dalle_jax plan --config=configs/bench.py:case=dalle_train,attention=axial \
        --topology=cpu:1

Cases (`case=`), all in float32, without dropout, weight average or gradient clipping:

    dalle_train   64 text slots with 1,024 pieces and 16x16 codes with 1,024 entries; 8 layers of
                  width 256, 8 heads of 32, gated MLP 256 -> 2 x 1,024 -> 256, layer norm, biases.
                  `attention=` is full, axial (row, column, row, row; the last layer is no
                  exception) or conv (5x5, all layers). Batch 8 of stored codes, AdamW.
    dalle_sample  the same network.
    dvae_train    64 px, 8x8 codes, 1,024 vectors of width 256, one residual block a side, batch 16.
    dvae_codec    the released dVAE with 64 instead of 256 hidden channels, 256 px, batch 2.
    clip_train    64 px in patches of 8, 32 text ids of 49,408; both towers have 6 layers of width
                  192 with 3 heads of 64; joint width 192, batch 64.
    clip_score    ViT-B/32 as released: 224 px, 77 text ids, batch 16.
    prior_train   the diffusion prior: 36 positions (32 text ids), 6 layers of width 256, 8 heads of
                  32, embeddings of width 256, batch 64.
    prior_sample  the same network.
    unet_train    a decoder on pixels: 32 px, widths 64, 128, 256, two residual blocks a level,
                  attention at 16 and 8 px with the 4 tokens of an embedding, no caption, batch 8.

The last three have a small CLIP in front (`case=clip_stub`): one patch and one layer of width 16,
less than 1 % of the work.

dvae_train is compared with a dVAE that has three 4x4 convolutions of stride 2 and 64 channels
(`DiscreteVAE` of lucidrains/DALLE-pytorch). The `patch` trunk has the same code grid, codebook and
number of blocks, but it works on the code grid only: it cuts the picture into 8x8 patches. At
width 256 that is the same number of multiply-adds (147 million a picture, there 145 million), in
other shapes: matrix products instead of convolutions at full size, and three times the parameters.

`size=smoke` is every case in miniature, for tests.
"""

from dalle_jax import config as cfg

# attention=: kinds of nn.masks, cycled over the layers
ATTENTION = {
    "full": ("full",),
    "axial": ("row", "column", "row", "row"),
    "conv": ("conv",),
}

RUN = {
    "dtype.param": "float32",
    "dtype.compute": "float32",
    "optim.name": "adamw",
    "optim.lr": 3e-4,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "optim.clip_norm": 0.0,
    "optim.ema_decay": 0.0,
    "train.steps": 100,
    "mesh.rules": "dp",
}
DALLE = {
    **RUN,
    "model.last_attention": "",
    "model.conv_kernel": 5,
    "model.gated": True,
    "model.norm": "layer",
    "model.use_bias": True,
    "model.embed_std": 0.02,
    "stages.from_codes": True,
}
DALLE_BENCH = {
    **DALLE,
    "data.image_px": 64,
    "data.text_len": 64,
    "data.vocab_size": 1024,
    "model.width": 256,
    "model.num_layers": 8,
    "model.num_heads": 8,
    "stages.dvae_config": "configs/dvae.py:size=pairs",  # 16x16 codes of 1,024
}
DVAE = {**RUN, "model.num_blocks": 1, "model.entropy_bonus": 0.0}
CLIP = {**RUN, "loss.mask_duplicates": False}
CLIP_STUB = {
    **RUN,
    "model.image_width": 16,
    "model.image_layers": 1,
    "model.image_heads": 1,
    "model.text_width": 16,
    "model.text_layers": 1,
    "model.text_heads": 1,
}
STUB_DATA = {"data.image_px": 32, "data.text_len": 32, "data.vocab_size": 1024}
STUB_DATA_SMOKE = {"data.image_px": 16, "data.text_len": 8, "data.vocab_size": 1024}
PRIOR = {**RUN, "model.norm": "layer", "model.use_bias": True, "model.embed_std": 0.02}
PRIOR_BENCH = {
    **PRIOR,
    **STUB_DATA,
    "model.width": 256,
    "model.num_layers": 6,
    "model.num_heads": 8,
    "stages.clip_config": "configs/bench.py:case=clip_stub,size=bench",
}
PRIOR_SMOKE = {
    **PRIOR,
    **STUB_DATA_SMOKE,
    "data.batch": 8,
    "stages.clip_config": "configs/bench.py:case=clip_stub,size=smoke",
}
UNET = {**RUN, "model.text_layers": 0}

# Size -> case -> what it changes in the config that it starts from.
SIZES = {
    "bench": {
        "dalle_train": {"start": "dalle:size=smoke", **DALLE_BENCH, "data.batch": 8},
        "dalle_sample": {"start": "dalle:size=smoke", **DALLE_BENCH, "data.batch": 1},
        "dvae_train": {
            "start": "dvae:size=smoke",
            **DVAE,
            "data.image_px": 64,
            "data.batch": 16,
            "model.halvings": 3,
            "model.width": 256,
            "model.num_codes": 1024,
        },
        "dvae_codec": {
            "start": "dvae_paper:size=paper",
            **RUN,
            "data.batch": 2,
            "model.width": 64,
        },
        "clip_train": {
            "start": "clip:size=smoke",
            **CLIP,
            "data.image_px": 64,
            "data.batch": 64,
            "data.text_len": 32,
            "data.vocab_size": 49408,
            "model.patch_px": 8,
            "model.image_width": 192,
            "model.image_layers": 6,
            "model.image_heads": 3,
            "model.text_width": 192,
            "model.text_layers": 6,
            "model.text_heads": 3,
            "model.joint_width": 192,
            "model.eos_id": 49407,
        },
        "clip_score": {
            "start": "clip:size=b32",
            **RUN,
            "data.batch": 16,
            "model.eos_id": 49407,
            "model.scan_layers": False,
            "model.remat": "none",
        },
        "prior_train": {"start": "prior_diffusion:size=smoke", **PRIOR_BENCH, "data.batch": 64},
        "prior_sample": {"start": "prior_diffusion:size=smoke", **PRIOR_BENCH, "data.batch": 8},
        "unet_train": {
            "start": "decoder:size=smoke",
            **UNET,
            **STUB_DATA,
            "data.batch": 8,
            "model.width": 64,
            "model.channel_mults": (1, 2, 4),
            "model.num_blocks": 2,
            "model.attention_px": (16, 8),
            "model.head_width": 64,
            "model.patch_px": 1,
            "stages.clip_config": "configs/bench.py:case=clip_stub,size=bench",
        },
        "clip_stub": {
            "start": "clip:size=smoke",
            **CLIP_STUB,
            **STUB_DATA,
            "data.batch": 8,
            "model.patch_px": 32,
            "model.joint_width": 256,
        },
    },
    "smoke": {
        "dalle_train": {"start": "dalle:size=smoke", **DALLE, "data.batch": 8},
        "dalle_sample": {"start": "dalle:size=smoke", **DALLE, "data.batch": 8},
        "dvae_train": {"start": "dvae:size=smoke", **DVAE, "data.batch": 8},
        "dvae_codec": {"start": "dvae_paper:size=smoke", **RUN, "data.batch": 8},
        "clip_train": {"start": "clip:size=smoke", **CLIP, "data.batch": 8},
        "clip_score": {"start": "clip:size=smoke", **RUN, "data.batch": 8},
        "prior_train": {"start": "prior_diffusion:size=smoke", **PRIOR_SMOKE},
        "prior_sample": {"start": "prior_diffusion:size=smoke", **PRIOR_SMOKE},
        "unet_train": {
            "start": "decoder:size=smoke",
            **UNET,
            **STUB_DATA_SMOKE,
            "data.batch": 8,
            "model.attention_px": (4, 2),
            "stages.clip_config": "configs/bench.py:case=clip_stub,size=smoke",
        },
        "clip_stub": {
            "start": "clip:size=smoke",
            **CLIP_STUB,
            **STUB_DATA_SMOKE,
            "data.batch": 8,
            "model.patch_px": 16,
            "model.joint_width": 32,
        },
    },
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """The config of a case; `attention` belongs to the two of DALL-E, which default to full."""
    args = cfg.parse_args(arg, case="dalle_train", attention="", size="bench")
    known = {"case": SIZES["bench"], "size": SIZES, "attention": ("", *ATTENTION)}
    for name, values in known.items():
        if args[name] not in values:
            shown = ", ".join(filter(None, values))
            raise cfg.UsageError(f"{name}={args[name]!r} is unknown; use one of {shown}.")
    is_dalle = args.case in ("dalle_train", "dalle_sample")
    if args.attention and not is_dalle:
        raise cfg.UsageError(
            f"attention={args.attention!r} goes with a DALL-E; case={args.case} has full attention."
        )
    changes = dict(SIZES[args.size][args.case])
    name, _, argument = changes.pop("start").partition(":")
    c = cfg.sibling(__file__, name).get_config(argument)
    attention = {"model.attention": ATTENTION[args.attention or "full"]} if is_dalle else {}
    cfg.apply(c, changes, attention, {"data.eval_batch": lambda c: c.data.batch})
    return c
