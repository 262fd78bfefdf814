"""Find addresses that a kernel computes in 32 bits, in Triton's intermediate representation.

Beyond 2^31 elements such an offset wraps around, and the kernel reads and writes elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"%[\w.$-]+")
_DEFINED = re.compile(r"(%[\w.$-]+)(?::\d+)? = ")
_LOCATION = re.compile(r"\s*\bloc\((?:[^()]|\([^()]*\))*\)")
# What makes a number larger: differences, quotients and minima of numbers that fit fit too.
_NARROW = re.compile(r"arith\.(?:addi|muli|shli) .* : (?:tensor<(?:\d+x)+)?i(?:8|16|32)>?$")
_FIRST_OFFSET = {"tt.addptr": 1, "tt.load": 1, "tt.store": 2}
"""Which operand of an operation is the first to say where: offsets, then masks."""


@dataclass
class _Operation:
    text: str
    operands: list[int]
    """Indices of the operations that define them; of a loop also of what it carries on."""

    @property
    def name(self) -> str:
        return _DEFINED.sub("", self.text).split(" ")[0]


def narrow_addresses(ttir: str) -> list[str]:
    """Return the 32-bit sums, products and shifts that addresses and masks are made of."""
    operations = _parse(ttir)
    roots = [operation for operation in operations if operation.name in _FIRST_OFFSET]
    assert roots, "there is no load or store: the representation is not as expected"
    pending = [k for root in roots for k in root.operands[_FIRST_OFFSET[root.name] :]]
    seen: set[int] = set()
    while pending:
        k = pending.pop()
        if k not in seen and operations[k].name != "tt.load":  # a loaded number is not computed
            seen.add(k)
            pending += operations[k].operands
    narrow = [operations[k].text for k in sorted(seen) if _NARROW.search(operations[k].text)]
    return [f"computes an address in 32 bits: {text}" for text in narrow]


def _parse(ttir: str) -> list[_Operation]:
    """Link every operation to those that define its operands."""
    operations: list[_Operation] = []
    latest: dict[str, int] = {}  # regions use names again: the latest definition is meant
    owners: list[int] = []  # of the regions that a line is in
    for line in ttir.splitlines():
        text = _LOCATION.sub("", line).strip()
        names = _NAME.findall(_DEFINED.sub("", text))
        for name in names:
            if name not in latest:  # an argument of the kernel or of a region
                latest[name] = len(operations)
                operations.append(_Operation(name, []))
        used = [latest[name] for name in names]
        if text.startswith("scf.yield"):
            operations[owners[-1]].operands += used
        owner = owners.pop() if text.startswith("}") else len(operations)
        if text.endswith("{"):
            owners.append(owner)  # "} else {" begins another region of its scf.if
        latest |= dict.fromkeys(_DEFINED.findall(text), len(operations))
        operations.append(_Operation(text, used))
    return operations
