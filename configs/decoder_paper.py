"""unCLIP's decoder at the paper's size (Ramesh et al. 2022, arXiv:2204.06125 table 3, appendix C).

    python -m dalle_jax train --config=configs/decoder_paper.py \
        --config.stages.clip=DIR --workdir=DIR --config.data.source=YOUR_SET

`--dry_run` prints every array and its sharding and computes nothing; it needs neither the CLIP nor
data. The network works at 64 px, with 512 channels x (1, 2, 3, 4), 3 blocks a level and attention
at 32, 16 and 8 px; the text encoder has 24 layers of width 2048 and reads 256 ids. In the paper it
has 3.5 billion parameters and trains for 800,000 updates at batch 2048; with the diffusion prior,
its FID on MS-COCO is 10.39. It was not run here. The learning rate is constant, because the paper
names no schedule; warm-up and clipping are ours.

`size=smoke` is the same network and objective in miniature and takes a minute on a CPU.
"""

from dalle_jax import config as cfg

# The size of configs/decoder.py that each of SIZES starts from.
START = {"paper": "single_gpu", "smoke": "smoke"}

SIZES = {
    "paper": {
        "data.batch": 2048,
        "data.eval_batch": 2048,
        # Captions have the frozen CLIP's form; the paper's text encoder reads 256 ids of its own.
        "data.text_len": 77,
        "data.vocab_size": 49408,
        "model.width": 512,
        "model.text_width": 2048,
        "model.text_layers": 24,
        "model.text_heads": 32,
        "stages.clip_config": "configs/clip.py:size=h16",
        "loss.preview_spacing": "250",
        "optim.lr": 1.2e-4,
        "optim.beta2": 0.999,
        "optim.eps": 1e-8,
        "optim.ema_decay": 0.9999,
        "train.steps": 800_000,
        "mesh.fsdp": 64,
        "mesh.rules": "fsdp",
    },
    "smoke": {
        "model.channel_mults": (1, 2, 3, 4),
        "model.attention_px": (16, 8, 4),
        "model.dropout": 0.1,
        "model.patch_px": 1,
    },
}


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """The paper's numbers, or the same in miniature."""
    args = cfg.parse_args(arg, size="paper")
    changes = cfg.size_overrides(args, SIZES)
    c = cfg.sibling(__file__, "decoder").get_config(f"size={START[args.size]}")
    cfg.apply(c, changes)
    return c
