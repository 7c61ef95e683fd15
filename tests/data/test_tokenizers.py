"""The tokenizer: exact ids for its controls, no unknown text, dropout by seed, phrases."""

import concurrent.futures
import itertools

import ml_collections
import numpy as np
import pytest

from dalle_jax.data import tokenizers
from dalle_jax.types import UsageError

COLOURS = ("red", "orange", "green", "blue")
SHAPES = ("cube", "star", "ring")
CAPTIONS = [
    f"a {c} {s} {relation} a {d} {s} on a {ground} background"
    for c, d, s, relation, ground in itertools.product(
        COLOURS, COLOURS, SHAPES, ("above", "to the left of"), ("white", "gray", "black")
    )
]


@pytest.fixture(scope="module")
def trained():
    return tokenizers.train(CAPTIONS, 400)


def test_training_twice_gives_the_same_bytes(tmp_path, trained):
    again = tokenizers.train(CAPTIONS, 400, tmp_path / "set" / "tokenizer-400.model")
    assert again.model_bytes == trained.model_bytes
    assert (tmp_path / "set" / "tokenizer-400.model").read_bytes() == trained.model_bytes
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["tokenizer-400.model"]
    assert tokenizers.Tokenizer(trained.model_bytes).vocab_size == trained.vocab_size <= 400


def test_encode_pads_with_zero_and_cuts(trained):
    ids = trained.encode(["a red cube", "", CAPTIONS[0]], 4)
    assert ids.shape == (3, 4) and ids.dtype == np.int32
    assert list(ids[0]).index(0) == 3 and not ids[1].any() and ids[2].all()


def test_bos_eos_and_a_cut_text_still_ends_with_eos(trained):
    ids = trained.encode(["a red cube", "", CAPTIONS[0]], 6, add_bos_eos=True)
    assert (ids[:, 0] == tokenizers.BOS).all()
    assert list(ids[1]) == [tokenizers.BOS, tokenizers.EOS, 0, 0, 0, 0]
    assert ids[0][4] == tokenizers.EOS and ids[2][5] == tokenizers.EOS
    assert ((ids == tokenizers.EOS).sum(1) == 1).all()


def test_case_and_numbers(trained):
    assert (trained.encode(["A RED Cube"], 8) == trained.encode(["a red cube"], 8)).all()
    assert len(trained.pieces(["1984"])[0]) >= 4


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f600\U0001f389",
        "x" * 10_000,
        "中文 ქართული",
        "naïve",
        "a\0b",
        "\ud800",
        "\u202e",
        "\n\t ",
    ],
)
def test_no_text_is_unknown(trained, text):
    (row,) = trained.pieces([text])
    assert tokenizers.UNK not in row
    assert all(3 < i < trained.vocab_size for i in row)
    assert trained.encode([text], 24, add_bos_eos=True).shape == (1, 24)


def test_emoji_round_trip(trained):
    assert trained.decode(trained.pieces(["\U0001f600 star"])[0]) == "\U0001f600 star"


def test_dropout_follows_its_seed_in_any_batch_and_thread(trained):
    seeds = np.arange(64) * 7919
    texts = [CAPTIONS[i] for i in range(64)]
    joined = trained.encode(texts, 40, dropout=0.3, seeds=seeds)
    halves = [trained.encode(texts[i : i + 8], 40, dropout=0.3, seeds=seeds[i : i + 8])
              for i in range(0, 64, 8)]  # fmt: skip
    np.testing.assert_array_equal(joined, np.concatenate(halves))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        rows = pool.map(
            lambda i: trained.encode([texts[i]], 40, dropout=0.3, seeds=[seeds[i]]), range(64)
        )
        np.testing.assert_array_equal(joined, np.concatenate(list(rows)))
    other = trained.encode(texts, 40, dropout=0.3, seeds=seeds + 1)
    assert (joined != other).any(axis=1).mean() > 0.9


def test_dropout_changes_the_pieces_and_never_the_text(trained):
    rows = trained.pieces(CAPTIONS[:1] * 50, 0.2, range(50))
    assert len({tuple(row) for row in rows}) > 25
    assert {trained.decode(row) for row in rows} == {CAPTIONS[0]}
    assert np.mean([len(r) for r in rows]) > len(trained.pieces(CAPTIONS[:1])[0])


def test_dropout_without_seeds_is_a_programming_error(trained):
    with pytest.raises(ValueError, match="seed"):
        trained.encode(["a"], 4, dropout=0.1)


def test_phrases_are_templates_and_never_content():
    """Neither a colour nor a shape is in a phrase, however poor the grammar."""
    single = [
        f"a {c} {s} on a {g} background"
        for c in COLOURS
        for s in SHAPES
        for g in ("white", "gray", "black")
    ] * 50
    cubes = [caption for caption in single if "cube" in caption]
    for captions in (CAPTIONS, single, cubes):
        phrases = tokenizers.fixed_phrases(captions)
        assert not any(colour in phrase for phrase in phrases for colour in COLOURS)
        if captions is not cubes:
            assert any(phrase.endswith("▁a▁gray▁background") for phrase in phrases)
            assert not any(shape in phrase for phrase in phrases for shape in SHAPES)
    assert "▁to▁the▁left▁of▁a" in tokenizers.fixed_phrases(CAPTIONS)
    assert tokenizers.fixed_phrases([f"word{i} other{i} third{i}" for i in range(500)]) == []
    assert tokenizers.fixed_phrases([]) == []


def test_phrases_with_commas_are_single_pieces():
    trained = tokenizers.train(["hello, dear, world of cubes", "so, a cube"] * 60, 400)
    assert len(trained.pieces(["hello, dear, world of cubes"])[0]) == 1
    assert trained.decode(trained.pieces(["so, a cube"])[0]) == "so, a cube"


def test_phrases_shorten():
    plain = tokenizers.train(CAPTIONS, 400, phrases=False)
    short = tokenizers.train(CAPTIONS, 400)
    lengths = [max(len(row) for row in t.pieces(CAPTIONS)) for t in (plain, short)]
    assert lengths[1] <= lengths[0] - 4


def test_captions_with_more_characters_than_pieces_still_train():
    wide = ["".join(chr(0x4E00 + (37 * i + j) % 3000) for j in range(10)) for i in range(400)]
    trained = tokenizers.train(wide, 400)
    assert trained.vocab_size <= 400 and tokenizers.UNK not in trained.pieces(wide[:1])[0]


def test_a_single_caption_trains():
    assert tokenizers.train(["a"], 400).encode(["a b"], 6).any()


@pytest.mark.parametrize(
    ("captions", "size", "says"),
    [(["", "  "], 400, "no caption"), (["a"], 100, "vocab_size=100"), ([], 400, "no caption")],
)
def test_training_refuses(captions, size, says):
    with pytest.raises(UsageError, match=says):
        tokenizers.train(captions, size)


def test_loading_refuses_what_is_no_model(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        tokenizers.Tokenizer(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UsageError, match="not a SentencePiece model"):
        tokenizers.Tokenizer(tmp_path / "bad.model")
    with pytest.raises(UsageError, match="SentencePiece"):
        tokenizers.Tokenizer(b"")


def test_find_reads_what_prepare_wrote(tmp_path, trained):
    config = ml_collections.ConfigDict(
        dict(data_dir=str(tmp_path), source="set", split="train", vocab_size=400)
    )
    path = tokenizers.model_path(tmp_path, "set", 400)
    path.parent.mkdir()
    path.write_bytes(trained.model_bytes)
    assert tokenizers.find(config).model_bytes == trained.model_bytes
