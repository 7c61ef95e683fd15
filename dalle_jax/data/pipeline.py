"""Global batches, seekable by step: `pipeline(step)` is this process's slice of that batch.

The batch of a step is a pure function of (seed, step): its examples, captions, crops, BPE-dropout
and dropped captions. Position p = step * batch + place counts through shuffled epochs; each process
reads the places that its devices hold (`rows`) and decodes no other record. So the data state of a
checkpoint is one integer, valid for any mesh and number of processes.

The next usable record replaces one that cannot be used, in every process alike; `skipped` counts
such records and `skipped_ids` names them.
"""

import collections
import concurrent.futures
import dataclasses
import difflib
import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np

from dalle_jax.data import order, preprocess, sources, tokenizers
from dalle_jax.types import UsageError

_LOG = logging.getLogger(__name__)
_FIELDS = ("image", "text", "codes")
# Streams of random numbers; stream 0 is the order itself.
_CAPTION, _DROP, _DROPOUT, _CROP = 1, 2, 3, 4
_NAMED = 100  # skipped records that are named
_GIVE_UP = 1000  # unusable records in a row


@dataclasses.dataclass(frozen=True)
class _Item:
    """A record after decoding; also cropped and tokenised, unless these steps are random."""

    image: np.ndarray | None  # uint8 [px, px, 3], or [h, w, 3] if the crop is random
    captions: list[str]
    tokens: np.ndarray | None  # int32 [captions, text_len] without BPE-dropout
    cut: list[bool]  # which captions are longer than text_len
    codes: np.ndarray | None

    @property
    def nbytes(self) -> int:
        arrays = (self.image, self.tokens, self.codes)
        text = sum(len(caption) for caption in self.captions)
        return 500 + text + sum(a.nbytes for a in arrays if a is not None)


class Pipeline:
    """Batches of one split; `make` opens the split and builds one.

    Attributes:
      num_examples: examples in the split.
      skipped: reason -> number of distinct records that this process could not use.
      skipped_ids: "id: reason" of the first 100 of them.
      truncated: number of captions in batches that were cut at text_len.
    """

    def __init__(
        self,
        source: sources.Source,
        data_config,
        seed: int,
        *,
        fields: set[str],
        tokenizer: tokenizers.Tokenizer | None = None,
        training: bool,
        batch: int,
        rows: Sequence[int] | None = None,
    ):
        """See `make`; `source` needs len(), [i] -> sources.Example and .fields."""
        _check(source, data_config, fields, tokenizer, training, batch)
        self._source = source
        self._config = data_config
        self._seed = int(seed)
        self._fields = frozenset(fields)
        self._tokenizer = tokenizer
        self._training = training
        self._batch = batch
        self._places = np.arange(batch) if rows is None else np.asarray(rows)
        self._crop = preprocess.CROPS[data_config.crop]
        self._random_crop = training and data_config.crop not in preprocess.DETERMINISTIC
        self._dropout = data_config.bpe_dropout if training else 0.0
        self._caption_drop = data_config.caption_drop if training else 0.0
        self._lock = threading.Lock()
        self._cache: dict[int, _Item] = {}
        self._cache_room = data_config.cache_mib * 2**20
        self._bad: set[int] = set()
        threads = data_config.threads
        self._threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(threads) if threads > 1 else None
        self.num_examples = len(source)
        self.skipped: collections.Counter[str] = collections.Counter()
        self.skipped_ids: list[str] = []
        self.truncated = 0

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the global batch of `step`, b = len(rows).

        Returns:
          The batch's fields, some of image uint8 [b, px, px, 3], text int32 [b, text_len] and
          codes int32 [b, g*g].

        Raises:
          UsageError: if 1000 records in a row, or all, cannot be used.
        """
        positions = self._positions(step)
        items = [item for _, item in self._resolve(positions)]
        batch = {}
        if "image" in self._fields:
            pictures = [item.image for item in items]
            if self._random_crop:
                seeds = order.hashed(positions, self._seed, _CROP).tolist()
                pictures = self._map(self._cropped, list(zip(pictures, seeds, strict=True)))
            batch["image"] = np.stack(pictures)
        if "text" in self._fields:
            batch["text"] = self._text(positions, items)
        if "codes" in self._fields:
            batch["codes"] = np.stack([item.codes for item in items])
        return batch

    def ids(self, step: int) -> list[str]:
        """Ids of the examples in `self(step)`, for reports."""
        return [self._source[index].id for index, _ in self._resolve(self._positions(step))]

    def close(self) -> None:
        """Stops the decoding threads and empties the cache."""
        if self._pool is not None:
            self._pool.shutdown()
        self._cache = {}

    def _positions(self, step: int) -> np.ndarray:
        return step * self._batch + self._places

    def _indices(self, positions: np.ndarray) -> list[int]:
        if self._training:
            return order.shuffled(positions, self.num_examples, self._seed).tolist()
        return (positions % self.num_examples).tolist()

    def _resolve(self, positions: np.ndarray) -> list[tuple[int, _Item]]:
        """The example at each position, or at the next position that has a usable one."""
        indices = self._indices(positions)
        items = self._items(indices)
        for slot, first in enumerate(positions.tolist()):
            position = first
            while items[slot] is None:
                position += 1
                if position - first >= min(_GIVE_UP, 2 * self.num_examples):
                    raise UsageError(
                        f"{position - first} records in a row cannot be used "
                        f"({dict(self.skipped)}; first: {self.skipped_ids[0]}). Check data.source, "
                        "data.image_key and data.caption_key; if they are right, prepare the set "
                        "again."
                    )
                indices[slot] = self._indices(np.array([position]))[0]
                items[slot] = self._items(indices[slot : slot + 1])[0]
        return list(zip(indices, items, strict=True))

    def _items(self, indices: Sequence[int]) -> list[_Item | None]:
        """Items from the cache or freshly decoded; None for records that cannot be used."""
        items = {i: self._cache.get(i) for i in indices}
        missing = [i for i, item in items.items() if item is None and i not in self._bad]
        examples = preprocess.read(self._source, missing)
        for index, example, item in zip(
            missing, examples, self._map(self._load, examples), strict=True
        ):
            if isinstance(item, preprocess.BadRecord):
                self._skip(index, getattr(example, "id", f"record {index}"), item)
                continue
            items[index] = item
            # Nothing is ever evicted: each epoch reads every record once, so a cached record is as
            # useful as one that would replace it.
            if item.nbytes <= self._cache_room:
                with self._lock:
                    if index not in self._cache:
                        self._cache_room -= item.nbytes
                        self._cache[index] = item
        return [items[i] for i in indices]

    def _load(self, example) -> _Item | preprocess.BadRecord:
        """The example without its random steps; a BadRecord if it cannot be used."""
        config = self._config
        if isinstance(example, preprocess.BadRecord):
            return example
        try:
            image = codes = tokens = None
            captions, cut = [], []
            if "image" in self._fields:
                image = preprocess.decode(example.image, example.id)
                if not self._random_crop:
                    image = self._crop(image, config.image_px)
            if "codes" in self._fields:
                if example.codes is None:
                    raise preprocess.BadRecord("no codes")
                codes = np.asarray(example.codes, np.int32)
                if (codes < 0).any():  # `encode` could not decode the picture
                    raise preprocess.BadRecord("no codes")
            if "text" in self._fields:
                if not example.captions:
                    raise preprocess.BadRecord("no caption")
                captions = list(example.captions) if self._training else example.captions[:1]
                if not self._dropout:
                    tokens, cut = self._encode(captions)
            return _Item(image, captions, tokens, cut, codes)
        except preprocess.BadRecord as error:
            return error

    def _skip(self, index: int, name: str, error: preprocess.BadRecord) -> None:
        with self._lock:
            if index in self._bad:
                return
            self._bad.add(index)
            self.skipped[error.reason] += 1
            if len(self.skipped_ids) >= _NAMED:
                return
            self.skipped_ids.append(f"{name}: {error}")
        _LOG.warning("skipping %s", self.skipped_ids[-1])

    def _cropped(self, job: tuple[np.ndarray, int]) -> np.ndarray:
        image, seed = job
        return self._crop(image, self._config.image_px, np.random.default_rng(seed))

    def _text(self, positions: np.ndarray, items: list[_Item]) -> np.ndarray:
        """Ids int32 [b, text_len] of one caption of each item."""
        config = self._config
        choice = np.zeros(len(items), np.int64)
        if self._training and any(len(item.captions) > 1 for item in items):
            counts = np.array([len(item.captions) for item in items], np.uint64)
            choice = (order.hashed(positions, self._seed, _CAPTION) % counts).astype(np.int64)
        if self._dropout:
            captions = [item.captions[k] for item, k in zip(items, choice, strict=True)]
            seeds = order.hashed(positions, self._seed, _DROPOUT) >> np.uint64(32)
            tokens, cut = self._encode(captions, seeds.tolist())
        else:
            tokens = np.stack([item.tokens[k] for item, k in zip(items, choice, strict=True)])
            cut = [item.cut[k] for item, k in zip(items, choice, strict=True)]
        if self._caption_drop:
            dropped = order.uniform(positions, self._seed, _DROP) < self._caption_drop
            tokens[dropped] = tokenizers.pack([[]], config.text_len, config.add_bos_eos)
        if any(cut):
            if not self.truncated:
                place = cut.index(True)
                _LOG.warning(
                    "caption %.60r has more than data.text_len=%d tokens and is cut; raise "
                    "data.text_len if many captions are cut (Pipeline.truncated counts them)",
                    items[place].captions[choice[place]],
                    config.text_len,
                )
            self.truncated += sum(cut)
        return tokens

    def _encode(
        self, captions: Sequence[str], seeds: Sequence[int] | None = None
    ) -> tuple[np.ndarray, list[bool]]:
        config = self._config
        rows = self._tokenizer.pieces(captions, self._dropout, seeds)
        cut = [tokenizers.overlong(row, config.text_len, config.add_bos_eos) for row in rows]
        return tokenizers.pack(rows, config.text_len, config.add_bos_eos), cut

    def _map(self, function: Callable, jobs: list) -> list:
        """[function(job) for job in jobs], in one chunk per thread if there are enough jobs."""
        if self._pool is None or len(jobs) < 2 * self._threads:
            return [function(job) for job in jobs]
        chunks = [jobs[k :: self._threads] for k in range(self._threads)]
        results = self._pool.map(lambda chunk: [function(job) for job in chunk], chunks)
        out = [None] * len(jobs)
        for k, result in enumerate(results):
            out[k :: self._threads] = result
        return out


def make(
    data_config,
    seed: int,
    *,
    split: str,
    fields: set[str],
    tokenizer: tokenizers.Tokenizer | None = None,
    training: bool,
    batch: int,
    rows: Sequence[int] | None = None,
) -> Pipeline:
    """The pipeline for a split of the set that a config's `data` section names.

    Args:
      data_config: the `data` section of a config (configs/base.py).
      seed: of the run.
      split: a TFDS split expression.
      fields: of a batch, some of image, text, codes.
      tokenizer: for text; None opens the prepared set's own.
      training: shuffled epochs, augmentation, a random caption, BPE-dropout, caption_drop. False
        gives the split in order (it wraps at the end), central crops and the first caption.
      batch: examples in the global batch.
      rows: places in the global batch, 0 to batch - 1, that this process reads; None = all.

    Raises:
      UsageError: for a set, split, crop or size that cannot work, before a record is read.
    """
    source = sources.open_split(data_config, split)
    if "text" in fields and "text" in source.fields and tokenizer is None:
        tokenizer = tokenizers.find(data_config)
    return Pipeline(
        source,
        data_config,
        seed,
        fields=fields,
        tokenizer=tokenizer,
        training=training,
        batch=batch,
        rows=rows,
    )


def _check(source, config, fields, tokenizer, training, batch) -> None:
    """Raises UsageError for arguments that cannot work."""
    if unknown := set(fields) - set(_FIELDS):
        raise ValueError(f"fields hold {unknown}; a batch can hold {_FIELDS}.")
    if lacking := sorted(set(fields) - set(source.fields)):
        raise UsageError(
            f"data.source {config.source!r} has no {' and no '.join(lacking)}; it holds "
            f"{', '.join(sorted(source.fields)) or 'nothing'}. Choose another --config.data.source"
            + (", or store codes with `python -m dalle_jax encode`." if "codes" in lacking else ".")
        )
    if config.crop not in preprocess.CROPS:
        near = difflib.get_close_matches(config.crop, preprocess.CROPS, n=1)
        raise UsageError(
            f"data.crop {config.crop!r} is unknown;"
            f"{f' did you mean {near[0]!r}?' if near else ''} use one of "
            f"{', '.join(preprocess.CROPS)}."
        )
    name = "data.batch" if training else "data.eval_batch"
    shortest = 3 if config.add_bos_eos else 1
    for key, value, fits, expected in (
        (name, batch, batch >= 1, "1 or more"),
        ("data.image_px", config.image_px, config.image_px >= 1, "1 or more"),
        ("data.text_len", config.text_len, config.text_len >= shortest, f"{shortest} or more"),
        ("data.bpe_dropout", config.bpe_dropout, 0 <= config.bpe_dropout < 1, "0 up to below 1"),
        ("data.caption_drop", config.caption_drop, 0 <= config.caption_drop <= 1, "0 to 1"),
        ("data.threads", config.threads, config.threads >= 1, "1 or more"),
        ("data.cache_mib", config.cache_mib, config.cache_mib >= 0, "0 (no cache) or more"),
    ):
        if not fits:
            raise UsageError(f"{key}={value} is out of range; expected {expected}.")
    if training and len(source) < batch:
        raise UsageError(
            f"data.source {config.source!r} has {len(source)} training examples, fewer than "
            f"data.batch={batch}; set --config.data.batch={len(source)} or smaller, or prepare "
            "more examples."
        )
    if "text" in fields:
        if tokenizer is None:
            raise ValueError("a batch with text needs a tokenizer.")
        if tokenizer.vocab_size > config.vocab_size:
            raise UsageError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, more than data.vocab_size="
                f"{config.vocab_size}; set --config.data.vocab_size={tokenizer.vocab_size}."
            )
