"""The cases of `bench` in other PyTorch projects: diffusers, transformers, OpenAI's dall_e,
lucidrains' DALLE-pytorch and DALLE2-pytorch, and a plain transformer (`torch_gpt`).

Each has the sizes of our own config, float32, random weights and inputs, and the fused AdamW. Parts
of a peer's network that ours does not have are off if there is a switch. `benchmarks.peers` lists
the peers, and is the only module that imports this one.
"""

import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import dall_e.decoder
import dall_e.encoder
import dalle2_pytorch
import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils import flop_counter

from dalle_jax.benchmarks import torch_gpt
from dalle_jax.benchmarks.measure import Case
from dalle_jax.config import ConfigDict
from dalle_jax.models import build
from dalle_jax.models.dalle import DalleConfig
from dalle_jax.stages import by_shape

_LR, _DECAY = 3e-4, 0.01
# Our kinds of attention -> DALLE-pytorch's.
_KINDS = {"full": "full", "row": "axial_row", "column": "axial_col", "conv": "conv_like"}
# DALLE-pytorch's transformer reads its sizes from a VAE; given codes, it never runs the VAE.
_TINY_VAE = dict(hidden_dim=8, codebook_dim=8, num_resnet_blocks=0)


def gpt_train(config: ConfigDict) -> Case:
    """A step of the plain transformer."""
    c = _dalle(config)
    net, text, codes = torch_gpt.Gpt(c), _text(config, c), _codes(config, c)
    return _train(config, net, lambda: net.loss(text, codes), tokens=c.length)


def gpt_sample(config: ConfigDict) -> Case:
    """Sampling from it, one prompt per picture."""
    c = _dalle(config)
    net, text = torch_gpt.Gpt(c).eval(), _text(config, c)
    return _call(config, net, lambda: net.sample(text), tokens=c.num_image_tokens)


def dalle_pytorch_train(config: ConfigDict) -> Case:
    """A step of DALLE-pytorch's transformer."""
    c, package = _dalle(config), _dalle_pytorch()
    halvings = int(math.log2(config.data.image_px // c.grid))
    vae = package.DiscreteVAE(
        image_size=config.data.image_px, num_layers=halvings, num_tokens=c.num_codes, **_TINY_VAE
    )
    net = package.DALLE(
        dim=c.transformer.width,
        vae=vae,
        num_text_tokens=c.vocab_size,
        text_seq_len=c.text_len,
        depth=c.transformer.num_layers,
        heads=c.transformer.num_heads,
        dim_head=c.transformer.width // c.transformer.num_heads,
        attn_types=tuple(_KINDS[kind] for kind in c.attention),
        shift_tokens=False,
        rotary_emb=False,
    )
    for module in net.modules():
        if hasattr(module, "to_qkv"):
            module.to_qkv = _Chunked(module.to_qkv)
    text, codes = _text(config, c), _codes(config, c)
    return _train(config, net, lambda: net(text, codes, return_loss=True), tokens=c.length)


def dalle_pytorch_dvae(config: ConfigDict) -> Case:
    """A step of DALLE-pytorch's dVAE: 4x4 convolutions of stride 2 and 64 channels."""
    net = _dalle_pytorch().DiscreteVAE(
        image_size=config.data.image_px,
        num_layers=config.model.halvings,
        num_tokens=config.model.num_codes,
        codebook_dim=config.model.width,
        hidden_dim=config.model.width // 4,
        num_resnet_blocks=config.model.num_blocks,
    )
    images = _images(config)
    return _train(config, net, lambda: net(images, return_loss=True))


def dall_e_codec(config: ConfigDict) -> Case:
    """OpenAI's released encoder, likeliest codes, decoder."""
    sizes = dict(
        n_hid=config.model.width,
        vocab_size=config.model.num_codes,
        use_mixed_precision=False,
    )
    encoder, decoder = dall_e.encoder.Encoder(**sizes), dall_e.decoder.Decoder(**sizes)
    net, images = nn.ModuleList([encoder, decoder]), _images(config)

    def there_and_back() -> Tensor:
        codes = encoder(images).argmax(1)
        return decoder(F.one_hot(codes, config.model.num_codes).permute(0, 3, 1, 2).float())

    return _call(config, net, there_and_back)


def clip_train(config: ConfigDict) -> Case:
    """A step of transformers' CLIP."""
    net = _clip(config)
    inputs = dict(pixel_values=_images(config), input_ids=_caption(config))
    return _train(config, net, lambda: net(**inputs, return_loss=True).loss)


def clip_score(config: ConfigDict) -> Case:
    """The similarities that transformers' CLIP finds."""
    net = _clip(config).eval()
    inputs = dict(pixel_values=_images(config), input_ids=_caption(config))
    return _call(config, net, lambda: net(**inputs).logits_per_image)


def diffusers_prior_train(config: ConfigDict) -> Case:
    """A step of diffusers' prior."""
    net, (x, embedding, caption) = _diffusers_prior(config), _embeddings(config)
    time = torch.randint(0, 1000, (len(x),), generator=_random(config))

    def loss() -> Tensor:
        return F.mse_loss(net(x, time, embedding, caption).predicted_image_embedding, x)

    return _train(config, net, loss)


def diffusers_prior_sample(config: ConfigDict, steps: int) -> Case:
    """Drawing with it by its own scheduler."""
    net, (x, embedding, caption) = _diffusers_prior(config).eval(), _embeddings(config)
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
    )

    def sample() -> Tensor:
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps
        now = x
        for i, time in enumerate(times):
            predicted = net(now, time, embedding, caption).predicted_image_embedding
            before = times[i + 1] if i + 1 < len(times) else None
            now = scheduler.step(predicted, time, now, prev_timestep=before).prev_sample
        return now

    return _call(config, net, sample)


def dalle2_prior_train(config: ConfigDict) -> Case:
    """A step of DALLE2-pytorch's prior."""
    prior, (x, embedding, caption) = _dalle2_prior(config), _embeddings(config)
    return _train(
        config,
        prior,
        lambda: prior(text_embed=embedding, image_embed=x, text_encodings=caption),
    )


def dalle2_prior_sample(config: ConfigDict, steps: int) -> Case:
    """Drawing with it."""
    prior, (x, embedding, caption) = _dalle2_prior(config).eval(), _embeddings(config)
    known = dict(text_embed=embedding, text_encodings=caption)

    def sample() -> Tensor:
        # It prints a progress bar for each sample.
        return prior.p_sample_loop(tuple(x.shape), text_cond=known, timesteps=steps)

    return _call(config, prior, sample)


def diffusers_unet(config: ConfigDict) -> Case:
    """A step of diffusers' U-Net; its attention blocks have an MLP, ours have none."""
    m, size = config.model, config.data.image_px
    widths = tuple(m.width * mult for mult in m.channel_mults)
    has = [size // 2**level in m.attention_px for level in range(len(widths))]
    net = diffusers.UNet2DConditionModel(
        sample_size=size,
        in_channels=3,
        out_channels=6,
        down_block_types=tuple("CrossAttnDownBlock2D" if h else "DownBlock2D" for h in has),
        up_block_types=tuple("CrossAttnUpBlock2D" if h else "UpBlock2D" for h in has[::-1]),
        block_out_channels=widths,
        layers_per_block=m.num_blocks,
        norm_num_groups=math.gcd(32, m.width),
        attention_head_dim=tuple(width // m.head_width for width in widths),
        cross_attention_dim=widths[-1],
    )
    images, random = _images(config), _random(config)
    tokens = torch.randn(len(images), 4, widths[-1], generator=random)
    time = torch.randint(0, 1000, (len(images),), generator=random)

    def loss() -> Tensor:
        return F.mse_loss(net(images, time, tokens).sample[:, :3], images)

    return _train(config, net, loss)


def dalle2_unet(config: ConfigDict) -> Case:
    """A step of DALLE2-pytorch's U-Net."""
    m, size = config.model, config.data.image_px
    has = tuple(size // 2**level in m.attention_px for level in range(len(m.channel_mults)))
    net = dalle2_pytorch.Unet(
        dim=m.width,
        image_embed_dim=m.width * m.channel_mults[-1],
        cond_dim=m.width,
        channels_out=6,
        dim_mults=tuple(m.channel_mults),
        num_resnet_blocks=m.num_blocks,
        self_attn=has,
        attn_dim_head=m.head_width,
        attn_heads=4,
        cond_on_image_embeds=True,
        init_cross_embed=False,
    )
    images, random = _images(config), _random(config)
    embedding = torch.randn(len(images), m.width * m.channel_mults[-1], generator=random)
    time = torch.randint(0, 1000, (len(images),), generator=random)

    def loss() -> Tensor:
        return F.mse_loss(net(images, time, image_embed=embedding)[:, :3], images)

    return _train(config, net, loss)


class _Chunked(nn.Module):
    """A projection whose output is cut into slices when its caller requests chunks.

    DALLE-pytorch scales a chunk in place; PyTorch 2 refuses that of chunks, not of slices.
    """

    def __init__(self, project: nn.Module):
        super().__init__()
        self.project = project

    def forward(self, x: Tensor) -> Any:
        y = self.project(x)

        def chunk(count: int, dim: int) -> list[Tensor]:
            size = y.shape[dim] // count
            return [y.narrow(dim, i * size, size) for i in range(count)]

        return types.SimpleNamespace(chunk=chunk)


def _train(config: ConfigDict, net: nn.Module, loss: Callable[[], Tensor], tokens: int = 0) -> Case:
    """A step: forward, backward, AdamW, the loss on the host."""
    params = [param for param in net.parameters() if param.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=_LR, weight_decay=_DECAY, fused=True)
    net.train()

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimiser.step()
        return value.item()

    return _case(config, params, step, tokens)


def _call(config: ConfigDict, net: nn.Module, function: Callable, tokens: int = 0) -> Case:
    return _case(config, net.parameters(), torch.inference_mode()(function), tokens)


def _case(
    config: ConfigDict, params: Iterator[nn.Parameter], function: Callable[[], Any], tokens: int
) -> Case:
    def count() -> float:
        with flop_counter.FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    size = config.data.batch
    number = sum(param.numel() for param in params)
    return Case(lambda: function, size, tokens=tokens * size, params=number, flops=count)


def _dalle_pytorch() -> types.ModuleType:
    """The package, without what only its VQGAN loader imports: the authors' old training stack."""
    for name in ("omegaconf", "taming", "taming.models", "taming.models.vqgan", "pkg_resources"):
        stub = types.ModuleType(name)
        stub.OmegaConf = stub.VQModel = stub.GumbelVQ = stub.get_distribution = None
        sys.modules.setdefault(name, stub)
    import dalle_pytorch

    return dalle_pytorch


def _dalle(config: ConfigDict) -> DalleConfig:
    codec = by_shape.codec(config)
    return build.dalle(config, codec.grid, codec.num_codes).config


def _clip(config: ConfigDict) -> nn.Module:
    m, data = config.model, config.data
    text = dict(
        vocab_size=data.vocab_size,
        max_position_embeddings=data.text_len,
        hidden_size=m.text_width,
        intermediate_size=4 * m.text_width,
        num_hidden_layers=m.text_layers,
        num_attention_heads=m.text_heads,
        projection_dim=m.joint_width,
        eos_token_id=m.eos_id,
    )
    vision = dict(
        image_size=data.image_px,
        patch_size=m.patch_px,
        hidden_size=m.image_width,
        intermediate_size=4 * m.image_width,
        num_hidden_layers=m.image_layers,
        num_attention_heads=m.image_heads,
        projection_dim=m.joint_width,
    )
    sizes = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=m.joint_width
    )
    return transformers.CLIPModel(sizes)


def _diffusers_prior(config: ConfigDict) -> nn.Module:
    m = config.model
    return diffusers.PriorTransformer(
        num_attention_heads=m.num_heads,
        attention_head_dim=m.width // m.num_heads,
        num_layers=m.num_layers,
        embedding_dim=m.width,
        num_embeddings=config.data.text_len,
        additional_embeddings=4,
    )


def _dalle2_prior(config: ConfigDict) -> nn.Module:
    m = config.model
    net = dalle2_pytorch.DiffusionPriorNetwork(
        dim=m.width,
        max_text_len=config.data.text_len,
        depth=m.num_layers,
        heads=m.num_heads,
        dim_head=m.width // m.num_heads,
    )
    return dalle2_pytorch.DiffusionPrior(net, image_embed_dim=m.width)


def _random(config: ConfigDict) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed)


def _images(config: ConfigDict) -> Tensor:
    """[B, 3, h, w] in [0, 1)."""
    data = config.data
    return torch.rand(data.batch, 3, data.image_px, data.image_px, generator=_random(config))


def _caption(config: ConfigDict) -> Tensor:
    """[B, T] ids that end with CLIP's end."""
    data = config.data
    shape = (data.batch, data.text_len)
    text = torch.randint(1, data.vocab_size, shape, generator=_random(config))
    text[:, -1] = config.model.eos_id
    return text


def _text(config: ConfigDict, c: DalleConfig) -> Tensor:
    shape = (config.data.batch, c.text_len)
    return torch.randint(1, c.vocab_size, shape, generator=_random(config))


def _codes(config: ConfigDict, c: DalleConfig) -> Tensor:
    shape = (config.data.batch, c.num_image_tokens)
    return torch.randint(0, c.num_codes, shape, generator=_random(config))


def _embeddings(config: ConfigDict) -> tuple[Tensor, Tensor, Tensor]:
    """A picture's, its caption's [B, D], and the caption's tokens [B, T, D]."""
    size, width, random = config.data.batch, config.model.width, _random(config)
    x = torch.randn(size, width, generator=random)
    embedding = torch.randn(size, width, generator=random)
    return x, embedding, torch.randn(size, config.data.text_len, width, generator=random)
