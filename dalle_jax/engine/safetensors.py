"""The weights file of an exported stage: safetensors with flat "a/b/c" names.

Non-trained variables are under "extra/". Half-precision arrays are read as float32.
"""

import json
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from dalle_jax.types import Params, UsageError

DTYPES = ("float16", "bfloat16", "float32")
EXTRA = "extra/"

_STORED = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "U32": np.uint32, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def encode(params: Params, extra: Any, step: int, dtype: str) -> bytes:
    """The file's bytes.

    Args:
      params: nested dict of numpy arrays.
      extra: likewise, or None.
      step: training step, stored in the header.
      dtype: one of `DTYPES`, for floating arrays; integers are unchanged.

    Raises:
      UsageError: for a weight that float16 cannot represent.
    """
    arrays = flatten(params)
    arrays |= {EXTRA + name: value for name, value in flatten(extra or {}).items()}
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    stored = {}
    for name, value in arrays.items():
        is_float = value.dtype.kind == "f" or value.dtype == ml_dtypes.bfloat16
        with np.errstate(over="ignore"):
            stored[name] = np.array(value, kind if is_float else None, order="C")
        if is_float and np.isfinite(value).all() and not np.isfinite(stored[name]).all():
            raise UsageError(
                f"{name} has values up to {np.abs(value).max():.3g}, beyond {dtype}; "
                "export with --dtype=bfloat16."
            )
    return safetensors_numpy.save(stored, metadata={"step": str(step), "dtype": dtype})


def decode(data: bytes, name: str) -> tuple[Params, Any, int]:
    """(params, extra or None, step) of a file's bytes.

    Raises:
      UsageError: with the file's name, if the bytes are not safetensors.
    """
    try:
        # Not safetensors.numpy.load, which has no bfloat16.
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise UsageError(f"{name} cannot be read: {error}; copy it again.") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    step = int(header.get("__metadata__", {}).get("step", 0))
    flat = {}
    for key, entry in entries:
        if entry["dtype"] not in _STORED:
            raise UsageError(f"{name}: {key} is stored as {entry['dtype']}, unknown.")
        value = np.frombuffer(entry["data"], _STORED[entry["dtype"]]).reshape(entry["shape"])
        is_half = entry["dtype"] in ("F16", "BF16")
        flat[key] = value.astype(np.float32) if is_half else value
    extra = {k.removeprefix(EXTRA): v for k, v in flat.items() if k.startswith(EXTRA)}
    params = {k: v for k, v in flat.items() if not k.startswith(EXTRA)}
    return unflatten(params), unflatten(extra) or None, step


def flatten(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """A nested dict as {"a/b/c": array}."""
    flat = {}
    for key, value in tree.items():
        if "/" in str(key):
            raise ValueError(f"parameter name {key!r} holds a slash: flat names would clash.")
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}/") if nested else {prefix + key: np.asarray(value)}
    return flat


def unflatten(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree = {}
    for name, value in flat.items():
        *path, leaf = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree
