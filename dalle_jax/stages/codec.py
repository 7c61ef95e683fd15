"""A trained codec: pictures to codes and back, by a dVAE or a VQ-VAE."""

import dataclasses
import functools

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax import config as cfg
from dalle_jax.models import build
from dalle_jax.stages import run
from dalle_jax.stages.run import Run, Stage
from dalle_jax.types import Array, Params, UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class Codec(Stage):
    """A trained codec.

    `encode_fn` and `decode_fn` are pure functions of (params, input), to be compiled into larger
    programs; `encode` and `decode` are compiled here.
    """

    @classmethod
    def load(cls, folder: str, step: int | None = None) -> "Codec":
        """The codec in the folder of an autoencoder's run.

        Raises:
          UsageError: see `Run.open`; or if the weights do not fit the config.
        """
        codec = cls.of(Run.open(folder, "autoencode", step))
        codec.check_shapes(
            lambda params, x: codec.decode_fn(params, codec.encode_fn(params, x)),
            run.picture(codec.image_px),
        )
        return codec

    @classmethod
    def of(cls, opened: Run) -> "Codec":
        """The codec of an opened run."""
        return cls(opened, build.autoencoder(opened.config))

    @property
    def params(self) -> Params:
        """All variables of the network, `{"params": …, other collections}`, host arrays."""
        return self.run.variables

    @property
    def grid(self) -> int:
        """g, side of the code grid."""
        return self.model.config.grid

    @property
    def num_codes(self) -> int:
        """V, entries of the codebook."""
        return self.model.config.num_codes

    def encode_fn(self, params: Params, images: Array) -> Array:
        """(params, images [B, h, w, 3] float in [-1, 1]) -> codes [B, g, g] int32; pure."""
        return self.model.apply(params, images, method="encode")

    def decode_fn(self, params: Params, codes: Array) -> Array:
        """(params, codes [B, g, g] or [B, g*g] int32) -> images [B, h, w, 3] in [-1, 1]; pure."""
        codes = codes.reshape(codes.shape[0], self.grid, self.grid)
        return self.model.apply(params, codes, method="decode_codes")

    def encode(self, images: Array) -> Array:
        """Codes [B, g, g] int32 of images [B, h, w, 3], float in [-1, 1]; compiled."""
        return self._encode(self._beside(images), images)

    def decode(self, codes: Array) -> Array:
        """Images [B, h, w, 3] float32 in [-1, 1] of codes [B, g, g] or [B, g*g]; compiled.

        As with `encode`, an input that is spread over devices is worked on there.
        """
        return self._decode(self._beside(codes), codes)

    def frozen(self) -> Params:
        """All variables with their logical axis names, as `Task.frozen` takes them."""
        return self.boxed(run.picture(self.image_px))

    def frozen_encoder(self) -> Params:
        """`frozen` without the decoder: all that `encode_fn` reads, about half."""
        return {
            collection: {k: v for k, v in tree.items() if not k.startswith("decoder")}
            for collection, tree in self.frozen().items()
        }

    def check_px(self, config: cfg.ConfigDict) -> None:
        """Raises UsageError if a run's pictures have another size than this codec takes."""
        if self.image_px != config.data.image_px:
            name = config.stages.dvae or config.stages.dvae_config
            raise UsageError(
                f"the codec {name} takes {self.image_px} px pictures, but data.image_px is "
                f"{config.data.image_px}; set --config.data.image_px={self.image_px}."
            )

    def _beside(self, x: Array) -> Params:
        """The weights on every device that holds a part of x."""
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
            return self.on(NamedSharding(x.sharding.mesh, PartitionSpec()))
        return self.on()

    @functools.cached_property
    def _encode(self):
        return jax.jit(self.encode_fn)

    @functools.cached_property
    def _decode(self):
        return jax.jit(self.decode_fn)
