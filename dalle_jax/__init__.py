"""dalle_jax: DALL-E and DALL-E 2 in JAX, from raw pairs to edited pictures, on a laptop or a pod."""

__version__ = "0.1.0"
