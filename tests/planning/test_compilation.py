"""Ahead-of-time compilation: what is read from a compiler that succeeds, refuses or is stopped."""

import jax
import linear_task as lt
import pytest

from dalle_jax.engine.program import Program
from dalle_jax.planning import compilation, topology

# As libtpu 0.0.52 dumps it, shortened: parameters, an aliased result, scratch; VMEM is colour 1.
ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, page 0, output shape is |(f32[8,128])|, maybe-live-out:
 value: <119 tuple.1{} @0> (size=512,offset=0): (f32[8,128]{1,0:T(8,128)})
allocation 1: size 4096, page 0, parameter 1, shape |f32[8,128]| at ShapeIndex {}:
 value: <96 x.1 @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 2: size 8192, page 0, parameter 0, shape |f32[16,128]| at ShapeIndex {}, maybe-live-out:
 value: <95 w.1 @0> (size=8192,offset=0): f32[16,128]{1,0:T(8,128)}
allocation 6: size 65536, page 0, preallocated-temp:
 value: <103 fusion.14 @0> (size=65536,offset=0): f32[128,128]{1,0:T(8,128)}
allocation 3: size 268435456, page 0, thread-local:
 value: <41 add.3 @0> (size=268435456,offset=0): bf16[134217728]{0:T(1024)}
allocation 7: size 1000000, color 1, page 0, preallocated-temp:
 value: <116 custom-call @1> (size=1000000,offset=0): f32[1,250000]{1,0:T(8,128)S(1)}
"""


def test_memory_is_read_from_the_buffer_assignment():
    assert compilation.allocated_bytes(ASSIGNMENT) == 512 + 4096 + 8192 + 65536
    # What the step is given but does not read is no parameter of the program.
    assert compilation.allocated_bytes(ASSIGNMENT, resident=20_000) == 512 + 20_000 + 65536


@pytest.fixture
def program():
    config = lt.make_config()
    return Program.build(config, lt.make_task(config.data.batch))


def test_a_stopped_compiler_makes_no_code(program):
    cpu = topology.Topology("toy:8", tuple(jax.devices()), None, 2**30)
    found = compilation.step(program, 0, cpu, is_quick=True)
    assert found.is_quick and found.fits and "all-reduce" in found.text
    small = compilation.step(program, 2**30 + 1, cpu, is_quick=True)
    assert not small.fits and small.peak > 2**30


def test_another_failure_of_a_stopped_compiler_is_an_error(program, monkeypatch):
    def fail(lowered, options):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    cpu = topology.Topology("toy:8", tuple(jax.devices()), None, 2**30)
    monkeypatch.setattr(compilation, "compile_lowered", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compilation.step(program, 0, cpu, is_quick=True)


def test_products_that_triton_cannot_tile_are_left_to_cublas():
    tried = []

    class Lowered:
        def compile(self, compiler_options):
            tried.append(compiler_options)
            if len(tried) == 1:
                raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that …")
            return "compiled"

    assert compilation.compile_lowered(Lowered(), {"xla_dump_to": "x"}) == "compiled"
    assert tried == [
        {"xla_dump_to": "x"},
        {"xla_dump_to": "x", "xla_gpu_enable_triton_gemm": False},
    ]


@pytest.mark.parametrize(
    "message, needed",
    [
        (
            "total memory required for HLO temporaries (512.00M) exceeds available HBM (15.75G)",
            512 * 2**20,
        ),
        ("Used 28.44G of 15.75G hbm. Exceeded hbm capacity by 12.69G.", 28.44 * 2**30),
        ("out of cheese", None),
    ],
)
def test_the_need_is_read_from_the_message(message, needed):
    assert compilation.needed_bytes(message) == needed
