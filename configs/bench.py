"""The networks that `bench` times: sizes at which they can be compared with other projects.

    python -m dalle_jax bench dalle_train --attention=axial
    python -m dalle_jax plan --config=configs/bench.py:case=dalle_train,attention=axial \
        --topology=cpu:1

Cases (`case=`), all in float32, without dropout, weight average or gradient clipping:

    dalle_train   64 text slots of 1,024 pieces and 16x16 codes of 1,024; 8 layers of width 256, 8
                  heads of 32, gated MLP 256 -> 2 x 1,024 -> 256, layer norm, biases. `attention=`
                  full, axial (row, column, row, row; the last layer no exception) or conv (5x5, all
                  layers). Batch 8 of stored codes, AdamW.
    dalle_sample  the same network.
    dvae_train    64 px, 8x8 codes of 1,024 vectors of 256, one residual block a side, batch 16.
    dvae_codec    the released dVAE with 64 instead of 256 hidden channels, 256 px, batch 2.
    clip_train    64 px in patches of 8, 32 text ids of 49,408; both towers 6 layers of width 192,
                  3 heads of 64; joint width 192, batch 64.
    clip_score    ViT-B/32 as released: 224 px, 77 text ids, batch 16.
    prior_train   the diffusion prior: 36 positions (32 text ids), 6 layers of width 256, 8 heads of
                  32, embeddings of 256, batch 64.
    prior_sample  the same network.
    unet_train    a decoder on pixels: 32 px, widths 64, 128, 256, two residual blocks a level,
                  attention at 16 and 8 px with the 4 tokens of an embedding, no caption, batch 8.

The last three have a CLIP of one patch and one layer of width 16 in front (case=clip_stub): less
than 1 % of the work.

dvae_train is compared with a dVAE of three 4x4 convolutions of stride 2 and 64 channels
(`DiscreteVAE` of lucidrains/DALLE-pytorch). The `patch` trunk has the same code grid, codebook and
number of blocks, but it works on the code grid only: it cuts the picture into 8x8 patches. At
width 256 that is the same number of multiply-adds (147 million a picture, there 145 million), in
other shapes: matrix products instead of convolutions at full size, and three times the parameters.

`size=smoke` is every case in miniature, for tests.
"""

from dalle_jax import config as cfg

# attention=: kinds of nn.masks, cycled over the layers
_ATTENTION = {
    "full": ("full",),
    "axial": ("row", "column", "row", "row"),
    "conv": ("conv",),
}
# examples of one step or call
_BATCH = {
    "dalle_train": 8,
    "dalle_sample": 1,
    "dvae_train": 16,
    "dvae_codec": 2,
    "clip_train": 64,
    "clip_score": 16,
    "prior_train": 64,
    "prior_sample": 8,
    "unet_train": 8,
    "clip_stub": 8,
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """The config of a case; `attention` belongs to the two of DALL-E, which default to full."""
    args = cfg.parse_args(arg, case="dalle_train", attention="", size="bench")
    makers = {
        "dalle_train": _dalle,
        "dalle_sample": _dalle,
        "dvae_train": _dvae,
        "dvae_codec": _dvae_codec,
        "clip_train": _clip,
        "clip_score": _clip_score,
        "prior_train": _prior,
        "prior_sample": _prior,
        "unet_train": _unet,
        "clip_stub": _clip_stub,
    }
    known = {"case": makers, "size": ("bench", "smoke"), "attention": ("", *_ATTENTION)}
    for name, values in known.items():
        if args[name] not in values:
            shown = ", ".join(filter(None, values))
            raise cfg.UsageError(f"{name}={args[name]!r} is unknown; use one of {shown}.")
    if args.attention and makers[args.case] is not _dalle:
        raise cfg.UsageError(
            f"attention={args.attention!r} goes with a DALL-E; case={args.case} has full attention."
        )
    c = makers[args.case](args)
    c.dtype.param = c.dtype.compute = "float32"

    c.data.batch = c.data.eval_batch = 8 if args.size == "smoke" else _BATCH[args.case]

    c.optim.name = "adamw"
    c.optim.lr = 3e-4
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 0
    c.optim.clip_norm = 0.0
    c.optim.ema_decay = 0.0
    c.train.steps = 100
    c.mesh.rules = "dp"
    return c


def _dalle(args: cfg.ConfigDict) -> cfg.ConfigDict:
    c = cfg.sibling(__file__, "dalle").get_config("size=smoke")
    c.stages.from_codes = True
    c.model.attention = _ATTENTION[args.attention or "full"]
    c.model.last_attention = ""
    c.model.conv_kernel = 5
    c.model.gated = True
    c.model.norm, c.model.use_bias, c.model.embed_std = "layer", True, 0.02
    if args.size == "bench":
        c.data.image_px, c.data.text_len, c.data.vocab_size = 64, 64, 1024
        c.model.width, c.model.num_layers, c.model.num_heads = 256, 8, 8
        c.stages.dvae_config = "configs/dvae.py:size=pairs"  # 16x16 codes of 1,024
    return c


def _dvae(args: cfg.ConfigDict) -> cfg.ConfigDict:
    c = cfg.sibling(__file__, "dvae").get_config("size=smoke")
    c.model.num_blocks = 1
    c.model.entropy_bonus = 0.0
    if args.size == "bench":
        c.data.image_px, c.model.halvings = 64, 3
        c.model.width, c.model.num_codes = 256, 1024
    return c


def _dvae_codec(args: cfg.ConfigDict) -> cfg.ConfigDict:
    size = "smoke" if args.size == "smoke" else "paper"
    c = cfg.sibling(__file__, "dvae_paper").get_config(f"size={size}")
    if args.size == "bench":
        c.model.width = 64
    return c


def _clip(args: cfg.ConfigDict) -> cfg.ConfigDict:
    c = cfg.sibling(__file__, "clip").get_config("size=smoke")
    c.loss.mask_duplicates = False
    if args.size == "bench":
        c.data.image_px, c.data.text_len, c.data.vocab_size = 64, 32, 49408
        c.model.eos_id = 49407
        c.model.patch_px = 8
        c.model.image_width, c.model.image_layers, c.model.image_heads = 192, 6, 3
        c.model.text_width, c.model.text_layers, c.model.text_heads = 192, 6, 3
        c.model.joint_width = 192
    return c


def _clip_score(args: cfg.ConfigDict) -> cfg.ConfigDict:
    size = "smoke" if args.size == "smoke" else "b32"
    c = cfg.sibling(__file__, "clip").get_config(f"size={size}")
    if args.size == "bench":
        c.model.eos_id = 49407
        c.model.scan_layers, c.model.remat = False, "none"
    return c


def _clip_stub(args: cfg.ConfigDict) -> cfg.ConfigDict:
    c = cfg.sibling(__file__, "clip").get_config("size=smoke")
    c.data.image_px = c.model.patch_px = 16 if args.size == "smoke" else 32
    c.data.text_len, c.data.vocab_size = 8 if args.size == "smoke" else 32, 1024
    c.model.image_width, c.model.image_layers, c.model.image_heads = 16, 1, 1
    c.model.text_width, c.model.text_layers, c.model.text_heads = 16, 1, 1
    c.model.joint_width = 32 if args.size == "smoke" else 256
    return c


def _behind_the_stub(args: cfg.ConfigDict, name: str) -> cfg.ConfigDict:
    c, stub = cfg.sibling(__file__, name).get_config("size=smoke"), _clip_stub(args)
    c.stages.clip_config = f"configs/bench.py:case=clip_stub,size={args.size}"
    for field in ("image_px", "text_len", "vocab_size", "add_bos_eos"):
        c.data[field] = stub.data[field]
    return c


def _prior(args: cfg.ConfigDict) -> cfg.ConfigDict:
    c = _behind_the_stub(args, "prior_diffusion")
    c.model.norm, c.model.use_bias, c.model.embed_std = "layer", True, 0.02
    if args.size == "bench":
        c.model.width, c.model.num_layers, c.model.num_heads = 256, 6, 8
    return c


def _unet(args: cfg.ConfigDict) -> cfg.ConfigDict:
    c = _behind_the_stub(args, "decoder")
    c.model.text_layers, c.model.attention_px = 0, (4, 2)
    if args.size == "bench":
        c.model.patch_px, c.model.width, c.model.channel_mults = 1, 64, (1, 2, 4)
        c.model.num_blocks, c.model.attention_px, c.model.head_width = 2, (16, 8), 64
    return c
