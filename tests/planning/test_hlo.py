"""Reading compiled programs: collectives of the CPU's own compiler, and of TPU and GPU text."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dalle_jax.planning import hlo

MESH = {"data": 2, "fsdp": 4, "tensor": 1}
LAYERS, WIDTH, ROWS = 5, 64, 32


@pytest.fixture
def mesh():
    devices = np.array(jax.devices()).reshape(tuple(MESH.values()))
    return Mesh(devices, tuple(MESH), axis_types=(AxisType.Auto,) * 3)


def counts(found) -> dict:
    return {(row.kind, row.axis, row.dtype): row.count for row in hlo.traffic(found)}


def test_a_scanned_training_step_gathers_each_layers_weights_twice(mesh):
    """Weights over fsdp, rows over both axes: one gather forward and one backward per layer."""
    weights = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def loss(w, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return jnp.mean(x**2)

    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=weights)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=rows)
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, weights))
    text = step.lower(w, x).compile().as_text()
    found = hlo.collectives(text, mesh.shape)

    gathers = [c for c in found if c.kind == "all-gather"]
    assert [(c.shape, c.group, c.count) for c in gathers] == [((WIDTH, WIDTH), 4, LAYERS)] * 2
    expected = 2 * LAYERS * WIDTH * WIDTH * 4 / 2**30
    assert sum(c.gib for c in gathers) == pytest.approx(expected)
    reduced = counts(found)
    assert reduced["all-reduce", "fsdp", "f32"] == reduced["all-reduce", "data", "f32"] == LAYERS
    assert reduced["all-reduce", "data+fsdp", "f32"] == 1  # the mean
    assert hlo.estimated_cycles(text) is None  # the CPU's compiler makes no estimate


def test_explicit_collectives_have_their_kind_axis_and_full_buffer(mesh):
    def body(x):  # [8, WIDTH] of [64, WIDTH]
        whole = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
        part = jax.lax.psum_scatter(whole * 2, "fsdp", scatter_dimension=0, tiled=True)
        part = jax.lax.psum(part, "data")
        return jax.lax.ppermute(part, "fsdp", [(i, (i + 1) % 4) for i in range(4)])

    split = PartitionSpec(("data", "fsdp"))
    fn = jax.shard_map(
        body, mesh=mesh, in_specs=split, out_specs=PartitionSpec("fsdp"), check_vma=False
    )
    x = jax.ShapeDtypeStruct((64, WIDTH), jnp.float32)
    found = hlo.collectives(jax.jit(fn).lower(x).compile().as_text(), mesh.shape)
    assert [(c.kind, c.axis, c.shape) for c in found] == [
        ("all-gather", "fsdp", (32, WIDTH)),
        ("reduce-scatter", "fsdp", (32, WIDTH)),
        ("all-reduce", "data", (8, WIDTH)),
        ("collective-permute", "fsdp", (8, WIDTH)),
    ]
    assert all(c.count == 1 and c.gib == math.prod(c.shape) * 4 / 2**30 for c in found)


def test_loops_in_loops_multiply(mesh):
    def body(x):
        def inner(x, _):
            return jax.lax.psum(x, "fsdp") / 4, None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=3)[0], None

        return jax.lax.scan(outer, x, length=7)[0]

    fn = jax.shard_map(
        body, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    x = jax.ShapeDtypeStruct((16,), jnp.float32)
    found = hlo.collectives(jax.jit(fn).lower(x).compile().as_text(), mesh.shape)
    assert sum(c.count for c in found) == 21


@pytest.mark.parametrize(
    "groups, axis, size",
    [
        ("{{0,1,2,3},{4,5,6,7}}", "fsdp", 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data", 2),
        ("{{0,2},{1,3},{4,6},{5,7}}", "fsdp", 2),  # half of the axis
        ("[2,4]<=[8]", "fsdp", 4),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("[1,8]<=[8]", "data+fsdp", 8),
        ("{}", "data+fsdp", 8),
        ("mesh['a'=2,'b'=4] {'b'}", "fsdp", 4),
        ("mesh['a'=2,'b'=4] {'a'}", "data", 2),
        ("mesh['a'=2,'b'=4] {'a','b'}", "data+fsdp", 8),
        ("mesh['a'=8] {'a':(2)4}", "fsdp", 4),
        ("mesh['a'=8] {'a':(1)2}", "data", 2),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", "fsdp", 4),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", "data", 2),
        ("mesh['a'=2,'b'=4], device_ids=(4,5,6,7,0,1,2,3) {'b'}", "fsdp", 4),
    ],
)
def test_every_notation_of_groups(groups, axis, size):
    text = f"""HloModule m, is_scheduled=true, num_partitions=8

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    (found,) = hlo.collectives(text, MESH)
    assert (found.axis, found.group) == (axis, size)
    assert hlo.collectives(text)[0].axis == ""


# Shortened from a program compiled for v5e:2x4: a scan of 6 turns (no trip count is written), one
# gather in three pieces beside other work, an all-reduce fused with its slice.
TPU = """HloModule jit_loss, is_scheduled=true, num_partitions=8

%begin (p0: bf16[1,256,1024]) -> (bf16[1,256,1024], bf16[1,1024,1024]) {
  %p0 = bf16[1,256,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.29 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, metadata={op_name="a/all_gather"}
  ROOT %custom-call.2 = (bf16[1,256,1024]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1024,1024]{2,1,0}, /*index=2*/u32[]{:S(2)}) custom-call(%all-gather.29), custom_call_target="AsyncCollectiveStart"
}

%piece (p1: bf16[1,256,1024]) -> bf16[1,1024,1024] {
  %p1 = bf16[1,256,1024]{2,1,0} parameter(0)
  ROOT %all-gather.31 = bf16[1,1024,1024]{2,1,0} all-gather(%p1), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, metadata={op_name="a/all_gather"}
}

%end (p2: bf16[1,256,1024]) -> bf16[1,1024,1024] {
  %p2 = bf16[1,256,1024]{2,1,0} parameter(0)
  %all-gather.33 = bf16[1,1024,1024]{2,1,0} all-gather(%p2), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, metadata={op_name="a/all_gather"}
  ROOT %custom-call.4 = bf16[1,1024,1024]{2,1,0} custom-call(%all-gather.33), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.5 (p3: bf16[1024,1024]) -> bf16[256,1024] {
  %p3 = bf16[1024,1024]{1,0} parameter(0)
  %all-reduce.6 = bf16[1024,1024]{1,0} all-reduce(%p3), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add
  ROOT %slice = bf16[256,1024]{1,0} dynamic-slice(%all-reduce.6, %i), dynamic_slice_sizes={256,1024}
}

%body (state: (s32[], bf16[1,256,1024])) -> (s32[], bf16[1,256,1024]) {
  %state = (s32[]{:T(128)}, bf16[1,256,1024]{2,1,0}) parameter(0)
  %fusion.1 = (bf16[1,256,1024]{2,1,0}, bf16[1,1024,1024]{2,1,0}) fusion(%state), kind=kCustom, calls=%begin
  %fusion.2 = bf16[1,1024,1024]{2,1,0} fusion(%fusion.1), kind=kOutput, calls=%piece, backend_config={"estimated_cycles":"100"}
  %fusion.3 = bf16[1,1024,1024]{2,1,0} fusion(%fusion.2), kind=kCustom, calls=%end, backend_config={"estimated_cycles":"10"}
  %all-gather.9 = bf16[1,1024,1024]{2,1,0} all-gather(%fusion.3), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, metadata={op_name="b/all_gather"}
  %fusion.4 = bf16[256,1024]{1,0} fusion(%fusion.3), kind=kCustom, calls=%all-reduce-scatter.5
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[1,256,1024]{2,1,0}) tuple(%next, %fusion.4)
}

%compare (p4: s32[]) -> pred[] {
  %p4 = s32[]{:T(128)} parameter(0)
  %constant.8 = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%p4, %constant.8), direction=LT
}

%condition (state.1: (s32[], bf16[1,256,1024])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[1,256,1024]{2,1,0}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %go = pred[]{:T(512)} fusion(%turn), kind=kLoop, calls=%compare
}

ENTRY %main (x: bf16[1,256,1024]) -> bf16[8] {
  %x = bf16[1,256,1024]{2,1,0} parameter(0)
  %while.1 = (s32[]{:T(128)}, bf16[1,256,1024]{2,1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %copy.1 = bf16[8]{0} copy(%while.1), backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


def test_tpu_pieces_of_one_gather_count_once_and_loops_have_a_bound():
    found = hlo.collectives(TPU, MESH)
    mib = 1024 * 1024 * 2 / 2**30
    assert [(c.kind, c.axis, c.count, c.is_async) for c in found] == [
        ("all-gather", "fsdp", 6, True),
        ("reduce-scatter", "fsdp", 6, False),
        ("all-gather", "fsdp", 6, False),
    ]
    rows = hlo.traffic(found)
    assert [(r.kind, r.gib, r.async_gib) for r in rows] == [
        ("all-gather", 12 * mib, 6 * mib),
        ("reduce-scatter", 6 * mib, 0),
    ]
    assert hlo.estimated_cycles(TPU) == 6 * 110 + 7


def test_what_the_compiler_cannot_estimate_counts_nothing():
    text = TPU.replace('"estimated_cycles":"10"', f'"estimated_cycles":"{2**63 - 1}"')
    assert hlo.estimated_cycles(text) == 6 * 100 + 7
    assert (hlo.without_estimate(text), hlo.without_estimate(TPU)) == (1, 0)


def test_gpu_starts_hold_operand_and_result():
    text = """HloModule jit_step, num_partitions=8

%wrapped (p: f32[32,64]) -> f32[8,64] {
  %p = f32[32,64]{1,0} parameter(0)
  ROOT %rs = f32[8,64]{1,0} reduce-scatter(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (x: bf16[8,64]) -> f32[8,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %ag = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %agd = bf16[32,64]{1,0} all-gather-done(%ag)
  %ar = (f32[4]{0}, f32[6]{0}) all-reduce-start(%a, %b), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %ard = (f32[4]{0}, f32[6]{0}) all-reduce-done(%ar)
  %rss = ((f32[32,64]{1,0}), f32[8,64]{1,0}) async-start(%y), calls=%wrapped
  %rsu = ((f32[32,64]{1,0}), f32[8,64]{1,0}) async-update(%rss), calls=%wrapped
  ROOT %rsd = f32[8,64]{1,0} async-done(%rsu), calls=%wrapped
}
"""  # noqa: E501
    found = sorted(hlo.collectives(text, MESH), key=lambda c: (c.kind, c.shape))
    assert [(c.kind, c.axis, c.dtype, c.shape, c.count) for c in found] == [
        ("all-gather", "fsdp", "bf16", (32, 64), 1),
        ("all-reduce", "data", "f32", (4,), 1),
        ("all-reduce", "data", "f32", (6,), 1),
        ("reduce-scatter", "fsdp", "f32", (32, 64), 1),
    ]
    assert all(c.is_async for c in found)


def test_attributes_over_several_lines_end_no_computation():
    """A Pallas kernel's metadata is JSON on lines of its own, one of which starts with a brace."""
    text = """\
HloModule step, num_partitions=4

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="k", frontend_attributes={metadata={
"block": "{256}"
}}, metadata={op_name="k"}
  ROOT %sum = f32[8]{0} all-reduce(%kernel), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
    assert [c.kind for c in hlo.collectives(text)] == ["all-reduce"]
