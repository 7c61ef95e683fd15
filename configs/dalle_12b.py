"""The paper's 12-billion-parameter DALL-E (Ramesh et al. 2021, table 1 and appendices B to D).

    python -m dalle_jax train --config=configs/dalle_12b.py --config.stages.dvae=DIR --workdir=DIR

`--dry_run` prints every array and its sharding and computes nothing; it needs neither the codec
nor data. `plan` estimates what the run costs on a machine that you do not have:

    python -m dalle_jax plan --config=configs/dalle_12b.py --topology=v5e:16x16

The model has 64 layers of width 3968, 62 heads of 64, 256 text slots and 32x32 codes of 8192:
12,292,808,448 parameters. In the paper it trains for 430,000 updates at batch 1024 on 1024
V100-16GB, and its zero-shot FID on MS-COCO is about 28. It was not run here. The weights, their
average and AdamW's moments take 183 GiB in float32, 1.5 GiB on each of 128 fsdp shards.

3968 = 2**7 * 31: fsdp divides it up to 128-fold (256 chips = data 2 x fsdp 128), and the heads
divide by 2 or 31 only, so tensor parallelism is off. On v4 and v5p, use `--config.mesh.fsdp=32`:
along an axis over a whole 4x4x8 torus, their compiler turns all gathers and scatters into
all-reduces.
"""

from dalle_jax import config as cfg


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """The 12B run."""
    cfg.parse_args(arg)
    c = cfg.sibling(__file__, "base").get_config()
    c.task = "dalle"
    c.dtype.compute = "bfloat16"

    c.data.source = "pairs"  # your own prepared set of 256 px pairs
    c.data.image_px = 256
    c.data.crop = "dalle"
    c.data.text_len = 256
    c.data.vocab_size = 16384
    c.data.bpe_dropout = 0.1
    c.data.batch = 1024
    c.data.eval_batch = 1024

    c.model = cfg.ConfigDict(
        dict(
            width=3968,
            num_layers=64,
            num_heads=62,
            mlp_ratio=4,
            gated=False,
            attention=("row", "column", "row", "row"),
            last_attention="conv",
            conv_kernel=11,
            norm="layer",
            use_bias=True,
            dropout=0.0,
            embed_std=0.002,  # 0.125 / sqrt(width)
            scan_layers=True,
            remat="full",
            attention_impl="auto",  # dense | structured | splash | cudnn, see nn/attention.py
        )
    )
    c.stages.dvae = ""  # workdir of the codec: required
    c.stages.dvae_config = "configs/dvae_paper.py"  # the codec's shape, for plans and dry runs
    c.stages.from_codes = False
    c.stages.encode_chunk = 1  # the TPU's compiler then takes 115 s, not 189 s, for the codec

    c.optim.name = "adamw"
    c.optim.lr = 4.5e-4
    c.optim.schedule = "plateau_halving"  # the paper halved by hand, five times
    c.optim.warmup_steps = 5000
    c.optim.beta1 = 0.9
    c.optim.beta2 = 0.96
    c.optim.eps = 1e-8
    c.optim.weight_decay = 4.5e-2
    c.optim.clip_norm = 4.0
    # The paper averages on the CPU every 25 updates with 0.99: 0.9996 per update.
    c.optim.ema_decay = 0.9996
    c.train.steps = 430_000
    c.train.log_every_steps = 100
    c.train.save_every_steps = 2_000
    c.train.eval_every_steps = 10_000
    c.train.preview_every_steps = 10_000

    c.mesh.data = -1
    c.mesh.fsdp = 128
    c.mesh.rules = "fsdp"
    return c
