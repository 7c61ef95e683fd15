"""CLIP (Radford et al. 2021, arXiv:2103.00020): the released ViTs, and small ones as rerankers.

    python -m dalle_jax train --config=configs/clip.py:size=shapes --workdir=runs/clip

Sizes (`size=`):

    smoke             a minute on a CPU
    demo, shapes      32 px generated scenes
    emoji_demo, emoji captioned emoji, 32 px
    pairs             your own pictures at 64 px; not run to its end here
    b32, b16, l14     the paper's ViT-B/32, B/16 and L/14 with 151,277,313, 149,620,737 and
                      427,616,513 parameters; not run here. The paper's zero-shot ImageNet accuracy
                      is 63.2, 68.6 and 75.3.
    h16               the CLIP of DALL-E 2 (arXiv:2204.06125 appendix C), ViT-H/16 at 256 px. Its
                      SAM is not implemented. The paper does not state its heads; here there are 16.

A CLIP that ranks a codec's samples should see the codec's pictures in training:
`--config.stages.dvae=runs/dvae --config.loss.recon_prob=0.5`.
"""

from dalle_jax import config as cfg

# Captions of the grammar have at most 9 ids without begin and end.
SCENES = {"data.text_len": 12}
EMOJI = {
    "data.source": "emoji",
    "data.text_len": 24,
    "data.vocab_size": 2048,
    "optim.weight_decay": 0.2,  # about 10k pictures: it overfits
}
PAPER = {
    "dtype.compute": "bfloat16",
    "data.image_px": 224,
    "data.text_len": 77,
    "data.vocab_size": 49408,
    "data.batch": 32768,
    "data.eval_batch": 4096,
    "data.crop": "clip",
    "model.pixel_norm": True,
    "model.scan_layers": True,
    "model.remat": "full",
    "optim.lr": 5e-4,
    "optim.weight_decay": 0.2,
    "optim.warmup_steps": 2000,
    "optim.end_lr_ratio": 0.0,
    "train.steps": 390_625,  # 32 epochs of 400 million pairs
    "mesh.rules": "fsdp",
}
VIT_B = {
    **PAPER,
    "model.image_width": 768,
    "model.image_layers": 12,
    "model.image_heads": 12,
    "model.text_width": 512,
    "model.text_layers": 12,
    "model.text_heads": 8,
    "model.joint_width": 512,
}

SIZES = {
    "smoke": {
        "data.batch": 32,
        "data.eval_batch": 64,
        "model.patch_px": 8,
        "model.image_width": 64,
        "model.image_layers": 2,
        "model.image_heads": 2,
        "model.text_width": 64,
        "model.text_layers": 2,
        "model.text_heads": 2,
        "model.joint_width": 32,
        "optim.warmup_steps": 10,
        "train.steps": 60,
        "train.log_every_steps": 10,
        "train.save_every_steps": 30,
    },
    "demo": {
        **SCENES,
        "data.batch": 64,
        "model.patch_px": 8,
        "model.image_width": 96,
        "model.image_layers": 3,
        "model.image_heads": 3,
        "model.text_width": 64,
        "model.text_layers": 2,
        "model.text_heads": 2,
        "model.joint_width": 64,
        "train.steps": 2400,
        "train.log_every_steps": 25,
    },
    "shapes": {
        **SCENES,
        "model.patch_px": 4,
        "model.image_width": 96,
        "model.image_layers": 3,
        "model.image_heads": 2,
        "model.text_width": 64,
        "model.text_layers": 2,
        "model.text_heads": 2,
        "model.joint_width": 64,
        "train.steps": 3000,
        "train.eval_every_steps": 500,
        "train.save_every_steps": 250,
    },
    "emoji_demo": {
        **EMOJI,
        "data.batch": 64,
        "model.patch_px": 8,
        "model.image_width": 96,
        "model.image_layers": 3,
        "model.image_heads": 3,
        "model.text_width": 96,
        "model.text_layers": 2,
        "model.text_heads": 3,
        "model.joint_width": 64,
        "train.steps": 2400,
        "train.log_every_steps": 25,
    },
    "emoji": {
        **EMOJI,
        "model.patch_px": 8,
        "model.image_width": 128,
        "model.image_layers": 4,
        "model.image_heads": 4,
        "model.text_width": 128,
        "model.text_layers": 2,
        "model.text_heads": 4,
        "model.joint_width": 128,
        "train.steps": 2500,
    },
    "pairs": {
        "data.source": "pairs",
        "data.image_px": 64,
        "data.crop": "clip",
        "data.text_len": 48,
        "data.vocab_size": 4096,
        "model.patch_px": 8,
        "model.image_width": 256,
        "model.image_layers": 6,
        "model.image_heads": 4,
        "model.text_width": 256,
        "model.text_layers": 4,
        "model.text_heads": 4,
        "model.joint_width": 256,
        "optim.weight_decay": 0.2,
        "train.steps": 20_000,
    },
    "b32": {**VIT_B, "model.patch_px": 32},
    "b16": {**VIT_B, "model.patch_px": 16},
    "l14": {
        **PAPER,
        "model.patch_px": 14,
        "model.image_width": 1024,
        "model.image_layers": 24,
        "model.image_heads": 16,
        "model.text_width": 768,
        "model.text_layers": 12,
        "model.text_heads": 12,
        "model.joint_width": 768,
        "optim.lr": 4e-4,
    },
    "h16": {
        **PAPER,
        "data.image_px": 256,
        "model.patch_px": 16,
        "model.image_width": 1280,
        "model.image_layers": 32,
        "model.image_heads": 16,
        "model.text_width": 1024,
        "model.text_layers": 24,
        "model.text_heads": 16,
        "model.joint_width": 1024,
        "optim.lr": 3e-4,
    },
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A CLIP of the given size."""
    args = cfg.parse_args(arg, size="shapes")
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "clip"

    c.data.add_bos_eos = True
    c.data.batch = 128
    c.data.eval_batch = 256

    c.model = cfg.ConfigDict(
        dict(
            patch_px=0,
            image_width=0,
            image_layers=0,
            image_heads=0,
            text_width=0,
            text_layers=0,
            text_heads=0,
            joint_width=0,
            pixel_norm=False,  # openai/CLIP's mean and deviation; without it, pictures in [-1, 1]
            eos_id=3,  # SentencePiece; 49407 for openai/CLIP's tokenizer
            # Unrolled layers are 22 % faster on a CPU core.
            scan_layers=False,
            remat="none",
        )
    )
    c.stages.dvae = ""  # the codec's workdir, for recon_prob
    c.stages.dvae_config = "configs/dvae.py"  # the codec's shape, for plans and dry runs
    c.loss = cfg.ConfigDict(
        dict(
            mask_duplicates=True,  # identical captions in a batch are not negatives
            recon_prob=0.0,  # share of pictures replaced by the codec's reconstructions
        )
    )

    c.optim.lr = 2e-3
    c.optim.beta2 = 0.98
    c.optim.eps = 1e-6
    c.optim.weight_decay = 0.05

    cfg.apply(c, cfg.size_overrides(args, SIZES))
    return c
