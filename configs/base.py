"""Every field that all configs share, with its default. It is not a training config by itself.

A config file starts from `get_config()` here and changes only what differs, in the order data,
model, stages, loss, optim, train, mesh. A size is one dict of dotted overrides. Fields are locked:
a misspelt one is refused with the nearest name. A file of your own starts from any of these:
`c = cfg.start_from("base")` or `cfg.start_from("dalle:size=emoji")`.
"""

from dalle_jax import config as cfg


def get_config(arg: str | None = None) -> cfg.ConfigDict:
    """The shared defaults; `task` and `model` are left for the config file to fill."""
    cfg.parse_args(arg)
    c = cfg.ConfigDict()
    c.task = ""  # a key of dalle_jax.tasks.TASKS
    c.seed = 0  # of the order of examples, the initialisation and all noise
    c.init_from = ""  # workdir with the first weights; a vqvae may start a dvae
    c.dtype = cfg.ConfigDict(
        dict(
            param="float32",
            compute="float32",  # bfloat16 on TPU and GPU
        )
    )

    c.data = cfg.ConfigDict(
        dict(
            source="shapes",  # a name in dalle_jax.data.sources, or a prepared set's own name
            data_dir="data",  # folder of the prepared sets: DATA_DIR/NAME/VERSION
            split="train",
            eval_split="validation",
            image_px=32,
            batch=32,  # global: over all devices of all processes
            eval_batch=64,
            crop="none",  # none (resize only) | dvae | dalle | clip | center
            image_key="image",  # field of the picture, for other TFDS sets
            caption_key="captions",  # field of the text; `a/[]/text` picks one from a list
            label_template="",  # "a photo of a {label}" for labelled sets without captions
            vocab_size=512,  # SentencePiece pieces; the model adds one padding id per position
            text_len=24,
            bpe_dropout=0.0,  # paper: 0.1, training only
            caption_drop=0.0,  # probability of an empty caption; --guidance needs it
            add_bos_eos=False,  # CLIP pools at EOS
            cache_mib=1024,  # memory for decoded pictures
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
            ema_decay=0.999,  # weight average; 0 = off. Step t uses min(decay, (1+t)/(10+t))
            accum_steps=1,  # gradient accumulation: micro-batches per update
            mu_dtype="float32",  # first moment; bfloat16 saves 2 bytes a parameter
            nu_dtype="float32",  # second moment; bfloat16 needs beta2 <= 0.99
            grad_reduce_dtype="compute",  # sum of layer gradients over devices; or float32
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
            keep_every_steps=0,  # checkpoints that are never deleted; 0 = none
            # With several processes: if one step, evaluation, preview or save takes longer, all of
            # them stop with a message.
            hang_timeout_s=1200,  # longest wait for another process; 0 = for ever
            preview_every_steps=0,  # 0 = only at the end
            tensorboard=True,
            wandb_project="",  # needs the wandb extra
            profile_steps=0,  # number of steps traced into WORKDIR/profile
            profile_at=10,  # first traced step, counted from the start or resume of the run
            dump_hlo=False,  # the compiled step as text: WORKDIR/hlo/step.txt.gz
        )
    )
    c.mesh = cfg.ConfigDict(
        dict(
            data=-1,  # -1 = all devices that fsdp and tensor leave
            fsdp=1,
            tensor=1,
            rules="dp",  # a key of dalle_jax.axes.RULES; "fsdp,vocab=tensor" changes a row
        )
    )
    return c
