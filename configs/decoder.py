"""unCLIP's decoder (Ramesh et al. 2022, arXiv:2204.06125 §2.1) at sizes that one machine trains.

    python -m dalle_jax train --config=configs/decoder.py:size=shapes \
        --config.stages.clip=runs/clip --workdir=runs/decoder

Sizes (`size=`):

    smoke       a minute on a CPU
    demo        generated scenes at 32 px; it trains for 13 minutes on two cores
    shapes      the same scenes for an hour on one core
    emoji       captioned emoji at 64 px; it trains for 114 minutes on one core
    single_gpu  64 px, half the paper's width; not run here

`width=`, `patch=` and `steps=` change a size; 0 keeps its own value.

The CPU sizes work on patches: in a network on single pixels, the first level at 32 px costs most of
the step. They predict x_0 and no variance. After 500 steps with 16 pictures each, networks that
predict eps or v still sampled noise, while one that predicts x_0 placed coloured blobs correctly;
the gradient of the variance slowed it down.

To teach a trained decoder to inpaint, add `--config.init_from=runs/decoder
--config.loss.inpaint=true` and give a new workdir: it starts as the same function. The paper's
model is configs/decoder_paper.py.
"""

from dalle_jax import config as cfg


def _quarter(c: cfg.ConfigDict) -> int:
    return c.train.steps // 4


# What the small sizes but smoke change in the paper's objective; smoke runs all parts of it.
SHORT = {
    "model.predicts": "x_0",
    "model.learned_variance": False,
    "loss.snr_cap": 5.0,
}
SCENES = {
    **SHORT,
    "data.image_px": 32,
    "data.batch": 16,
    # Captions of the grammar have at most 9 ids; the pretrained CLIP was trained with 12.
    "data.text_len": 12,
    "model.width": 48,
    "model.channel_mults": (1, 2),
    "model.num_blocks": 1,
    "model.patch_px": 2,
    "model.text_layers": 2,
    "model.text_heads": 2,
    "stages.clip_config": "configs/clip.py:size=shapes",
    "train.eval_every_steps": _quarter,
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
        "model.text_width": 32,
        "model.text_layers": 1,
        "model.text_heads": 2,
        "stages.clip_config": "configs/clip.py:size=smoke",
        "loss.preview_spacing": "5",
        "optim.warmup_steps": 10,
        "optim.ema_decay": 0.9,
        "train.steps": 60,
        "train.log_every_steps": 10,
        "train.save_every_steps": 30,
    },
    "demo": {**SCENES, "model.text_width": 96, "train.steps": 1700},
    "shapes": {
        **SCENES,
        "model.text_width": 128,
        "train.steps": 7000,
        "train.preview_every_steps": _quarter,
    },
    "emoji": {
        **SHORT,
        "data.source": "emoji",
        "data.image_px": 64,
        "data.batch": 16,
        "data.text_len": 24,
        "data.vocab_size": 2048,
        "model.width": 64,
        "model.channel_mults": (1, 2, 3),
        "model.num_blocks": 1,
        "model.patch_px": 4,
        "model.dropout": 0.05,
        "model.text_width": 128,
        "model.text_layers": 2,
        "model.text_heads": 2,
        "stages.clip_config": "configs/clip.py:size=emoji",
        "train.steps": 5600,
        "train.eval_every_steps": 1000,
        "train.preview_every_steps": 1000,
    },
    "single_gpu": {
        "dtype.compute": "bfloat16",
        "data.source": "pairs",
        "data.image_px": 64,
        "data.batch": 128,
        "data.crop": "clip",
        "data.text_len": 77,
        "data.vocab_size": 49408,
        "model.width": 256,
        "model.channel_mults": (1, 2, 3, 4),
        "model.num_blocks": 3,
        "model.attention_px": (32, 16, 8),
        "model.patch_px": 1,
        "model.dropout": 0.1,
        "model.text_width": 1024,
        "model.text_layers": 12,
        "model.text_heads": 16,
        "model.scan_layers": True,
        "model.remat": "full",
        "stages.clip_config": "configs/clip.py:size=b32",
        "optim.lr": 1.2e-4,
        "optim.schedule": "constant",
        "optim.warmup_steps": 5000,
        "optim.beta2": 0.999,
        "optim.ema_decay": 0.9999,
        "train.steps": 400_000,
        "train.log_every_steps": 100,
        "train.eval_every_steps": 5000,
        "train.save_every_steps": 2000,
        "train.preview_every_steps": 5000,
    },
}


def _small_grids(c: cfg.ConfigDict) -> tuple[int, ...]:
    """Sides of the levels' grids that are at most 8."""
    side = c.data.image_px // c.model.patch_px
    return tuple(n for n in (side >> i for i in range(len(c.model.channel_mults))) if n <= 8)


# What follows from the width, the patch and the pixels.
DERIVED = {
    "model.attention_px": _small_grids,
    "model.head_width": lambda c: next(n for n in (64, 32, 16) if c.model.width % n == 0),
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A decoder of the given size; `width`, `patch` and `steps` change it, 0 keeps its own."""
    args = cfg.parse_args(arg, size="shapes", width=0, patch=0, steps=0)
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "diffusion"

    c.data.eval_batch = 64
    c.data.add_bos_eos = True  # captions as the CLIP reads them
    c.model = cfg.ConfigDict(
        dict(
            width=0,
            channel_mults=(),
            num_blocks=0,
            attention_px=(),  # sides of the grids with attention
            head_width=0,
            dropout=0.0,
            patch_px=0,
            predicts="eps",
            learned_variance=True,
            text_width=0,
            text_layers=0,
            text_heads=0,
            clip_tokens=4,
            scan_layers=False,
            remat="none",
        )
    )
    c.stages.clip = ""  # workdir of the CLIP: required
    c.stages.clip_config = ""  # the CLIP's shape, for plans and dry runs
    c.loss = cfg.ConfigDict(
        dict(
            schedule="cosine",
            num_steps=1000,
            clip_drop=0.1,  # share without the embedding, for guidance and captions alone
            text_drop=0.5,
            snr_cap=0.0,  # cap on the steps' weights, `gaussian.capped_weight`; 0 = none, the paper
            time_power=1.0,  # steps T u^p, u uniform; 1 = the paper, 0.5 = noisy ones more often
            inpaint=False,  # the network also sees the known part of a picture
            low_res_px=0,  # above 0: an upsampler, see configs/upsampler.py
            corruption="none",
            crop=1.0,
            preview_spacing="25",
            preview_guidance=2.0,
        )
    )

    c.optim.lr = 1e-3
    c.optim.beta2 = 0.99
    c.optim.weight_decay = 0.0
    c.optim.ema_decay = 0.999

    changes = cfg.size_overrides(
        args, SIZES, width="model.width", patch="model.patch_px", steps="train.steps"
    )
    cfg.apply(c, DERIVED, changes)
    return c
