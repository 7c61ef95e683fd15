"""Compiles one training step for devices that are not here, and reads the compiler's report.

A TPU's compiler spends most of its time on machine code: 688 of 701 core-seconds for
configs/dvae_paper.py on v4:2x4x4 (libtpu 0.0.52). Only the estimated cycles need that code.
Sharding, fusion, schedule and memory are decided earlier, so `step(is_quick=True)` stops there.
"""

import dataclasses
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from dalle_jax.engine.program import Program
from dalle_jax.planning.topology import Topology

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# A call that no compiler has code for: it fails first after memory is laid out.
_STOP = "dalle_jax_plan_stops_here"

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's report; bytes per device.

    Attributes:
      fits: whether the device has `peak` bytes.
      peak: memory that the step needs.
      text: the optimised program; None if the compiler gave up.
      seconds: seconds of compiling.
      is_quick: whether the compiler stopped before it made code: without estimated cycles, and
        `peak` without the code's bytes.
    """

    fits: bool
    peak: float
    text: str | None
    seconds: float
    is_quick: bool = False


def step(
    program: Program, resident: int, topology: Topology, *, is_quick: bool = False
) -> Compiled:
    """Compiles the training step; for a program that is too large, `fits` is False.

    Args:
      program: the run's program.
      resident: bytes of the step's arguments per device. Arguments that the step does not read (a
        frozen codec's decoder) are none of the executable, but they occupy memory.
      topology: the devices.
      is_quick: stop after memory is laid out.

    Raises:
      jax.errors.JaxRuntimeError: for any other failure of the compiler.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        try:
            lowered = _lower_stopped(program) if is_quick else program.lower_step()
            executable = compile_lowered(lowered, {"xla_dump_to": name})
        except jax.errors.JaxRuntimeError as error:
            seconds = time.perf_counter() - began
            assignment = _dumped(folder, "-buffer-assignment")
            if assignment and _STOP in str(error):
                peak = allocated_bytes(assignment, resident)
                text = _dumped(folder, "after_optimizations")
                return Compiled(peak <= topology.capacity, peak, text, seconds, is_quick=True)
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            return Compiled(False, max(needed, resident), None, seconds)
        # Only a TPU's compiler dumps the program with estimated cycles. jaxlib 0.10.2 cannot print
        # the program that libtpu 0.0.52 compiles for a v5p.
        text = _dumped(folder, "after_codegen") or executable.as_text()
    memory = executable.memory_analysis()
    peak = (
        max(memory.argument_size_in_bytes, resident)
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Compiled(peak <= topology.capacity, peak, text, time.perf_counter() - began)


def needed_bytes(message: str) -> float | None:
    """The memory that a program needs, from a compiler's error message; None for another error.

    Args:
      message: the text of the exception.
    """
    for pattern in (
        r"memory required for [\w ]+ \(([\d.]+)([KMGT])\) exceeds",
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
    ):
        match = re.search(pattern, message)
        if match:
            return float(match[1]) * _UNITS[match[2]]
    return None


def allocated_bytes(assignment: str, resident: int = 0) -> int:
    """Bytes of a device's main memory in a buffer assignment.

    Args:
      assignment: XLA's dump, one line per allocation. Allocations with a colour are in another
        memory (VMEM, …); thread-local ones (a reduction's operands) occupy none.
      resident: lower bound of the bytes of the program's parameters.
    """
    parameters = others = 0
    for size, rest in _ALLOCATION.findall(assignment):
        if " color " in rest or "thread-local" in rest:
            continue
        if " parameter " in rest:
            parameters += int(size)
        else:
            others += int(size)
    return max(parameters, resident) + others


def _lower_stopped(program: Program) -> jax.stages.Lowered:
    """The training step with a call at which its compiler stops."""

    def stopped(*arguments):
        # As an output: the partitioner refuses calls with side effects and no operand.
        return jax.ffi.ffi_call(_STOP, jax.ShapeDtypeStruct((), bool))(), program.step(*arguments)

    with program.use():
        return jax.jit(stopped, donate_argnums=0).lower(*program.arguments)


def compile_lowered(lowered: jax.stages.Lowered, options: dict[str, Any]) -> jax.stages.Compiled:
    """Compiles with XLA's `options`; without Triton if XLA has no tiles for a product."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "output tile sizes" not in str(error):
            raise
        # Without a GPU to time tiles on, XLA guesses the tiles of Triton's products, and it has no
        # guess for CLIP L/14's [19712, 768] x [768, 768]. For a plan, cuBLAS is as good.
        return lowered.compile(compiler_options={**options, "xla_gpu_enable_triton_gemm": False})


def _dumped(folder: pathlib.Path, kind: str) -> str:
    """The last dump of a kind; a retried compilation writes several."""
    files = sorted(folder.glob(f"*{kind}.txt"), key=lambda path: path.stat().st_mtime)
    return files[-1].read_text() if files else ""
