"""An opened run: everything that a folder holds of a trained network, read once.

A folder is a run's workdir, or the small folder that `export` writes. The config travels with the
checkpoint, so a stage needs nothing but its folder. Weights are the EMA where there is one. A
folder that is missing, of another task, untrained or damaged raises `UsageError` before anything
compiles.

`Stage` is what the stages of this room have in common: a `Run` and the network that it holds.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import config as cfg
from dalle_jax.data.tokenizers import Tokenizer
from dalle_jax.engine import checkpoint
from dalle_jax.models import build
from dalle_jax.nn import partition
from dalle_jax.types import Array, Params, UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained run, opened.

    Attributes:
      folder: where it was read from; "" for a network that exists by its shapes only.
      config: the run's config.
      variables: `{"params": …, other collections}`, host arrays; floats have the config's parameter
        dtype, whatever an export stored.
      tokenizer: the run's tokenizer; None for a network that reads no text.
      fingerprint: 16 hex digits that change with any weight and with the architecture.
      step: training step of the weights.
    """

    folder: str
    config: cfg.ConfigDict
    variables: Params
    tokenizer: Tokenizer | None
    fingerprint: str
    step: int

    @classmethod
    def open(cls, folder: str, task: str, step: int | None = None) -> "Run":
        """Opens a folder that must hold a run of `task`.

        Args:
          folder: the run's workdir, or an exported folder.
          task: expected `config.task`.
          step: training step; the latest by default.

        Raises:
          UsageError: if the folder is missing, of another task, untrained or damaged.
        """
        config = read_config(folder, task)
        stored = checkpoint.load_variables(folder, step)
        variables = _cast({"params": stored.params, **(stored.extra or {})}, config)
        # A codec's fingerprint covers every collection (its codebook), those of others "params".
        hashed = variables if task == "autoencode" else variables["params"]
        return cls(
            folder=str(folder),
            config=config,
            variables=variables,
            tokenizer=read_tokenizer(folder) if _reads_text(config) else None,
            fingerprint=fingerprint(hashed, config),
            step=stored.step,
        )

    @classmethod
    def by_shape(cls, config: cfg.ConfigDict, variables: Params) -> "Run":
        """A run that does not exist yet: `variables` are ShapeDtypeStructs."""
        return cls("", config, variables, tokenizer=None, fingerprint="", step=0)

    def read(self, name: str) -> bytes | None:
        """A small file of the folder; None if it is absent."""
        file = checkpoint.absolute(self.folder) / name
        return file.read_bytes() if file.exists() else None


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A trained network, ready to be used.

    Attributes:
      run: where it comes from.
      model: the linen module.
    """

    run: Run
    model: nn.Module

    @property
    def params(self) -> Params:
        """The network's parameters, host arrays, without the collection level."""
        return self.run.variables["params"]

    @property
    def config(self) -> cfg.ConfigDict:
        """The run's config."""
        return self.run.config

    @property
    def folder(self) -> str:
        """Where the run was read from."""
        return self.run.folder

    @property
    def fingerprint(self) -> str:
        """16 hex digits of weights and architecture."""
        return self.run.fingerprint

    @property
    def step(self) -> int:
        """Training step of the weights."""
        return self.run.step

    @property
    def provenance(self) -> dict[str, Any]:
        """Folder, step and fingerprint, as results record them."""
        return dict(workdir=self.folder, step=self.step, fingerprint=self.fingerprint)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the network was trained with."""
        return self.run.tokenizer

    @property
    def image_px(self) -> int:
        """Side of the pictures."""
        return self.config.data.image_px

    @property
    def text_len(self) -> int:
        """Ids of a caption; begin and end tokens included, where there are any."""
        return self.config.data.text_len

    def tokenize(self, captions: Sequence[str]) -> np.ndarray:
        """Ids int32 [P, T] of captions, as the network reads them."""
        data = self.config.data
        return self.tokenizer.encode(captions, data.text_len, add_bos_eos=data.add_bos_eos)

    @functools.cached_property
    def _copies(self) -> dict[jax.sharding.Sharding | None, Params]:
        return {}

    def on(self, sharding: jax.sharding.Sharding | None = None) -> Params:
        """`params` on devices, by default on the first one; every copy is made once."""
        if sharding not in self._copies:
            self._copies[sharding] = jax.device_put(self.params, sharding)
        return self._copies[sharding]

    def boxed(self, *inputs: jax.ShapeDtypeStruct) -> Params:
        """The network's variables with their logical axis names, as `Task.frozen` takes them.

        Args:
          *inputs: shapes of what the network's `__call__` takes.
        """
        key = jax.eval_shape(jax.random.key, 0)
        shapes = jax.eval_shape(self.model.init, key, *inputs)
        return partition.rebox(shapes, self.run.variables)

    def check_shapes(self, apply: Callable, *inputs: Any) -> None:
        """Raises UsageError if the weights do not fit the network of the config.

        Args:
          apply: (params, *inputs) -> anything; traced, not run.
          *inputs: shapes.
        """
        try:
            jax.eval_shape(apply, self.params, *inputs)
        except flax.errors.FlaxError as error:
            raise UsageError(
                f"the weights in {self.folder!r} do not fit the model of its config: {error} "
                "Was config.json edited, or is the codec another one than it was trained with?"
            ) from error


def read_config(folder: str, task: str) -> cfg.ConfigDict:
    """The config of a folder that must hold a run of `task`.

    Raises:
      UsageError: if the folder is missing or of another task.
    """
    if not checkpoint.absolute(folder).is_dir():
        raise UsageError(
            f"workdir {str(folder)!r} does not exist; expected the folder of a {task} run: "
            "give the --workdir that `train` was given."
        )
    config = checkpoint.load_config(folder)
    if config.task != task:
        raise UsageError(
            f"workdir {str(folder)!r} holds a run of task {config.task!r}; expected task "
            f"{task!r}: check which folder goes with which option."
        )
    return config


def companion(folder: str, config: cfg.ConfigDict, stage: str, given: str = "") -> str:
    """The folder of a frozen network that a run was trained with.

    Args:
      folder: the run's folder.
      config: the run's config.
      stage: "dvae" or "clip", a field of `config.stages` and a flag of the commands.
      given: a folder that takes precedence, for a network that was moved.

    Returns:
      `given`, the folder that the config names, or the folder `stage` beside the run, as pretrained
      sets are laid out.

    Raises:
      UsageError: if it is in none of these places.
    """
    if given:
        return given
    named = config.stages.get(stage, "")
    beside = checkpoint.absolute(folder).parent / stage
    for candidate in (named, str(beside)):
        if candidate and checkpoint.absolute(candidate).is_dir():
            return candidate
    noun = {"dvae": "codec", "clip": "CLIP"}[stage]
    raise UsageError(
        f"the {noun} of {str(folder)!r} is not at {named!r}, which its config names, nor at "
        f"{str(beside)!r}; give its folder with --{stage}."
    )


def fingerprint(params: Params, config: cfg.ConfigDict) -> str:
    """16 hex digits that change with any weight and with the architecture.

    Args:
      params: nested dict of host arrays.
      config: the run's config; its `model` section counts, its training sections do not.
    """
    digest = hashlib.sha256(json.dumps(config.model.to_dict(), sort_keys=True).encode())
    for name, leaf in sorted(checkpoint.flatten(params).items()):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()[:16]


def identity_files(
    tokenizer: Tokenizer | None = None,
    *,
    codec: Stage | None = None,
    clip: Stage | None = None,
    pca: bytes = b"",
) -> dict[str, bytes]:
    """`Task.keeps` of a run on this tokenizer and these frozen networks: file name -> content.

    A network without a fingerprint, which exists by its shapes only, is left out.
    """
    files = {
        checkpoint.TOKENIZER: b"" if tokenizer is None else tokenizer.model_bytes,
        checkpoint.CODEC: b"" if codec is None else codec.fingerprint.encode(),
        checkpoint.CLIP: b"" if clip is None else clip.fingerprint.encode(),
        checkpoint.PCA: pca,
    }
    return {name: content for name, content in files.items() if content}


def picture(px: int) -> jax.ShapeDtypeStruct:
    """The shape of one picture as networks take it: [1, px, px, 3] float32."""
    return jax.ShapeDtypeStruct((1, px, px, 3), jnp.float32)


def ids(length: int) -> jax.ShapeDtypeStruct:
    """The shape of one row of ids: [1, length] int32."""
    return jax.ShapeDtypeStruct((1, length), jnp.int32)


def same_shapes(ours: Params, theirs: Params) -> str:
    """The first path at which two trees differ in shape; "" if they agree."""
    ours, theirs = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree))
        }
        for tree in (ours, theirs)
    )
    different = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    return different[0] if different else ""


def read_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a run; UsageError if it is missing."""
    path = checkpoint.absolute(folder) / checkpoint.TOKENIZER
    if not path.exists():
        raise UsageError(
            f"{path} is missing; `train` copies the tokenizer there: copy it from the original "
            "run, or train again."
        )
    return Tokenizer(path.read_bytes())


def _reads_text(config: cfg.ConfigDict) -> bool:
    """Whether runs of this config keep a tokenizer: codecs and upsamplers read no captions."""
    if config.task == "diffusion":
        return not config.loss.low_res_px
    return config.task != "autoencode"


def _cast(tree: Params, config: cfg.ConfigDict) -> Params:
    """Host arrays, floats in the config's parameter dtype: an export may store 16-bit ones."""
    dtype = build.policy(config).param

    def cast(leaf: Array) -> np.ndarray:
        leaf = np.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
