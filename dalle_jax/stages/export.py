"""Exports a trained stage as a small folder: `dalle_jax.engine.checkpoint` and a CLIP's origin."""

import pathlib
from typing import Any

from dalle_jax.engine import checkpoint
from dalle_jax.stages.clip import ClipStage


def export(workdir: str, out_dir: str, dtype: str = "float16") -> dict[str, Any]:
    """`checkpoint.export`; an exported CLIP also names the run whose embeddings others trained on.

    Args:
      workdir: the run to export; its EMA weights if it has an average.
      out_dir: folder to write.
      dtype: storage of floating arrays, one of float16, bfloat16, float32.

    Returns:
      {"step", "parameters" (count), "bytes" (of the weights file)}.

    Raises:
      UsageError: as `checkpoint.export`.
    """
    result = checkpoint.export(workdir, out_dir, dtype)
    if checkpoint.load_config(workdir).task == "clip":
        clip = ClipStage.load(workdir)
        (pathlib.Path(out_dir) / checkpoint.ORIGIN).write_text(clip.origin or clip.fingerprint)
    return result
