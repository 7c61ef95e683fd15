"""The pipeline: one global order for any number of processes, exact resumption, counted skips."""

import io

import ml_collections
import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import pipeline, sources, tokenizers
from dalle_jax.types import UsageError

PX = 8


class FakeSource:
    """An in-memory source. Example i is a picture of grey level i, with 1 to 3 captions."""

    def __init__(self, size, broken=(), px=PX, fields=("image", "text", "codes")):
        self.size, self.px, self.fields, self.reads = size, px, frozenset(fields), 0
        self.broken = (
            dict.fromkeys(broken, b"not a picture") if not isinstance(broken, dict) else broken
        )

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        self.reads += 1
        bad = self.broken.get(i)
        if isinstance(bad, Exception):
            raise bad
        rng = np.random.default_rng(i)
        pixels = rng.integers(0, 256, (self.px, self.px + i % 3, 3), np.uint8)
        pixels[0, 0] = i
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return sources.Example(
            id=f"example-{i}",
            image=buffer.getvalue() if bad is None else bad,
            captions=[f"caption {k} of picture {i}" for k in range(1 + i % 3)],
            codes=np.full(4, i, np.int32),
        )


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(
        [f"caption {k} of picture {i}" for i in range(50) for k in range(3)], 400
    )


def config(**changes):
    values = dict(
        source="fake", data_dir="data", split="train", image_px=PX, crop="none", vocab_size=400,
        text_len=20, bpe_dropout=0.0, caption_drop=0.0, add_bos_eos=False, cache_mib=16, threads=2,
    )  # fmt: skip
    return ml_collections.ConfigDict(values | changes)


RANDOM = dict(crop="dvae", bpe_dropout=0.2, caption_drop=0.2)


def build(tokenizer, size=50, *, source=None, training=True, batch=8, seed=0, fields=None,
          process=(0, 1), **changes):  # fmt: skip
    return pipeline.Pipeline(
        source or FakeSource(size),
        config(**changes),
        seed,
        fields=fields or {"image", "text", "codes"},
        tokenizer=tokenizer,
        training=training,
        batch=batch,
        rows=np.arange(batch).reshape(process[1], -1)[process[0]],
    )


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


class BatchedSource(FakeSource):
    """A source that reads many at once, and fails at once if one of them is damaged."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def test_shapes_and_types(tokenizer):
    batch = build(tokenizer)(0)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((8, PX, PX, 3), "uint8"),
        "text": ((8, 20), "int32"),
        "codes": ((8, 4), "int32"),
    }
    assert build(tokenizer, fields={"text"})(0).keys() == {"text"}
    assert build(None, fields={"image", "codes"})(0).keys() == {"image", "codes"}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("changes", [{}, RANDOM, dict(RANDOM, crop="dalle", add_bos_eos=True)])
def test_processes_together_are_one(tokenizer, count, changes):
    """Bit for bit, with everything random on, broken records, and another number of threads."""
    broken = (3, 4, 20, 21, 22)
    single_process = build(tokenizer, source=FakeSource(50, broken), **changes)
    parts = [
        build(tokenizer, source=FakeSource(50, broken), process=(i, count),
              **(changes | dict(threads=1 + i, cache_mib=i)))
        for i in range(count)
    ]  # fmt: skip
    for step in (0, 1, 5, 6, 13):
        slices = [part(step) for part in parts]
        together = {k: np.concatenate([s[k] for s in slices]) for k in slices[0]}
        assert_same(single_process(step), together)
        assert single_process.ids(step) == [name for part in parts for name in part.ids(step)]


def test_no_other_processs_rows_are_ever_decoded(tokenizer):
    """Not one more record is read than there are rows; which rows may be any."""
    full, part = FakeSource(50), FakeSource(50)
    everything = build(tokenizer, source=full, batch=12)
    for rows in ([4, 5, 6, 7], [0, 1, 6, 7]):  # a block, and two: hosts on a torus
        part.reads = 0
        mine = pipeline.Pipeline(
            part,
            config(cache_mib=0),
            0,
            fields={"image", "text", "codes"},
            tokenizer=tokenizer,
            training=True,
            batch=12,
            rows=rows,
        )
        for step in range(3):
            full = everything(step)
            assert_same(mine(step), {name: value[rows] for name, value in full.items()})
        assert part.reads == 3 * len(rows)


@pytest.mark.parametrize("changes", [{}, RANDOM])
def test_a_resumed_run_goes_on_as_it_began(tokenizer, changes):
    first = build(tokenizer, **changes)
    unbroken = [first(step) for step in range(12)]
    resumed = build(tokenizer, **changes)
    for step in (11, 7, 3):  # in any order, with a cold cache
        assert_same(resumed(step), unbroken[step])
        assert_same(first(step), unbroken[step])


def test_each_epoch_holds_every_example_once(tokenizer):
    batches = build(tokenizer, size=48, fields={"codes"})
    for epoch in range(3):
        seen = np.concatenate([batches(epoch * 6 + step)["codes"][:, 0] for step in range(6)])
        np.testing.assert_array_equal(np.sort(seen), np.arange(48))
    orders = [[batches(e * 6 + s)["codes"][:, 0].tolist() for s in range(6)] for e in range(2)]
    assert orders[0] != orders[1]
    assert build(tokenizer, seed=1)(0)["codes"].tolist() != build(tokenizer)(0)["codes"].tolist()


def test_image_text_and_codes_belong_together(tokenizer):
    batches = build(tokenizer, caption_drop=0.0)
    for step in range(3):
        batch = batches(step)
        for image, text, codes, name in zip(*batch.values(), batches.ids(step), strict=True):
            i = codes[0]
            assert name == f"example-{i}"
            assert tokenizers.Tokenizer.decode(tokenizer, text).endswith(f"of picture {i}")
            if i % 3 == 0:  # square, so not resized
                assert image[0, 0, 0] == i


def test_codes_take_the_same_captions_as_images(tokenizer):
    """Training on stored codes must see the very batches that training on images sees."""
    a = build(tokenizer, fields={"image", "text"}, **RANDOM)
    b = build(tokenizer, fields={"codes", "text"}, **RANDOM)
    for step in range(4):
        np.testing.assert_array_equal(a(step)["text"], b(step)["text"])


def test_every_caption_is_chosen_sometimes(tokenizer):
    batches = build(tokenizer, size=30, fields={"text"}, batch=30)
    texts = {tokenizer.decode(row) for step in range(40) for row in batches(step)["text"]}
    assert {f"caption {k} of picture 5" for k in range(3)} <= texts


def test_caption_drop_is_about_its_rate_and_empties(tokenizer):
    batches = build(tokenizer, caption_drop=0.25, fields={"text"}, batch=50)
    empty = np.mean([(batches(s)["text"] == 0).all(1).mean() for s in range(20)])
    assert 0.19 < empty < 0.31  # 1000 draws, 4 sigma
    wrapped = build(tokenizer, caption_drop=1.0, add_bos_eos=True, fields={"text"})(0)["text"]
    assert (wrapped[:, :3] == [tokenizers.BOS, tokenizers.EOS, 0]).all()


def test_evaluation_is_in_order_plain_and_wraps(tokenizer):
    batches = build(tokenizer, size=10, training=False, **RANDOM)
    again = build(tokenizer, size=10, training=False, seed=9, **RANDOM)
    codes = np.concatenate([batches(i)["codes"][:, 0] for i in range(3)])
    np.testing.assert_array_equal(codes, np.arange(24) % 10)
    assert_same(batches(0), again(0))
    texts = [tokenizer.decode(row) for row in batches(0)["text"]]
    assert texts == [f"caption 0 of picture {i}" for i in range(8)]


def test_broken_records_are_replaced_counted_and_named(tokenizer):
    broken = {5: b"", 6: b"<html>", 7: ValueError("checksum")}
    batches = build(tokenizer, source=FakeSource(48, broken))
    seen = [c for step in range(12) for c in batches(step)["codes"][:, 0].tolist()]
    assert not {5, 6, 7} & set(seen) and len(seen) == 96
    clean = build(tokenizer, size=48)
    plain = [c for step in range(12) for c in clean(step)["codes"][:, 0].tolist()]
    for position, (mine, theirs) in enumerate(zip(seen, plain, strict=True)):
        if theirs in (5, 6, 7):
            following = [c for c in plain[position:] if c not in (5, 6, 7)]
            assert not following or mine == following[0]
        else:
            assert mine == theirs
    assert batches.skipped == {"unreadable picture": 2, "damaged record": 1}
    named = " ".join(batches.skipped_ids)
    assert "example-5" in named and "example-6" in named and "record 7" in named
    for step in range(12):
        batches(step)
    assert sum(batches.skipped.values()) == 3


def test_reading_many_at_once_changes_nothing(tokenizer):
    broken = {5: b"", 7: ValueError("checksum"), 8: ValueError("checksum")}
    one, many = (
        build(tokenizer, source=kind(48, broken), **RANDOM) for kind in (FakeSource, BatchedSource)
    )
    for step in range(8):
        assert_same(one(step), many(step))
    assert one.skipped == many.skipped == {"damaged record": 2, "unreadable picture": 1}
    names = [[text.split(":")[0] for text in p.skipped_ids] for p in (one, many)]
    assert names[0] == names[1] and len(names[0]) == 3


def test_nothing_usable_is_one_message(tokenizer):
    for training in (True, False):
        batches = build(tokenizer, source=FakeSource(9, range(9)), training=training)
        with pytest.raises(UsageError, match=r"cannot be used .*unreadable picture.*example-"):
            batches(0)
    one_left = build(tokenizer, source=FakeSource(9, range(1, 9)), fields={"image"})
    assert (one_left(0)["image"] == one_left(0)["image"][0]).all()


def test_the_cache_reads_each_record_once_and_changes_nothing(tokenizer):
    cached, fresh = FakeSource(50), FakeSource(50)
    a = build(tokenizer, source=cached, **RANDOM)
    b = build(tokenizer, source=fresh, cache_mib=0, **RANDOM)
    for step in range(25):
        assert_same(a(step), b(step))
    assert cached.reads == 50 and fresh.reads == 200


def test_a_batch_may_be_written_to(tokenizer):
    batches = build(tokenizer)
    first = batches(0)
    copy = {k: v.copy() for k, v in first.items()}
    for array in first.values():
        array[:] = 7
    assert_same(batches(0), copy)


def test_cut_captions_are_counted_and_logged_once(tokenizer, caplog):
    batches = build(tokenizer, text_len=2, fields={"text"})
    for step in range(3):
        assert batches(step)["text"].shape == (8, 2)
    assert batches.truncated == 24
    assert len([r for r in caplog.records if "data.text_len=2" in r.getMessage()]) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(crop="dale"), "did you mean 'dalle'"),
        (dict(batch=51), "50 training examples"),
        (dict(batch=0), "data.batch=0"),
        (dict(bpe_dropout=1.0), "bpe_dropout"),
        (dict(caption_drop=-0.1), "caption_drop"),
        (dict(text_len=0), "text_len"),
        (dict(text_len=2, add_bos_eos=True), "text_len"),
        (dict(threads=0), "threads"),
        (dict(image_px=0), "image_px"),
        (dict(vocab_size=50), "data.vocab_size=50"),
        (dict(source=FakeSource(50, fields=("image", "text"))), "no codes; it holds image, text"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_reading(tokenizer, changes, says):
    with pytest.raises(UsageError, match=says):
        build(tokenizer, **changes)


def test_evaluation_may_be_smaller_than_its_batch(tokenizer):
    assert build(tokenizer, size=3, training=False)(0)["image"].shape[0] == 8


def test_close_ends_the_threads(tokenizer):
    batches = build(tokenizer)
    batches(0)
    batches.close()
