"""A trained CLIP: embeddings of captions and pictures, and who was trained on them."""

import dataclasses
import functools

import jax
import numpy as np

from dalle_jax import chunks
from dalle_jax import config as cfg
from dalle_jax.engine import checkpoint
from dalle_jax.models import build
from dalle_jax.models.clip import Clip
from dalle_jax.nn import conv
from dalle_jax.stages import run
from dalle_jax.stages.run import Run, Stage
from dalle_jax.types import Array, Params, UsageError

MAX_CHUNK = 64  # rows of one call on the host's side


@dataclasses.dataclass(frozen=True, eq=False)
class ClipStage(Stage):
    """A trained CLIP.

    Attributes:
      origin: fingerprint of the run that it was exported (and so rounded) from; "" for a run.
    """

    origin: str = ""

    @classmethod
    def load(cls, folder: str, step: int | None = None) -> "ClipStage":
        """The CLIP in the folder of a run.

        Raises:
          UsageError: see `Run.open`; or if the weights do not fit the config.
        """
        opened = Run.open(folder, "clip", step)
        origin = (opened.read(checkpoint.ORIGIN) or b"").decode()
        stage = cls(opened, build.clip(opened.config), origin)
        stage.check_shapes(
            lambda params, *inputs: stage.model.apply({"params": params}, *inputs),
            run.picture(stage.image_px),
            run.ids(stage.text_len),
        )
        return stage

    @property
    def joint_width(self) -> int:
        """E, numbers of an embedding."""
        return self.model.config.joint_width

    @property
    def fingerprints(self) -> set[str]:
        """Fingerprints under which runs may know this CLIP: its own and the run's before export."""
        return {self.fingerprint, self.origin} - {""}

    def embed_texts(self, text: Array) -> np.ndarray:
        """Unit text embeddings [B, E] of ids [B, T] int32; each distinct caption runs once."""
        captions, which = np.unique(np.asarray(text, np.int32), axis=0, return_inverse=True)
        return self._embed("encode_text", captions)[which.reshape(-1)]

    def embed_images(self, images: Array) -> np.ndarray:
        """Unit image embeddings [B, E] of images [B, h, h, 3] in [-1, 1], resized to its size."""
        return self._embed("encode_image", np.asarray(images, np.float32))

    def frozen(self) -> Params:
        """The parameters with their logical axis names, as `Task.frozen` takes them."""
        return self.boxed(run.picture(self.image_px), run.ids(self.text_len))["params"]

    def frozen_image_tower(self) -> Params:
        """The part of `frozen` that `encode_image` reads."""
        frozen = self.frozen()
        return {name: frozen[name] for name in ("image", "logit_scale")}

    def image_embeddings(self, params: Params, images: Array) -> Array:
        """z_i [B, E] of images [B, h, w, 3] in [-1, 1], for use inside a step; no gradient.

        Args:
          params: of this network, `frozen` or a part of it that holds the image tower.
          images: resized (bicubic, antialiased) to the CLIP's size.
        """
        return jax.lax.stop_gradient(encode_image(self.model, params, images))

    def embeddings(self, params: Params, images: Array, text: Array) -> tuple[Array, Array]:
        """(z_i, z_t) [B, E] float32 of unit length, for use inside a step; no gradient."""
        text = self.model.apply({"params": params}, text, method="encode_text")
        return self.image_embeddings(params, images), jax.lax.stop_gradient(text)

    def check_trained_on(self, folder: str) -> None:
        """Raises UsageError, naming both, if the run in a folder was trained with another CLIP."""
        file = checkpoint.absolute(folder) / checkpoint.CLIP
        if file.exists() and file.read_text() not in self.fingerprints:
            raise UsageError(
                f"{str(folder)!r} was trained on the embeddings of a CLIP {file.read_text()}, but "
                f"{self.folder!r} holds {self.fingerprint}: another one, or trained on since. Give "
                "the folder of the old one with --clip, or train the stage again."
            )

    def check_reading(self, config: cfg.ConfigDict, tokenizer=None) -> None:
        """Raises UsageError if a run would read captions differently from this frozen CLIP.

        Args:
          config: the run's.
          tokenizer: the run's; None in dry runs.
        """
        name = config.stages.clip or config.stages.clip_config
        if not config.data.add_bos_eos:
            raise UsageError(
                "data.add_bos_eos=False, but CLIP's captions have begin and end; set "
                "--config.data.add_bos_eos=true."
            )
        if config.data.caption_drop:
            raise UsageError(
                f"data.caption_drop={config.data.caption_drop} would give the CLIP empty captions; "
                "set --config.data.caption_drop=0: loss.text_drop is what guidance needs."
            )
        for field in ("text_len", "vocab_size"):
            ours, theirs = config.data[field], getattr(self.model.config, field)
            if ours != theirs:
                raise UsageError(
                    f"data.{field}={ours}, but the CLIP {name} has {theirs}; set "
                    f"--config.data.{field}={theirs}."
                )
        own = b"" if self.tokenizer is None else self.tokenizer.model_bytes
        if tokenizer is not None and tokenizer.model_bytes != own:
            raise UsageError(
                f"the run's tokenizer is not that of the CLIP {name}, so its ids mean other words; "
                "use a new --workdir, for which the CLIP's own is taken."
            )

    def _embed(self, method: str, array: np.ndarray) -> np.ndarray:
        apply = functools.partial(_tower(self.model, method), self.on())
        return chunks.mapped(apply, chunks.power_of_two(len(array), MAX_CHUNK))(array)


def encode_image(model: Clip, params: Params, images: Array) -> Array:
    """Unit embeddings [B, E] of images [B, h, w, 3] in [-1, 1]; pure.

    Images of another size than the network's are resized (bicubic, antialiased) and clipped.
    """
    images = conv.resize(images, model.config.image_px)
    return model.apply({"params": params}, images, method="encode_image")


@functools.lru_cache(maxsize=8)
def _tower(model: Clip, method: str):
    if method == "encode_image":
        return jax.jit(functools.partial(encode_image, model))
    return jax.jit(lambda params, text: model.apply({"params": params}, text, method=method))
