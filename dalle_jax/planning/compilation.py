"""One training step, compiled for devices that are not there: what its compiler says of it.

The whole compiler makes machine code, which nobody will run, and for a TPU that is nearly all of
its work: of configs/dvae_paper.py on v4:2x4x4 688 of 701 seconds of a core (libtpu 0.0.52). The
estimated cycles come out of it. Sharding, fusion, schedule and memory are settled before, so
`step(is_quick=True)` ends there.
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

# A call that no compiler has code for: the first thing that fails once memory is laid out.
_STOP = "dalle_jax_plan_stops_here"

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said; bytes per device.

    Attributes:
      fits: whether the device has that much.
      peak: what the step needs.
      text: the optimised program; None if the compiler gave up.
      seconds: how long the compiler took.
      is_quick: whether it ended before it made code: no estimated cycles, and `peak` lacks the
        code's bytes.
    """

    fits: bool
    peak: float
    text: str | None
    seconds: float
    is_quick: bool = False


def step(program: Program, held: int, topology: Topology, *, is_quick: bool = False) -> Compiled:
    """Compiles; a program that is too large for its device is an answer and not an error.

    Args:
      program: the run's program.
      held: bytes of the step's arguments on one device. What the step does not read (a frozen
        codec's decoder) is no argument of the executable, but it lies in memory all the same.
      topology: where it would run.
      is_quick: end once memory is laid out.

    Raises:
      jax.errors.JaxRuntimeError: for any other failure of the compiler.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        try:
            lowered = _lower_stopped(program) if is_quick else program.lower_step()
            executable = _executable(lowered, {"xla_dump_to": name})
        except jax.errors.JaxRuntimeError as error:
            seconds = time.perf_counter() - began
            assignment = _dumped(folder, "-buffer-assignment")
            if assignment and _STOP in str(error):
                peak = allocated_bytes(assignment, held)
                text = _dumped(folder, "after_optimizations")
                return Compiled(peak <= topology.capacity, peak, text, seconds, is_quick=True)
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            return Compiled(False, max(needed, held), None, seconds)
        # Only a TPU's compiler dumps that: the program with estimated cycles. jaxlib 0.10.2 cannot
        # print what libtpu 0.0.52 makes for a v5p.
        text = _dumped(folder, "after_codegen") or executable.as_text()
    memory = executable.memory_analysis()
    peak = (
        max(memory.argument_size_in_bytes, held)
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Compiled(peak <= topology.capacity, peak, text, time.perf_counter() - began)


def needed_bytes(message: str) -> float | None:
    """What a program needs of a device, out of a compiler's refusal; None if it is another error.

    Args:
      message: text of the exception.
    """
    for pattern in (
        r"memory required for [\w ]+ \(([\d.]+)([KMGT])\) exceeds",
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
    ):
        found = re.search(pattern, message)
        if found:
            return float(found[1]) * _UNITS[found[2]]
    return None


def allocated_bytes(assignment: str, held: int = 0) -> int:
    """Bytes of the device's memory that a buffer assignment takes.

    Args:
      assignment: as XLA dumps it: a line per allocation. A colour is another memory (VMEM, …);
        what is thread-local (a reduction's operands) is a compiler's fiction.
      held: at least that much is counted for the program's parameters.
    """
    parameters = others = 0
    for size, rest in _ALLOCATION.findall(assignment):
        if " color " in rest or "thread-local" in rest:
            continue
        if " parameter " in rest:
            parameters += int(size)
        else:
            others += int(size)
    return max(parameters, held) + others


def _lower_stopped(program: Program) -> jax.stages.Lowered:
    """The training step with a call in it at which its compiler stops."""

    def stopped(*arguments):
        # An output, since the partitioner refuses calls with side effects and no operand.
        return jax.ffi.ffi_call(_STOP, jax.ShapeDtypeStruct((), bool))(), program.step(*arguments)

    with program.use():
        return jax.jit(stopped, donate_argnums=0).lower(*program.arguments)


def _executable(lowered: jax.stages.Lowered, options: dict[str, Any]) -> jax.stages.Compiled:
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "output tile sizes" not in str(error):
            raise
        # Without a GPU to time tiles on, XLA guesses those of Triton's products, and for CLIP
        # L/14's [19712, 768] x [768, 768] finds none. cuBLAS is as good in a plan.
        return lowered.compile(compiler_options={**options, "xla_gpu_enable_triton_gemm": False})


def _dumped(folder: pathlib.Path, what: str) -> str:
    """The last dump of a kind; a retried compilation leaves several."""
    files = sorted(folder.glob(f"*{what}.txt"), key=lambda path: path.stat().st_mtime)
    return files[-1].read_text() if files else ""
