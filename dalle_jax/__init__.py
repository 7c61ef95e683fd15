"""DALL-E in JAX: from raw pairs of image and caption to ranked pictures, on a laptop or a pod."""

__version__ = "0.1.0"
