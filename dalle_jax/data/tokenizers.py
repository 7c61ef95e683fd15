"""Captions to ids: SentencePiece BPE, lower-cased, with byte fallback and BPE-dropout.

Ids are SentencePiece's own: pad 0, unk 1, bos 2, eos 3, then 256 bytes, phrases and pieces. With
byte fallback no text is unknown: emoji, any script and any accent become byte pieces.

Source: DALL·E (2102.12092) §2.2 and B: BPE of 16,384 over lower-cased captions, at most 256
tokens, BPE-dropout 10 %. Its tokenizer was never released. Deliberate differences: NFKC
normalisation; numbers are split into single figures; word sequences that always occur together
("a gray background") are one piece, see `fixed_phrases`.
"""

import collections
import contextlib
import io
import os
import pathlib
import threading
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece as spm

from dalle_jax.types import UsageError

PAD, UNK, BOS, EOS = 0, 1, 2, 3
SMALLEST_VOCAB = 320  # 4 control ids + 256 bytes + room for an alphabet and a few merges

# SentencePiece seeds its generator per process, not per call, so one lock covers seeding and
# sampling. Sampling takes ~60 us per caption, so that a training step never waits for it.
_SAMPLING = threading.Lock()


class Tokenizer:
    """A trained SentencePiece model.

    Attributes:
      vocab_size: pieces in the model. It is smaller than `data.vocab_size` if the captions do not
        hold that many; embeddings have the configured number, so ids always fit.
      model_bytes: content of the model file, which a checkpoint stores.
    """

    def __init__(self, model: bytes | str | os.PathLike):
        """Loads a model from its bytes or its file.

        Raises:
          UsageError: if the file is missing, is not a SentencePiece model, or was trained with
            other control ids.
        """
        name = "these bytes" if isinstance(model, bytes) else str(model)
        if not isinstance(model, bytes):
            if not pathlib.Path(model).is_file():
                raise UsageError(
                    f"tokenizer {name} does not exist; `python -m dalle_jax prepare` writes it."
                )
            model = pathlib.Path(model).read_bytes()
        self.model_bytes = model
        self._sp = spm.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise UsageError(
                f"{name} is not a SentencePiece model ({len(model)} bytes); expected a file that "
                "`python -m dalle_jax prepare` wrote. Delete it and prepare again."
            ) from error
        ids = (self._sp.pad_id(), self._sp.unk_id(), self._sp.bos_id(), self._sp.eos_id())
        if ids != (PAD, UNK, BOS, EOS):
            raise UsageError(
                f"{name} has pad, unk, bos, eos = {ids}; expected {(PAD, UNK, BOS, EOS)}. "
                "Train it with dalle_jax.data.tokenizers.train."
            )
        self.vocab_size = self._sp.GetPieceSize()

    def encode(
        self,
        texts: Sequence[str],
        length: int,
        add_bos_eos: bool = False,
        dropout: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Texts to ids int32 [n, length], right-padded with 0; overlong texts are cut.

        Args:
          texts: captions; "" gives padding only.
          length: ids per text. Padding and cutting come after BPE-dropout, which makes texts
            about 30 % longer at 0.1.
          add_bos_eos: wrap as bos … eos; a cut text still ends with eos (CLIP pools there).
          dropout: probability that a merge is left out.
          seeds: one int per text, needed with dropout: the same seed gives the same ids.
        """
        return pack(self.pieces(texts, dropout, seeds), length, add_bos_eos)

    def pieces(
        self, texts: Sequence[str], dropout: float = 0.0, seeds: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Ids of each text, as many as it has, before `pack`."""
        texts = [_clean(text) for text in texts]
        if dropout <= 0.0:
            # One call for all texts would start a thread pool: 4 ms when the cores are busy.
            return [self._sp.EncodeAsIds(text) for text in texts]
        if seeds is None or len(seeds) != len(texts):
            raise ValueError("BPE-dropout needs one seed per text.")
        with _SAMPLING:
            ids = []
            for text, seed in zip(texts, seeds, strict=True):
                spm.set_random_generator_seed(int(seed) % 0xFFFFFFFF)  # 2^32-1 means "unseeded"
                ids.append(
                    self._sp.EncodeAsIds(text, enable_sampling=True, alpha=dropout, nbest_size=-1)
                )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The normalised text of one row of ids, without padding and control ids."""
        return self._sp.DecodeIds([int(i) for i in ids if int(i) > EOS])


def pack(rows: Sequence[Sequence[int]], length: int, add_bos_eos: bool = False) -> np.ndarray:
    """Rows of ids to int32 [n, length]: cut, wrapped in bos … eos if asked, padded with 0."""
    out = np.full((len(rows), length), PAD, np.int32)
    for target, row in zip(out, rows, strict=True):
        if add_bos_eos:
            row = [BOS, *row[: length - 2], EOS]
        row = row[:length]
        target[: len(row)] = row
    return out


def overlong(row: Sequence[int], length: int, add_bos_eos: bool = False) -> bool:
    """Whether `pack` cuts this row."""
    return len(row) + 2 * add_bos_eos > length


def check_vocab_size(vocab_size: int) -> None:
    """Raises UsageError for a vocabulary without room for words."""
    if vocab_size < SMALLEST_VOCAB:
        raise UsageError(
            f"vocab_size={vocab_size} is too small: 4 control ids and 256 bytes come first; "
            f"expected {SMALLEST_VOCAB} or more, e.g. 512."
        )


def train(
    captions: Iterable[str],
    vocab_size: int,
    path: str | os.PathLike | None = None,
    *,
    phrases: bool = True,
    max_captions: int = 1_000_000,
) -> Tokenizer:
    """Trains a BPE model on captions and writes it to `path`; the same captions, the same bytes.

    Args:
      captions: the training texts. Beyond `max_captions`, every k-th one is used.
      vocab_size: number of pieces, with ids 0-3 and 256 bytes. Few captions give fewer.
      path: of the model file, which appears only when it is complete; None writes nothing.
      phrases: make each of `fixed_phrases` one piece. On captioned shapes this shortens the mean
        caption from 9.4 to 7.0 ids and the longest from 14 to 9, and never joins a colour to a
        shape.

    Raises:
      UsageError: for no text at all, or a vocab_size below 320.
    """
    check_vocab_size(vocab_size)
    # SentencePiece drops lines above 4192 bytes; the start of a long caption is enough.
    normalise = spm.SentencePieceNormalizer(rule_name="nmt_nfkc_cf").Normalize
    lines = (normalise(_clean(caption)[:1000]) for caption in captions)
    lines = [" ".join(line.replace("\u2581", " ").split()) for line in lines]
    lines = [line for line in lines if line]
    if not lines:
        raise UsageError(
            "no caption has any text, so a tokenizer cannot be trained; expected captions such "
            "as 'a red cube'. Check data.caption_key, or set data.label_template."
        )
    lines = lines[:: -(-len(lines) // max_captions)]
    symbols = fixed_phrases(lines, limit=vocab_size // 16) if phrases else []
    # Characters may take half of the remaining pieces, merges the other half.
    alphabet = (vocab_size - 260 - len(symbols)) // 2
    model = io.BytesIO()
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(_frequent_characters(lines, alphabet)),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        normalization_rule_name="nmt_nfkc_cf",
        byte_fallback=True,
        split_digits=True,
        hard_vocab_limit=False,
        pad_id=PAD,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        user_defined_symbols=symbols,
        character_coverage=1.0,
        num_threads=1,  # two threads may break ties differently
        minloglevel=2,
    )
    tokenizer = Tokenizer(model.getvalue())
    if path is not None:
        _write(pathlib.Path(path), tokenizer.model_bytes)
    return tokenizer


def fixed_phrases(lines: Sequence[str], limit: int = 32) -> list[str]:
    """Word sequences that practically always occur together, as SentencePiece symbols.

    Two neighbours are bonded if in 97 % of cases the first is followed by the second (a forward
    bond), or the second preceded by the first (backward): "to the", "gray background", but not
    "red cube". A run of bonded words is a phrase if at least three words are left after free
    choices are cut off its ends ("an | orange", "cube | on a …"), if it has at most one choice
    inside ("a {white, gray, black} background"), and if 1 % of the lines, and at least 50, have
    it. So only the template of a caption is joined, and its content stays in pieces of its own.
    Templates give some phrases, natural captions hardly any. Short sequences make small
    transformers cheap.
    """
    stride = max(1, -(-len(lines) // 50_000))  # a sample suffices for a 1 % threshold
    rows = [line.split() for line in lines[::stride]]
    first, second, pairs = (collections.Counter() for _ in range(3))
    for words in rows:
        first.update(words[:-1])
        second.update(words[1:])
        pairs.update(zip(words, words[1:], strict=False))
    common = {pair: n for pair, n in pairs.items() if n >= 50}
    forward = {(a, b) for (a, b), n in common.items() if n >= 0.97 * first[a]}
    backward = {(a, b) for (a, b), n in common.items() if n >= 0.97 * second[b]}
    phrases = collections.Counter()
    for words in rows:
        for run in _runs(words, forward | backward):
            bonds = list(zip(run, run[1:], strict=False))
            while bonds and bonds[0] not in backward:
                bonds.pop(0)
            while bonds and bonds[-1] not in forward:
                bonds.pop()
            choices = sum(bond not in forward for bond in bonds)
            if 2 <= len(bonds) <= 8 and choices <= 1:
                phrases[(bonds[0][0], *(b for _, b in bonds))] += 1
    least = max(50, len(rows) // 100)
    frequent = sorted((-n, phrase) for phrase, n in phrases.items() if n >= least)
    return ["\u2581" + "\u2581".join(phrase) for _, phrase in frequent[:limit]]


def _frequent_characters(lines: Sequence[str], limit: int) -> list[str]:
    """The lines with all but the `limit` most frequent characters blanked.

    SentencePiece makes every character of its training text a piece (it may leave out at most
    2 %) and fails if they do not fit, for example Chinese in a vocabulary of 512. Byte fallback
    then covers the rare characters.
    """
    counts = collections.Counter()
    for line in lines:
        counts.update(line)
    if len(counts) <= limit:
        return lines
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    blank = dict.fromkeys(map(ord, ranked[limit:]), " ")
    return [line.translate(blank) for line in lines]


def _runs(words: Sequence[str], bonded: set[tuple[str, str]]) -> list[list[str]]:
    runs = [list(words[:1])]
    for a, b in zip(words, words[1:], strict=False):
        if (a, b) in bonded:
            runs[-1].append(b)
        else:
            runs.append([b])
    return runs


def find(data_config) -> Tokenizer:
    """The tokenizer of a prepared set: `DATA_DIR/SOURCE/tokenizer-VOCAB_SIZE.model`.

    It is trained on the captions of `data.split` if the file does not exist yet.

    Args:
      data_config: the `data` section of a config: data_dir, source, split, vocab_size, …

    Raises:
      UsageError: if the set is not prepared or holds no caption.
    """
    # Imported here, so that loading a model needs no dataset library.
    from dalle_jax.data import preprocess, sources

    path = model_path(data_config.data_dir, data_config.source, data_config.vocab_size)
    if path.is_file():
        return Tokenizer(path)
    source = sources.open_split(data_config, data_config.split)
    # 20 examples per piece, spread over the set, are enough text; reading all of 150,000 shapes
    # would take 20 s.
    stride = max(1, len(source) // max(20_000, 20 * data_config.vocab_size))
    captions = []
    for start in range(0, len(source), 1024 * stride):
        indices = range(start, min(start + 1024 * stride, len(source)), stride)
        for example in preprocess.read(source, indices):
            captions += getattr(example, "captions", [])  # a BadRecord has none
    tokenizer = train(captions, data_config.vocab_size)
    # The data folder may be read-only: the workdir of a run has its own copy.
    with contextlib.suppress(OSError):
        _write(path, tokenizer.model_bytes)
    return tokenizer


def folder(data_dir: str | os.PathLike, source: str) -> pathlib.Path:
    """The folder with the tokenizers of a prepared set; `source` is its name, or a folder."""
    root = pathlib.Path(data_dir) / source
    return pathlib.Path(source) if not root.is_dir() and pathlib.Path(source).is_dir() else root


def model_path(data_dir: str | os.PathLike, source: str, vocab_size: int) -> pathlib.Path:
    """The tokenizer file of a prepared set."""
    return folder(data_dir, source) / f"tokenizer-{vocab_size}.model"


def _clean(text: str) -> str:
    # Lone surrogates (a JSON file with half an emoji) cannot be UTF-8; NUL ends SentencePiece's
    # C strings.
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")


def _write(path: pathlib.Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    os.replace(part, path)
