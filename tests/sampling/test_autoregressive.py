"""The sampler: equal to the uncached network, to itself in chunks, and to itself on 8 devices."""

import dataclasses

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import weights
from ml_collections import ConfigDict

from dalle_jax.engine import meshes, sharding
from dalle_jax.models import dalle
from dalle_jax.nn.transformer import TransformerConfig
from dalle_jax.sampling import autoregressive
from dalle_jax.types import UsageError

CONFIG = dalle.DalleConfig(
    text_len=4,
    vocab_size=12,
    num_codes=16,
    grid=3,
    transformer=TransformerConfig(width=16, num_layers=3, num_heads=2),
    attention=("row", "column"),
    last_attention="conv",
    embed_std=0.5,
)
TEXT = np.array([[3, 4, 5, 0], [7, 0, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def network():
    """Untrained, its logits scaled up: a flat distribution would hide a wrong context."""
    model = dalle.Dalle(CONFIG)
    codes = jnp.zeros((2, 9), jnp.int32)
    params = nn.meta.unbox(weights.init(model, TEXT, codes))["params"]
    return model, {**params, "image_head": params["image_head"] * 3}


def sample(network, **options):
    options = dict(num_candidates=3, key=jax.random.key(5)) | options
    return np.asarray(autoregressive.sample(*network, options.pop("text", TEXT), **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": 2.5},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8},
        {"prefix": np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), "guidance": 1.5},
    ],
    ids=["plain", "guided", "filtered", "completion"],
)
def test_cached_equals_uncached_token_for_token(network, options):
    codes = sample(network, **options)
    assert codes.shape == (2, 3, 9) and codes.dtype == np.int32
    assert len(np.unique(codes.reshape(6, 9), axis=0)) > 1
    np.testing.assert_array_equal(codes, sample(network, use_cache=False, **options))


def test_every_mask_kind_decodes_like_it_trains(network):
    """A full layer and a column first, on top of the patterns above."""
    config = dataclasses.replace(CONFIG, attention=("full", "column", "row"), last_attention="")
    other = (dalle.Dalle(config), network[1])
    np.testing.assert_array_equal(sample(other), sample(other, use_cache=False))


def test_drawn_codes_follow_the_logits(network):
    """Greedy decoding: every code is the argmax of the training-time logits before it."""
    model, params = network
    codes = sample(network, temperature=0.0, num_candidates=1)[:, 0]
    _, logits = model.apply({"params": params}, TEXT, codes)
    np.testing.assert_array_equal(codes, np.argmax(logits, axis=-1))


def test_guidance_one_is_unguided_and_zero_ignores_the_text(network):
    np.testing.assert_array_equal(sample(network, guidance=1.0), sample(network))
    empty = sample(network, text=np.zeros_like(TEXT))
    np.testing.assert_array_equal(sample(network, guidance=0.0), empty)


def test_completion_keeps_its_prefix(network):
    prefix = np.array([[1, 2, 3], [9, 8, 7]], np.int32)
    codes = sample(network, prefix=prefix)
    np.testing.assert_array_equal(codes[:, :, :3], np.repeat(prefix[:, None], 3, axis=1))


def test_a_candidate_depends_on_its_index_alone(network):
    """Chunks, a later start and a prompt alone give the codes of one call."""
    codes = sample(network, num_candidates=5)
    chunks = list(
        autoregressive.sample_batches(
            *network, TEXT, num_candidates=5, chunk=2, key=jax.random.key(5)
        )
    )
    assert [start for start, _ in chunks] == [0, 2, 4]
    np.testing.assert_array_equal(np.concatenate([c for _, c in chunks], axis=1), codes)
    later = sample(network, num_candidates=2, first_candidate=3)
    np.testing.assert_array_equal(later, codes[:, 3:])
    alone = sample(network, text=TEXT[1:], first_prompt=1, num_candidates=5)
    np.testing.assert_array_equal(alone, codes[1:])
    assert not np.array_equal(sample(network, key=jax.random.key(6), num_candidates=5), codes)


def leaves_the_device(jaxpr) -> list[str]:
    """Primitives, at any depth, that ask the host for something or tell it."""
    names = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        names += [name] * any(part in name for part in ("callback", "infeed", "outfeed", "print"))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            names += leaves_the_device(inner)
    return names


def test_all_codes_are_drawn_by_one_program_that_never_asks_the_host(network, caplog):
    """A chunk is one call: compiled once for all prompts and settings, and without callbacks."""
    model, params = network
    params = jax.device_put(params)
    with jax.log_compiles():
        for i in range(3):
            options = dict(temperature=1.0 + i / 10, first_candidate=7 * i, key=jax.random.key(i))
            sample((model, params), text=TEXT + i, num_candidates=7, **options)
    compilations = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.msg]
    assert sum("jit(_sample)" in text for text in compilations) == 1

    def run(params, text, key):
        return autoregressive.sample(model, params, text, num_candidates=2, key=key)

    jaxpr = jax.make_jaxpr(run)(params, TEXT, jax.random.key(0)).jaxpr
    assert leaves_the_device(jaxpr) == []

    def chatty(x):
        return jax.lax.scan(lambda c, i: (c, jax.debug.callback(print, i)), x, TEXT[0])[0]

    assert leaves_the_device(jax.make_jaxpr(chatty)(1.0).jaxpr)  # it would be seen


def test_eight_devices_give_the_codes_of_one(network):
    """Five candidates on eight devices: rounded up, cut off, and really spread."""
    mesh = meshes.make_mesh(ConfigDict(dict(data=4, fsdp=2, tensor=1)))
    np.testing.assert_array_equal(
        sample(network, num_candidates=5, mesh=mesh), sample(network, num_candidates=5)
    )
    spread = autoregressive._sample.lower(
        *network,
        TEXT,
        jnp.zeros((2, 0), jnp.int32),
        jax.random.key(0),
        dict(first_prompt=0, first_candidate=0, temperature=1.0, k=None, p=None, guidance=None),
        num_candidates=8,
        use_cache=True,
        mesh=mesh,
    ).compile()
    assert len(spread.output_shardings.device_set) == 8
    assert spread.output_shardings.shard_shape((2, 8, 9)) == (2, 1, 9)


def test_training_rules_in_force_do_not_disturb(network):
    """A preview samples inside the trainer's mesh; 6 rows do not divide by 8 devices."""
    mesh_config = ConfigDict(dict(data=8, fsdp=1, tensor=1, rules="dp"))
    mesh = meshes.make_mesh(mesh_config)
    with sharding.use(mesh, sharding.rules(mesh_config)):
        inside = sample(network)
    np.testing.assert_array_equal(inside, sample(network))


def test_bad_options_are_refused(network):
    with pytest.raises(UsageError, match="num_candidates=0"):
        sample(network, num_candidates=0)
    with pytest.raises(UsageError, match="has 9 of 9 codes"):
        sample(network, prefix=np.zeros((2, 9), np.int32))
    with pytest.raises(ValueError, match=r"expected \[P, 4\]"):
        sample(network, text=TEXT[:, :3])
    with pytest.raises(UsageError, match="top_k=17"):
        sample(network, top_k=17)
    with pytest.raises(UsageError, match="chunk=0"):
        next(autoregressive.sample_batches(*network, TEXT, num_candidates=1, chunk=0, key=None))
