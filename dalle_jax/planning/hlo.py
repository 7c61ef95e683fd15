"""Reads compiled programs: their collectives, their loops, their estimated cycles.

It reads `compiled.as_text()` from CPU, GPU and TPU. `plan` uses it for its tables, and tests of the
communication budget assert on it:

    {c.kind for c in hlo.collectives(compiled.as_text(), mesh.shape) if c.axis == "fsdp"}

All figures are per device and per call of the program: a collective inside a loop counts once per
iteration. All branches of a conditional count.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

GIB = 2**30
KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip

# Instructions with a cost in the TPU compiler's text; the cost of a fusion includes its body.
_COSTED = {"fusion", "custom-call", "convolution", "copy"}
# Without an estimate, the compiler writes a number near the largest int64 (v5p; libtpu 0.0.52).
_UNKNOWN = 2**62

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
# Attributes of a Pallas kernel hold JSON over several lines.
_BROKEN = re.compile(r'\n(?="|\}[},])')
_BUFFER = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation"
    r"|false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One buffer that one collective instruction moves.

    Attributes:
      kind: one of `KINDS`.
      dtype: in HLO's notation: "bf16", "f32", …
      shape: shape of the full buffer: the result of an all-gather, the operand of a reduce-scatter.
      axis: the mesh axes along which it moves, "fsdp" or "data+fsdp"; "" without a mesh.
      group: number of devices in a group.
      count: number of executions per call of the program.
      gib: GiB of the full buffer times count. An all-gather or a reduce-scatter sends
        (group - 1) / group of it over the network, an all-reduce twice that.
      is_async: whether the program computes at the same time.
      source: the name of the operation that it comes from, for a reader of the report.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    axis: str
    group: int
    count: int
    gib: float
    is_async: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A row of a table: all collectives with the same kind, axis and dtype.

    Attributes:
      kind: see `Collective`.
      axis: see `Collective`.
      dtype: see `Collective`.
      count: buffers moved per call.
      gib: GiB per device and call, full buffers.
      async_gib: the part of `gib` that moves while the program computes.
    """

    kind: str
    axis: str
    dtype: str
    count: int
    gib: float
    async_gib: float


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


def collectives(text: str, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
      text: `compiled.as_text()`, from any backend.
      mesh: axis name -> size in the mesh's order (`Mesh.shape`); None leaves `axis` empty.

    Returns:
      One entry per buffer of each instruction, in the order of the text.
    """
    module = _Module(text)
    result = []
    for computation, line in module.executed():
        kind = line.opcode.removesuffix("-start")
        if kind not in KINDS or module.is_continued(computation, line):
            continue
        groups = _groups(line.rest, module.num_devices)
        size, count = groups.shape[1], module.count[computation]
        for dtype, shape in _full_buffers(kind, line, size):
            # The TPU compiler's fusion of an all-reduce with the slice that follows it.
            is_scatter = kind == "all-reduce" and "all-reduce-scatter" in computation
            result.append(
                Collective(
                    kind="reduce-scatter" if is_scatter else kind,
                    dtype=dtype,
                    shape=shape,
                    axis=_axes(groups, mesh) if mesh else "",
                    group=size,
                    count=count,
                    gib=math.prod(shape) * _bits(dtype) / 8 * count / GIB,
                    is_async=line.opcode != kind or computation in module.background,
                    source=_source(line),
                )
            )
    return result


def traffic(collectives: Iterable[Collective]) -> list[Traffic]:
    """Sums by kind, axis and dtype, the largest first."""
    rows: dict[tuple[str, str, str], list[Collective]] = {}
    for c in collectives:
        rows.setdefault((c.kind, c.axis, c.dtype), []).append(c)
    sums = [
        Traffic(
            *key,
            count=sum(c.count for c in row),
            gib=sum(c.gib for c in row),
            async_gib=sum(c.gib for c in row if c.is_async),
        )
        for key, row in rows.items()
    ]
    return sorted(sums, key=lambda row: -row.gib)


def estimated_cycles(text: str) -> int | None:
    """The compiler's own estimate for one call, without waiting for collectives.

    Args:
      text: `compiled.as_text()` of a TPU program.

    Returns:
      Cycles of one core: the sum over all fusions, times the iterations of the loops around them.
      None if the text has no estimates (CPU, GPU). Pallas kernels, and instructions that the
      compiler cannot estimate, count 0.
    """
    module = _Module(text)
    cycles = [
        int(match[1]) * module.count[computation]
        for computation, line in module.executed()
        if line.opcode in _COSTED and computation not in module.fused
        for match in [re.search(r'"estimated_cycles":"(\d+)"', line.rest)]
        if match and int(match[1]) < _UNKNOWN
    ]
    return sum(cycles) if cycles else None


def without_estimate(text: str) -> int:
    """Number of instructions for which a TPU's compiler has no estimate."""
    return sum(int(n) >= _UNKNOWN for n in re.findall(r'"estimated_cycles":"(\d+)"', text))


class _Module:
    """The computations of a program and their numbers of executions.

    Attributes:
      count: computation -> executions per call; absent = never.
      fused: computations that are bodies of fusions.
      background: computations that run beside others.
      num_devices: partitions of the program.
    """

    def __init__(self, text: str):
        self._lines: dict[str, list[_Line]] = {}
        self.count: collections.Counter[str] = collections.Counter()
        self.fused: set[str] = set()
        self.background: set[str] = set()
        partitions = re.search(r"num_partitions=(\d+)", text[:10_000])
        self.num_devices = int(partitions[1]) if partitions else 1
        entry, current = "", None
        for line in _BROKEN.sub("", text).splitlines():
            header = _COMPUTATION.match(line)
            if header:
                current = self._lines.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif line.startswith("}"):
                current = None
            elif current is not None:
                parsed = _parse(line)
                if parsed:
                    current.append(parsed)
        self._walk(entry, 1)

    def executed(self) -> Iterator[tuple[str, _Line]]:
        """(computation, line) for every instruction that runs."""
        for computation, lines in self._lines.items():
            if self.count[computation]:
                yield from ((computation, line) for line in lines)

    def is_continued(self, computation: str, line: _Line) -> bool:
        """Whether the line only continues a collective that an earlier line has started.

        A TPU runs one gather beside several fusions: each of them names it (with the id of its
        chain), and the first one starts it. Channel ids do not distinguish them: with shard_map all
        are equal.
        """
        if "chain_id=" not in line.rest:
            return False
        if not any('"AsyncCollectiveStart"' in other.rest for other in self._lines[computation]):
            return True
        self.background.add(computation)
        return False

    def _walk(self, computation: str, times: int) -> None:
        self.count[computation] += times
        for line in self._lines.get(computation, ()):
            if line.opcode == "while":
                body = re.search(r"\bbody=%?([\w.\-]+)", line.rest)[1]
                self._walk(body, times * self._iterations(line))
            elif line.opcode not in ("async-update", "async-done"):  # -start has counted it
                for called in _called(line):
                    if line.opcode == "fusion":
                        self.fused.add(called)
                    if line.opcode == "async-start":
                        self.background.add(called)
                    self._walk(called, times)

    def _iterations(self, loop: _Line) -> int:
        """The number of iterations: the compiler's count, or the bound in the loop's condition."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known[1])
        # TPU text has no count. Scans count from 0 to a constant, by 1.
        condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)[1]
        return max(self._constants(condition), default=1)

    def _constants(self, computation: str) -> Iterator[int]:
        for line in self._lines.get(computation, ()):
            value = re.match(r"\((\d+)\)", line.rest) if line.opcode == "constant" else None
            if value and re.match(r"[su]\d+\[\]", line.type):
                yield int(value[1])
            for called in _called(line):
                yield from self._constants(called)


def _parse(text: str) -> _Line | None:
    """`  %name = type opcode(operands), attributes`."""
    start = _INSTRUCTION.match(text)
    if not start:
        return None
    at = start.end()
    if text[at] == "(":  # a tuple; layouts and comments inside hold balanced brackets too
        depth = 0
        for end in range(at, len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if not depth:
                break
        end += 1
    else:
        end = text.find(" ", at)
    opcode, bracket, rest = text[end + 1 :].partition("(")
    return _Line(start[1], text[at:end], opcode, bracket + rest)


def _called(line: _Line) -> list[str]:
    names = (several or one for several, one in _CALLED.findall(line.rest))
    return [name.strip().lstrip("%") for part in names for name in part.split(",")]


def _full_buffers(kind: str, line: _Line, group: int) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of the full buffers of a collective."""
    buffers = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _BUFFER.findall(re.sub(r"\{[^}]*\}", "", line.type))
    ]
    if line.opcode.endswith("-start"):
        # (operands, results), for a permute also two words of state; for all-reduce the results.
        if kind == "collective-permute":
            buffers = buffers[1:2]
        elif kind != "all-reduce":
            buffers = buffers[len(buffers) // 2 :]
    if kind == "reduce-scatter":
        dimension = int(re.search(r"\bdimensions=\{(\d+)", line.rest)[1])
        return [
            (dtype, shape[:dimension] + (shape[dimension] * group,) + shape[dimension + 1 :])
            for dtype, shape in buffers
        ]
    return buffers


def _groups(attributes: str, num_devices: int) -> np.ndarray:
    """[groups, size]: the devices (positions in the flat mesh) of each group.

    Three notations: `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`, an iota; and
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`, the groups along an axis of a mesh. There
    `'b':(2)2` is a factor 2 of axis b, after a first factor 2.
    """
    named = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", attributes
    )
    if named:
        return _named_groups(*named.groups())
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    if pairs:
        return np.array(_lists(pairs[1]))
    explicit = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes)
    if explicit:
        return np.array(_lists(explicit[1]))
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\S+)", attributes)
    if iota:
        return _iota(iota[1])
    return np.arange(num_devices)[None]  # `{}`: all devices


def _named_groups(sizes: str, device_ids: str | None, axes: str) -> np.ndarray:
    mesh = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    count = math.prod(mesh.values())
    if not device_ids:
        ids = np.arange(count)
    elif device_ids.startswith("["):
        ids = _iota(device_ids)
    else:
        ids = np.array([int(n) for n in device_ids.split(",")])
    inside = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    # An axis that is used in part has three factors: before, the part, after.
    shape, moved = [], []
    for name, size in mesh.items():
        parts = [(int(pre), int(n)) for axis, pre, n in inside if axis == name and n]
        if not parts:
            moved += [len(shape)] if any(axis == name for axis, _, _ in inside) else []
            shape.append(size)
            continue
        pre, n = parts[0]
        moved.append(len(shape) + 1)
        shape += [pre, n, size // pre // n]
    others = [i for i in range(len(shape)) if i not in moved]
    group = math.prod(shape[i] for i in moved)
    return ids.reshape(shape).transpose(*others, *moved).reshape(-1, group)


def _iota(text: str) -> np.ndarray:
    """`[2,4]`, `[2,4]T(1,0)` or `[2,4]<=[4,2]T(1,0)` as an array of the first shape."""
    shape, source, order = (
        [int(n) for n in part.split(",")] if part else None for part in _IOTA.match(text).groups()
    )
    ids = np.arange(math.prod(shape)).reshape(source or shape)
    if order:
        ids = ids.transpose(order)
    return ids.reshape(shape) if source else ids


def _lists(text: str) -> list[list[int]]:
    return [[int(n) for n in part.split(",")] for part in re.findall(r"\{([\d, ]+)\}", text)]


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> str:
    """The axes along which the devices of a group differ."""
    places = np.unravel_index(groups, tuple(mesh.values()))
    return "+".join(name for name, at in zip(mesh, places, strict=True) if (at != at[:, :1]).any())


def _bits(dtype: str) -> int:
    """32 for f32, 8 for f8e4m3fn and pred; 0 for a token."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8 * (dtype == "pred")


def _source(line: _Line) -> str:
    name = re.search(r'op_name="([^"]*)"', line.rest)
    return name[1] if name else line.name
