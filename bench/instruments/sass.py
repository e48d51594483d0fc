"""NVIDIA machine code as text: instructions, control flow and natural loops.

Reads the output of ``cuobjdump -sass`` for one kernel. Loops are natural loops of the control-flow
graph (a back edge to a block that dominates it), not address ranges: ptxas moves waiting loops out
of line, so that code between a branch and its target need not belong to the loop.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+"
    r"(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;&?]*?)\s*"
    r"(?:[&?][^;]*)?;"  # of sm_120 CUDA 12.8 prints how an instruction is scheduled, too
)
_FUNCTION = re.compile(r"Function : (\S+)")
_TARGET = re.compile(r"0x[0-9a-f]+$")
_ENDS_PROGRAM = ("EXIT", "RET", "KILL", "BPT", "BRX", "JMX")

CLASSES: dict[str, str] = {
    "mma": r"\w*MMA",
    "shared": r"LDS\w*|STS\w*|ATOMS",
    "global": r"LDG\w*|STG|LD|ST|UTMA\w+|UBLKCP|ATOMG?|RED|REDG|REDAS",
    "local": r"LDL|STL",
    "tensor_memory": r"LDTM?|STTM?|UTC\w+",
    "convert": r"[FIU]2[FIU]\w*|FRND",
    "float": r"F(MUL|FMA|ADD|SETP|SEL|MNMX|CHK)\w*|H(MUL2|FMA2|ADD2|SETP2|MNMX2)\w*|MUFU",
    "shuffle": r"SHFL",
    "sync": (
        r"BAR|U?SYNCS|(LDG)?DEPBAR|WARP\w+|MEMBAR|FENCE|ERRBAR|CCTL\w*|ARRIVES|ELECT|NANOSLEEP|YIELD"
        r"|BSSY\w*|BSYNC|BREAK"
    ),
    "branch": r"BRA|BRX|JMP|JMX|CALL|RET|EXIT|BMOV",
    "move": r"U?MOV\w*|U?PRMT|U?SEL|S2U?R|CS2U?R|R2UR|LDCU?|ULDC|U?P2R|U?R2P|NOP|MOVM",
}
"""Instruction classes by opcode; whatever matches none is integer arithmetic."""

_CLASS_PATTERNS = {name: re.compile(pattern) for name, pattern in CLASSES.items()}


@functools.cache
def _class_of(base: str) -> str:
    for name, pattern in _CLASS_PATTERNS.items():
        if pattern.fullmatch(base):
            return name
    return "integer"


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; ``target`` is the address that a branch names, if it does."""

    address: int
    opcode: str
    operands: str
    guarded: bool
    target: int | None

    @property
    def base(self) -> str:
        """The opcode without its modifiers: HMMA of HMMA.16816.F32.BF16."""
        return self.opcode.split(".", 1)[0]

    @property
    def kind(self) -> str:
        """The name of its class in ``CLASSES``, or "integer"."""
        return _class_of(self.base)

    @property
    def is_mma(self) -> bool:
        """A product on the tensor cores: HMMA, HGMMA, UTCHMMA and their relatives."""
        return self.base.endswith("MMA")


@dataclass(frozen=True)
class Loop:
    """The instructions of one natural loop, inner loops included."""

    instructions: tuple[Instruction, ...]

    @property
    def addresses(self) -> frozenset[int]:
        return frozenset(i.address for i in self.instructions)

    @property
    def mma(self) -> Counter[str]:
        """How often each kind of matrix product occurs in the loop."""
        return Counter(i.base for i in self.instructions if i.is_mma)

    @property
    def by_class(self) -> Counter[str]:
        return Counter(i.kind for i in self.instructions)

    @property
    def by_opcode(self) -> Counter[str]:
        return Counter(i.base for i in self.instructions)


def parse(text: str) -> list[Instruction]:
    """The instructions of a listing of one function. ValueError: none, or several functions."""
    functions = _FUNCTION.findall(text)
    if len(functions) != 1:
        raise ValueError(f"text must list one function, got {functions}")
    return [_instruction(match) for match in _INSTRUCTION.finditer(text)]


def loops(instructions: list[Instruction]) -> list[Loop]:
    """All natural loops, larger ones first. Loops that share their first block are one loop."""
    blocks = _blocks(instructions)
    successors = _successors(blocks)
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}
    predecessors = _inverted(successors)
    for tail, heads in successors.items():
        for head in heads:
            if head in dominators.get(tail, ()):
                bodies.setdefault(head, {head}).update(_body(head, tail, predecessors))
    found = [
        Loop(tuple(i for start in sorted(body) for i in blocks[start])) for body in bodies.values()
    ]
    return sorted(found, key=lambda loop: -len(loop.instructions))


def hot_loops(instructions: list[Instruction]) -> list[Loop]:
    """The innermost loops that hold matrix products, most products first."""
    with_mma = [loop for loop in loops(instructions) if loop.mma]
    innermost = [
        loop for loop in with_mma if not any(other.addresses < loop.addresses for other in with_mma)
    ]
    return sorted(innermost, key=lambda loop: -sum(loop.mma.values()))


def _instruction(match: re.Match[str]) -> Instruction:
    operands, opcode = match["operands"], match["opcode"]
    target = _TARGET.search(operands) if opcode.startswith(("BRA", "BSSY", "CALL", "JMP")) else None
    conditional = bool(match["guard"]) or (opcode.startswith("BRA") and "," in operands)
    return Instruction(
        int(match["address"], 16),
        opcode,
        operands,
        conditional or opcode.startswith(("BRA.DIV", "BRA.CONV")),
        int(target[0], 16) if target else None,
    )


def _blocks(instructions: list[Instruction]) -> dict[int, list[Instruction]]:
    """Basic blocks by the address of their first instruction."""
    starts = {i.target for i in instructions if i.target is not None}
    blocks: dict[int, list[Instruction]] = {}
    current: list[Instruction] | None = None
    for instruction in instructions:
        if current is None or instruction.address in starts:
            current = blocks.setdefault(instruction.address, [])
        current.append(instruction)
        if _leaves(instruction):
            current = None
    return blocks


def _leaves(instruction: Instruction) -> bool:
    return instruction.base in ("BRA", "JMP", "BSYNC", *_ENDS_PROGRAM)


def _successors(blocks: dict[int, list[Instruction]]) -> dict[int, list[int]]:
    starts = list(blocks)
    reconvergence = _reconvergence_points(i for block in blocks.values() for i in block)
    result: dict[int, list[int]] = {}
    for position, start in enumerate(starts):
        last = blocks[start][-1]
        following = starts[position + 1 : position + 2]
        if last.base in ("BRA", "JMP"):
            targets = [last.target] if last.target is not None else []
            result[start] = targets + (following if last.guarded else [])
        elif last.base == "BSYNC":
            result[start] = [reconvergence.get(last.address, *following)]
        elif last.base in _ENDS_PROGRAM:
            result[start] = following if last.guarded else []
        else:
            result[start] = following
    return result


def _reconvergence_points(instructions: Iterable[Instruction]) -> dict[int, int]:
    """Where each BSYNC continues: at the target of the last BSSY before it on the same register."""
    points: dict[int, int] = {}
    latest: dict[str, int] = {}
    for instruction in instructions:
        register = instruction.operands.split(",")[0].split()[0] if instruction.operands else ""
        if instruction.base == "BSSY" and instruction.target is not None:
            latest[register] = instruction.target
        elif instruction.base == "BSYNC" and register in latest:
            points[instruction.address] = latest[register]
    return points


def _inverted(successors: dict[int, list[int]]) -> dict[int, list[int]]:
    result: dict[int, list[int]] = {start: [] for start in successors}
    for start, targets in successors.items():
        for target in targets:
            result[target].append(start)
    return result


def _dominators(successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """For every reachable block the blocks that all paths from the entry pass."""
    entry = next(iter(successors))
    order = list(_reachable(entry, successors))
    predecessors = _inverted(successors)
    dominators = {block: set(order) for block in order}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            before = [dominators[p] for p in predecessors[block] if p in dominators]
            new = {block} | set.intersection(*before)
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def _reachable(entry: int, successors: dict[int, list[int]]) -> Iterator[int]:
    seen, stack = {entry}, [entry]
    while stack:
        block = stack.pop()
        yield block
        for target in successors[block]:
            if target not in seen:
                seen.add(target)
                stack.append(target)


def _body(head: int, tail: int, predecessors: dict[int, list[int]]) -> set[int]:
    body, stack = {head, tail}, [tail] if tail != head else []
    while stack:
        for block in predecessors[stack.pop()]:
            if block not in body:
                body.add(block)
                stack.append(block)
    return body
