"""DALL-E's transformer in plain PyTorch, for `bench --against=gpt`.

It runs eagerly, without a compiler, with the library's fused attention, a cache of fixed length for
sampling, and the fused AdamW. It has the sizes and parameters of a `models.dalle.DalleConfig`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_jax.models import dalle
from dalle_jax.nn.transformer import TransformerConfig


class Block(nn.Module):
    """Attention and a gated MLP, each after a norm.

    Args:
      c: the sizes.
      mask: [T, T] bool, the keys that each position attends to; None = causal.
    """

    def __init__(self, c: TransformerConfig, mask: Tensor | None):
        super().__init__()
        inner = c.mlp_ratio * c.width
        self.heads, self.mask = c.num_heads, mask
        self.norm_attention, self.norm_mlp = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.qkv, self.out = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        self.wi, self.wo = nn.Linear(c.width, 2 * inner), nn.Linear(inner, c.width)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """[B, n, D] at positions start.. -> the same; fills and reads `cache` [2, B, H, T, d]."""
        size, n, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(size, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            end = start + n
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
            k, v = cache[0, :, :, :end], cache[1, :, :, :end]
        causal = self.mask is None and n > 1
        mask = None if self.mask is None else self.mask[start : start + n, : k.shape[2]]
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.out(a.transpose(1, 2).reshape(size, n, width))
        gate, up = self.wi(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.wo(F.gelu(gate) * up)


class Gpt(nn.Module):
    """The network.

    Args:
      c: its sizes.
    """

    def __init__(self, c: dalle.DalleConfig):
        super().__init__()
        self.c, width = c, c.transformer.width
        self.text = nn.Embedding(c.vocab_size, width)
        self.text_position = nn.Parameter(0.02 * torch.randn(c.text_len, width))
        self.image = nn.Embedding(c.num_codes, width)
        self.row = nn.Parameter(0.02 * torch.randn(c.grid, 1, width))
        self.column = nn.Parameter(0.02 * torch.randn(1, c.grid, width))
        masks = [
            None if mask.kind == "full" else torch.from_numpy(mask.table())
            for mask in c.layer_masks()
        ]
        self.blocks = nn.ModuleList(Block(c.transformer, mask) for mask in masks)
        self.norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, c.vocab_size, bias=False)
        self.image_head = nn.Linear(width, c.num_codes, bias=False)

    def places(self) -> Tensor:
        """[g * g, D]."""
        return (self.row + self.column).flatten(0, 1)

    def loss(self, text: Tensor, codes: Tensor) -> Tensor:
        """[B, T] and [B, g * g] -> the weighted mean cross-entropy, a scalar."""
        x = torch.cat([self.text(text) + self.text_position, self.image(codes) + self.places()], 1)
        for block in self.blocks:
            x = block(x)
        x, first = self.norm(x), self.c.text_len - 1
        text_loss = F.cross_entropy(
            self.text_head(x[:, :first]).flatten(0, 1), text[:, 1:].flatten()
        )
        logits = self.image_head(x[:, first:-1])
        image_loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        return dalle.TEXT_WEIGHT * text_loss + (1 - dalle.TEXT_WEIGHT) * image_loss

    @torch.no_grad()
    def sample(self, text: Tensor) -> Tensor:
        """[B, T] -> [B, g * g] codes."""
        c, t, size = self.c, self.c.transformer, len(text)
        depth = t.width // t.num_heads
        cache = torch.zeros(t.num_layers, 2, size, t.num_heads, c.length, depth)
        codes = torch.zeros(size, c.num_image_tokens, dtype=torch.long)
        x, places, start = self.text(text) + self.text_position, self.places(), 0
        for i in range(c.num_image_tokens):
            n = x.shape[1]
            for block, block_cache in zip(self.blocks, cache, strict=True):
                x = block(x, block_cache, start)
            start += n
            logits = self.image_head(self.norm(x[:, -1]))
            codes[:, i : i + 1] = torch.multinomial(logits.softmax(-1), 1)
            x = self.image(codes[:, i : i + 1]) + places[i]
        return codes
