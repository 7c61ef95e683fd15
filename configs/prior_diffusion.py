"""The diffusion prior of DALL-E 2 (Ramesh et al. 2022, arXiv:2204.06125, §2.2 and appendix C).

    python -m dalle_jax train --config=configs/prior_diffusion.py:size=shapes \
        --config.stages.clip=runs/clip --workdir=runs/prior

Sizes (`size=`):

    smoke         a minute on a CPU
    demo, shapes  32 px generated scenes
    emoji         captioned emoji
    single_gpu    your own pairs; not run here
    paper         24 layers of width 2048 with 32 heads, over ViT-H/16 embeddings: 1.21 billion
                  parameters in the blocks; not run here

`steps=` changes a size; 0 keeps its own value. Text length, vocabulary and tokenizer are the
CLIP's. Compare eval/cosine with eval/cosine_text and eval/retrieval1 with eval/retrieval1_text:
tasks/prior.py describes them.
"""

from dalle_jax import config as cfg

# Sizes with a CLIP for photographs. The paper gives neither warm-up nor decay.
LARGE = {
    "dtype.compute": "bfloat16",
    "data.source": "pairs",
    "data.batch": 512,
    "data.crop": "clip",
    "data.text_len": 77,
    "data.vocab_size": 49408,
    "model.norm": "layer",
    "model.use_bias": True,
    "model.embed_std": 0.02,
    "model.scan_layers": True,
    "optim.lr": 1.1e-4,
    "optim.schedule": "constant",
    "optim.warmup_steps": 1000,
    "optim.ema_decay": 0.9999,
    "train.log_every_steps": 100,
    "train.eval_every_steps": 10_000,
    "train.save_every_steps": 2_000,
}

SIZES = {
    "smoke": {
        "data.batch": 32,
        "data.eval_batch": 64,
        "model.width": 64,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "stages.clip_config": "configs/clip.py:size=smoke",
        "optim.warmup_steps": 10,
        "train.steps": 60,
        "train.log_every_steps": 10,
        "train.save_every_steps": 30,
    },
    "demo": {
        "data.batch": 64,
        "data.text_len": 12,
        "model.width": 128,
        "model.num_layers": 3,
        "model.num_heads": 4,
        "stages.clip_config": "configs/clip.py:size=demo",
        "train.steps": 800,
    },
    "shapes": {
        "data.batch": 128,
        "data.text_len": 12,
        "model.width": 192,
        "model.num_layers": 6,
        "model.num_heads": 6,
        "stages.clip_config": "configs/clip.py:size=shapes",
        "train.steps": 6000,
        "train.eval_every_steps": 1000,
        "train.save_every_steps": 500,
    },
    "emoji": {
        "data.source": "emoji",
        "data.batch": 128,
        "data.text_len": 24,
        "data.vocab_size": 2048,
        "model.width": 192,
        "model.num_layers": 6,
        "model.num_heads": 6,
        "model.dropout": 0.1,  # about 10k pictures: it overfits
        "stages.clip_config": "configs/clip.py:size=emoji",
        "train.steps": 6000,
        "train.eval_every_steps": 1000,
        "train.save_every_steps": 500,
    },
    "single_gpu": {
        **LARGE,
        "data.image_px": 224,
        "model.width": 768,
        "model.num_layers": 12,
        "model.num_heads": 12,
        "stages.clip_config": "configs/clip.py:size=b32",
        "train.steps": 200_000,
    },
    "paper": {
        **LARGE,
        "data.image_px": 256,
        "data.batch": 4096,
        "data.eval_batch": 4096,
        "model.width": 2048,
        "model.num_layers": 24,
        "model.num_heads": 32,
        "model.remat": "full",
        "stages.clip_config": "configs/clip.py:size=h16",
        "train.steps": 600_000,
        "mesh.fsdp": 16,
        "mesh.rules": "fsdp",
    },
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """A diffusion prior of the given size; `steps` changes it, 0 keeps its own value."""
    args = cfg.parse_args(arg, size="shapes", steps=0)
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "prior"

    c.data.eval_batch = 256
    c.data.add_bos_eos = True  # captions as the CLIP reads them
    c.model = cfg.ConfigDict(
        dict(
            kind="diffusion",
            width=0,
            num_layers=0,
            num_heads=0,
            mlp_ratio=4,
            norm="rms",
            activation="gelu",
            use_bias=False,
            dropout=0.0,
            embed_std=0.5,
            schedule="cosine",
            num_steps=1000,
            # Unrolled layers are faster on a CPU core.
            scan_layers=False,
            remat="none",
        )
    )
    c.stages.clip = ""  # workdir of the CLIP: required
    c.stages.clip_config = ""  # the CLIP's shape, for plans and dry runs
    c.loss = cfg.ConfigDict(
        dict(
            text_drop=0.1,  # share of examples without caption and text embedding, for guidance
            eval_steps=16,  # sampling steps on held-out batches; paper 64
        )
    )

    c.optim.lr = 1e-3
    # beta2, eps and weight decay are the paper's.
    c.optim.beta2 = 0.96
    c.optim.eps = 1e-6
    c.optim.weight_decay = 6.0e-2

    cfg.apply(c, cfg.size_overrides(args, SIZES, steps="train.steps"))
    return c
