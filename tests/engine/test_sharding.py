"""Where arrays land is asserted on shardings, not on the code having run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dalle_jax import axes, layout
from dalle_jax.engine import meshes, sharding
from dalle_jax.types import UsageError


def mesh_config(data=-1, fsdp=1, tensor=1, rules="fsdp_tp"):
    return ConfigDict(dict(data=data, fsdp=fsdp, tensor=tensor, rules=rules))


@pytest.fixture
def mesh():
    return meshes.make_mesh(mesh_config(2, 2, 2))


RULES = axes.RULES["fsdp_tp"]


def test_minus_one_fills_the_mesh():
    mesh = meshes.make_mesh(mesh_config(-1, 2, 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert len({d.id for d in mesh.devices.flat}) == 8


def test_one_device_is_a_mesh_too():
    mesh = meshes.make_mesh(mesh_config(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    "sizes, text",
    [
        ((3, 1, 1), "3 x 1 x 1 = 3, but there are 8 devices"),
        ((-1, 3, 1), "8 devices are not a multiple of 3"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, 1, 1), "positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_arithmetic(sizes, text):
    with pytest.raises(UsageError, match=text):
        meshes.make_mesh(mesh_config(*sizes))


def test_unknown_rules_are_refused():
    with pytest.raises(UsageError, match="'fdsp' is unknown.*fsdp"):
        sharding.rules(mesh_config(rules="fdsp"))


def test_every_table_knows_every_name_and_only_mesh_axes():
    for table in axes.RULES.values():
        assert table.keys() == set(axes.LOGICAL)
        assert {a for where in table.values() for a in where} <= set(axes.MESH_AXES)


@pytest.mark.parametrize(
    "shape, names, expected",
    [
        ((8, 6), (axes.EMBED, axes.MLP), P("fsdp", "tensor")),
        ((3, 8, 6), (axes.LAYERS, axes.EMBED, axes.HEADS), P(None, "fsdp", "tensor")),
        ((8, 6), (axes.MLP, axes.MLP), P("tensor", None)),  # the first dimension wins
        ((7, 6), (axes.EMBED, axes.MLP), P(None, "tensor")),  # 7 is not even: replicated
        ((8, 4), (axes.ACT_BATCH, None), P(("data", "fsdp"), None)),
        ((2, 4), (axes.ACT_BATCH, None), P("data", None)),  # room for one of the two
        ((), (), P()),
    ],
)
def test_spec(mesh, shape, names, expected):
    assert sharding.spec(shape, names, mesh, RULES) == expected


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, (axes.EMBED, axes.MLP))
        x = x @ self.param("up", init, (x.shape[-1], 6))
        x = nn.with_logical_constraint(x, (axes.ACT_BATCH, axes.ACT_MLP))
        return x * self.param("gain", nn.initializers.ones, (1, 6))


def test_jit_puts_annotated_arrays_where_the_rules_say(mesh):
    boxed = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((8, 4)))
    where = sharding.shardings(boxed, mesh, RULES)
    init = jax.jit(lambda k: sharding.unbox(Net().init(k, jnp.ones((8, 4)))), out_shardings=where)
    params = init(jax.random.key(0))
    assert params["params"]["up"].sharding.spec == P("fsdp", "tensor")
    assert params["params"]["gain"].sharding.is_fully_replicated
    with sharding.use(mesh, RULES):
        out = jax.jit(Net().apply)(params, jnp.ones((8, 4)))
    assert out.sharding.is_equivalent_to(
        jax.sharding.NamedSharding(mesh, P(("data", "fsdp"), "tensor")), 2
    )


def test_unknown_name_is_refused(mesh):
    boxed = {"a": nn.Partitioned(jnp.ones((2, 2)), names=("embd", None))}
    with pytest.raises(ValueError, match="'embd'.*axes"):
        sharding.shardings(boxed, mesh, RULES)


def test_names_must_match_the_rank(mesh):
    boxed = {"a": nn.Partitioned(jnp.ones((2, 2, 2)), names=("embed", None))}
    with pytest.raises(ValueError, match="shape"):
        sharding.shardings(boxed, mesh, RULES)


def test_uneven_dimension_is_reported_once(mesh, caplog):
    boxed = {"odd": nn.Partitioned(jnp.ones((7, 2)), names=("embed", None))}
    sharding.shardings(boxed, mesh, RULES)
    sharding.shardings(boxed, mesh, RULES)
    texts = [r.getMessage() for r in caplog.records]
    assert len(texts) == 1 and "odd" in texts[0] and "fsdp=2" in texts[0]


def test_unbox_inside_a_mesh_takes_abstract_values(mesh):
    boxed = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((8, 4)))
    with sharding.use(mesh, RULES):
        plain = sharding.unbox(boxed)
    assert plain["params"]["up"].shape == (4, 6)


def test_global_batch_is_split_over_data_and_fsdp(mesh):
    x = np.arange(16).reshape(8, 2)
    got = sharding.to_global({"x": x}, sharding.batch_sharding(mesh))["x"]
    assert got.sharding.shard_shape(got.shape) == (2, 2)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("size, accum, near", [(6, 1, "4 or 8"), (3, 1, "use 4"), (12, 2, "8 or")])
def test_batch_sizes_that_do_not_split_are_refused(mesh, size, accum, near):
    with pytest.raises(UsageError, match=near):
        sharding.check_batch(size, mesh, "data.batch", accum)


def stacked(rows, columns, names=(axes.EMBED, axes.HEADS)):
    matrix = jax.ShapeDtypeStruct((3, rows, columns), jnp.float32)
    vector = jax.ShapeDtypeStruct((3, columns), jnp.float32)
    return {
        "w": nn.LogicallyPartitioned(matrix, (axes.LAYERS, *names)),
        "b": nn.LogicallyPartitioned(vector, (axes.LAYERS, names[1])),
    }


@pytest.mark.parametrize("names", [(axes.EMBED, axes.HEADS), (axes.HEADS, axes.EMBED)])
def test_layer_matrices_lie_by_rows_folded(names):
    """Whichever of the two dimensions the rules put on fsdp."""
    mesh = meshes.make_mesh(mesh_config(2, 4))
    boxed = stacked(12, 16, names)
    assert sharding.storage(boxed, mesh, RULES) == {
        "w": layout.Storage(8, gathered=True),
        "b": layout.PLAIN,
    }
    where = sharding.shardings(boxed, mesh, RULES)
    assert where["w"].spec == P(None, "fsdp", None) and where["b"].is_fully_replicated


@pytest.mark.parametrize(
    "sizes, rules, rows, spec",
    [
        ((2, 2, 2), "fsdp_tp", 12, P(None, "fsdp", "tensor")),  # tensor: the partitioner's
        ((8, 1, 1), "fsdp", 12, P(None, None, None)),
        ((1, 8, 1), "dp", 12, P(None, None, None)),
        ((1, 8, 1), "fsdp", 12, P(None, None, None)),  # 8 does not divide 12: reported
        ((1, 8, 1), "fsdp,heads=fsdp", 12, P(None, None, "fsdp")),
    ],
)
def test_other_layers_are_left_to_the_partitioner(sizes, rules, rows, spec):
    sizes_config = mesh_config(*sizes, rules=rules)
    mesh, table = meshes.make_mesh(sizes_config), sharding.rules(sizes_config)
    boxed = stacked(rows, 16)
    assert sharding.storage(boxed, mesh, table)["w"] == layout.PLAIN
    assert sharding.shardings(boxed, mesh, table)["w"].spec == spec


def test_rules_can_change_single_rows():
    table = sharding.rules(mesh_config(rules="fsdp, vocab=fsdp+tensor, embed="))
    assert table[axes.VOCAB] == ("fsdp", "tensor") and table[axes.EMBED] == ()
    assert table[axes.CODES] == axes.RULES["fsdp"][axes.CODES]
    assert axes.RULES["fsdp"][axes.VOCAB] == ()


@pytest.mark.parametrize(
    "rules, text",
    [
        ("fsdp,vocabulary=fsdp", "'vocabulary=fsdp' is not LOGICAL=AXES.*vocab"),
        ("fsdp,vocab", "'vocab' is not LOGICAL=AXES"),
        ("fsdp,vocab=tp", "'vocab=tp' names an unknown mesh axis.*tensor"),
    ],
)
def test_bad_rows_are_refused(rules, text):
    with pytest.raises(UsageError, match=text):
        sharding.rules(mesh_config(rules=rules))
