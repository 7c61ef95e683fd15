"""Every shared key of every config, with its default. Not a training config by itself.

A config file starts from `get_config()` here and changes only what differs, in the order data,
model, optim, train, mesh. Keys are locked: a misspelt one is refused with the nearest name.
"""

from dalle_jax import config as cfg


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """The shared defaults; `task` and `model` are left for the config file to fill."""
    cfg.parse_args(arg)
    c = cfg.ConfigDict()
    c.task = ""  # a key of dalle_jax.tasks.TASKS
    c.seed = 0  # order of examples, initialisation, every noise stream
    c.init_from = ""  # workdir whose weights start this run; a vqvae may start a dvae
    c.dtype = cfg.ConfigDict(dict(param="float32", compute="float32"))  # bfloat16 on TPU and GPU

    c.data = cfg.ConfigDict(
        dict(
            source="shapes",  # a name in dalle_jax.data.sources, or a prepared set's own name
            data_dir="data",  # where prepared sets live: DATA_DIR/NAME/VERSION
            split="train",
            eval_split="validation",
            image_px=32,
            batch=32,  # global: all devices of all processes together
            eval_batch=64,
            crop="none",  # none (resize only) | dvae | dalle | clip | center
            image_key="image",  # other TFDS sets: where the picture is
            caption_key="captions",  # where the text is; `a/[]/text` picks one of a list
            label_template="",  # "a photo of a {label}" for labelled sets without captions
            vocab_size=512,  # SentencePiece pieces; the model adds one padding id per position
            text_len=24,
            bpe_dropout=0.0,  # paper: 0.1, training only
            caption_drop=0.0,  # empty caption with this probability: needed for --guidance
            add_bos_eos=False,  # CLIP pools at EOS
            cache_mib=1024,  # decoded pictures kept in memory when the whole split fits
            threads=2,
            prefetch=2,  # batches read ahead
        )
    )
    c.model = cfg.ConfigDict()
    c.stages = cfg.ConfigDict()  # workdirs of the frozen networks this one needs, e.g. dvae

    c.optim = cfg.ConfigDict(
        dict(
            name="adamw",  # adamw | muon (matrices by muon, the rest by adamw) | adafactor
            lr=1e-3,
            schedule="cosine",  # constant | cosine | plateau_halving (see engine/optim.py)
            warmup_steps=100,
            decay_steps=0,  # 0 = train.steps
            end_lr_ratio=0.02,
            beta1=0.9,
            beta2=0.99,
            eps=1e-8,
            weight_decay=1e-4,
            clip_norm=1.0,  # 0 = off
            ema_decay=0.999,  # of the weights; 0 = off. Warmed up: min(decay, (1+t)/(10+t))
            accum_steps=1,  # gradient accumulation: micro-batches per update
            mu_dtype="float32",  # first moment; bfloat16 saves 2 bytes a parameter
            nu_dtype="float32",  # second moment; bfloat16 needs beta2 <= 0.99
            grad_reduce_dtype="compute",  # sum over devices of layer gradients; or float32
        )
    )
    c.train = cfg.ConfigDict(
        dict(
            steps=1000,
            log_every_steps=50,
            eval_every_steps=0,  # 0 = only at the end
            eval_batches=4,
            save_every_steps=500,
            keep_last=2,
            keep_every_steps=0,  # 0 = none kept for ever
            preview_every_steps=0,  # 0 = only at the end
            tensorboard=True,
            wandb_project="",  # needs the wandb extra
        )
    )
    c.mesh = cfg.ConfigDict(
        dict(
            data=-1,  # -1 = what is left of the devices
            fsdp=1,
            tensor=1,
            rules="dp",  # a name of dalle_jax.axes.RULES; "fsdp,vocab=tensor" changes a row
        )
    )
    return c
