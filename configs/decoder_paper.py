"""unCLIP's decoder at the paper's size (Ramesh et al. 2022, arXiv:2204.06125 table 3, appendix C).

    python -m dalle_jax train --config=configs/decoder_paper.py \
        --config.stages.clip=DIR --workdir=DIR --config.data.source=YOUR_SET

`--dry_run` prints every array and its sharding and computes nothing; it needs neither the CLIP nor
data. 64 px, 512 channels x (1, 2, 3, 4), 3 blocks a level, attention at 32, 16 and 8 px, a text
encoder of 24 layers of 2048 on 256 ids. Paper: 3.5 billion parameters, 800,000 updates of batch
2048; MS-COCO FID 10.39 with the diffusion prior. Not run here. Learning rate without a schedule,
as the paper names none; warm-up and clipping are ours.

`size=smoke` is the same network and objective in miniature, a minute on a CPU.
"""

from dalle_jax import config as cfg


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """The paper's numbers, or the same in miniature."""
    args = cfg.parse_args(arg, size="paper")
    if args.size not in ("paper", "smoke"):
        raise cfg.UsageError(f"size={args.size!r} is unknown; use paper or smoke.")
    if args.size == "smoke":
        c = cfg.sibling(__file__, "decoder").get_config("size=smoke")
        c.model.channel_mults, c.model.patch_px, c.model.attention_px = (1, 2, 3, 4), 1, (16, 8, 4)
        c.model.dropout = 0.1
        return c
    c = cfg.sibling(__file__, "decoder").get_config("size=single_gpu")

    # A caption in the form of the frozen CLIP; the paper's text encoder reads 256 ids of its own.
    c.data.batch, c.data.eval_batch = 2048, 2048
    c.data.text_len, c.data.vocab_size = 77, 49408

    c.model.width = 512
    c.model.text_width, c.model.text_layers, c.model.text_heads = 2048, 24, 32
    c.stages.clip_config = "configs/clip.py:size=h16"
    c.loss.preview_spacing = "250"

    c.optim.lr = 1.2e-4
    c.optim.beta2, c.optim.eps = 0.999, 1e-8
    c.optim.ema_decay = 0.9999
    c.train.steps = 800_000
    c.mesh.fsdp = 64
    c.mesh.rules = "fsdp"
    return c
