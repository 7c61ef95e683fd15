"""DALL-E in JAX: from raw pairs of image and caption to ranked pictures, on a laptop or a pod.

    import dalle_jax

    model = dalle_jax.load("shapes")
    pictures = model.sample("a red cube on a white background", candidates=32, keep=8, seed=0)
    pictures[0].save("best.png")

`load` opens a pretrained set, a run's folder or several folders; `train` trains a config. JAX is
imported by the first call, not by `import dalle_jax`.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Model", "Picture", "Pictures", "UsageError", "load", "train"]

# Name -> the module that has it, imported when the name is first asked for.
_MODULES = {
    "Model": "pipelines.model",
    "load": "pipelines.model",
    "Picture": "pipelines.pictures",
    "Pictures": "pipelines.pictures",
    "train": "pipelines.training",
    "UsageError": "types",
}

if TYPE_CHECKING:
    from dalle_jax.pipelines.model import Model, load
    from dalle_jax.pipelines.pictures import Picture, Pictures
    from dalle_jax.pipelines.training import train
    from dalle_jax.types import UsageError


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'dalle_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dalle_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
