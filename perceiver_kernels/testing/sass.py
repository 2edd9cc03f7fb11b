"""What machine code tells: widths of memory accesses, and on Hopper registers of matrix products that are still running.

wgmma runs asynchronously: until a wait retires it, it reads the four registers of an operand A that lies in registers and
reads and writes its accumulator (PTX ISA, "Asynchronous warpgroup-level matrix instructions"). Triton 3.6 and the ptxas it
ships let other instructions touch those registers earlier (triton-lang/triton#9514, #11781), and results then depend on
timing. Whether they did is decidable in the SASS.
"""

from __future__ import annotations

import re
from collections import Counter

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_REGISTER = re.compile(r"(?<!\w)R(\d+)\b")
_PREDICATE = re.compile(r"!?U?P(\d|T)\b")
# They write memory, barriers or predicates, no registers.
_NO_DESTINATION = re.compile(r"ST|RED|LDGSTS|UTMA|SYNCS|BAR|BRA|EXIT|[A-Z]+SETP|PLOP3|R2P")

Registers = frozenset[int]
# (A operands, accumulators) of one committed group of products.
_Group = tuple[Registers, Registers]
_NOTHING: _Group = (frozenset(), frozenset())


def _span(first: int, count: int) -> Registers:
    return frozenset(range(first, first + count))


def _written(name: str, operands: list[str]) -> Registers:
    """Registers that an instruction other than wgmma writes: the first operand but for predicates, as wide as modifiers say."""
    destination = next((operand for operand in operands if not _PREDICATE.match(operand)), "")
    match = _REGISTER.match(destination)
    if match is None or _NO_DESTINATION.match(name):
        return frozenset()
    count = 1
    if name.startswith("LDSM"):
        count = int(name.rsplit(".", 1)[1]) if name.endswith((".2", ".4")) else 1
    elif ".128" in name:
        count = 4
    elif ".64" in name or ".WIDE" in name:
        count = 2
    return _span(int(match[1]), count)


def _product(name: str, operands: list[str]) -> _Group:
    accumulator, a = (_REGISTER.match(operand) for operand in operands[:2])
    columns = re.search(r"64x(\d+)x", name)
    assert accumulator and columns, name
    return (
        _span(int(a[1]), 4) if a else frozenset(),
        _span(int(accumulator[1]), int(columns[1]) // (2 if ".F32" in name else 4)),
    )


def early_accesses(sass: str) -> list[str]:
    """Instructions that touch registers of a wgmma before a wait has retired it, along every path; empty if there are none.

    ``sass`` is the text that ``nvdisasm -c`` prints of one kernel.
    """
    code: list[tuple[str | None, str, list[str]]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif match := _INSTRUCTION.search(line):
            code.append((match[1], match[2], [operand.strip() for operand in match[3].split(",")]))

    found: dict[int, str] = {}
    seen = set()
    # Where a path goes on: the next instruction, the committed groups in flight, oldest first, and the one not yet committed.
    paths: list[tuple[int, tuple[_Group, ...], _Group]] = [(0, (), _NOTHING)]
    while paths:
        at, flying, group = paths.pop()
        while at < len(code) and (at, flying, group) not in seen:
            seen.add((at, flying, group))
            predicate, name, operands = code[at]
            if name.startswith("HGMMA"):
                a, accumulator = _product(name, operands)
                group = (group[0] | a, group[1] | accumulator)
                if "gsb0" in operands:
                    # Sixteen groups are more than any kernel keeps in flight; the bound ends the search.
                    flying, group = (*flying, group)[-16:], _NOTHING
            elif name.startswith("WARPGROUP.DEPBAR"):
                allowed = int(operands[-1], 16)
                flying = flying[max(len(flying) - allowed, 0) :]
            elif name.startswith("BRA"):
                target = re.search(r"\.L_x_\d+", operands[-1])
                assert target, operands
                paths.append((labels[target[0]], flying, group))
            else:
                read_only = frozenset().union(group[0], *(g[0] for g in flying))
                exclusive = frozenset().union(group[1], *(g[1] for g in flying))
                touched = frozenset(int(number) for number in _REGISTER.findall(", ".join(operands)))
                if _written(name, operands) & (read_only | exclusive) or touched & exclusive:
                    found[at] = f"{name} {', '.join(operands)}"
            if name.startswith(("BRA", "EXIT")) and predicate is None:
                break
            at += 1
    return [found[at] for at in sorted(found)]


def global_access_bits(sass: str) -> dict[int, int]:
    """Loads from and stores to global memory, counted by their width in bits; ``sass`` as in early_accesses."""
    widths: Counter[int] = Counter()
    for line in sass.splitlines():
        match = _INSTRUCTION.search(line)
        if match and match[2].startswith(("LDG", "STG")) and not match[2].startswith("LDGSTS"):
            width = re.search(r"\.(?:U|S)?(8|16|64|128)\b", match[2])
            widths[int(width[1]) if width else 32] += 1
    return dict(widths)
