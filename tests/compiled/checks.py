"""What the engine finds, and which findings are faults."""

from dataclasses import dataclass

KINDS = [
    "outside of every tensor that was passed",
    "address not aligned to the access",
    "outside of shared memory",
    "shared address not aligned to the access",
    "outside of the parameters",
    "undefined value stored",
    "undefined address",
    "undefined branch or guard",
    "undefined bytes read",
    "undefined value in an atomic",
    "race in shared memory",
    "race in global memory between warps of a block",
    "race in global memory between blocks",
    "lanes of a warp exchange values without a warp barrier",
    "lanes of one store bring different values to one address",
    "same value written to shared memory by several warps",
    "same value written to global memory by several warps or blocks",
    "not all lanes take part",
    "warps wait at different barriers, or have ended",
    "tensor cores read shared memory without a proxy fence",
    "descriptor of a matrix in shared memory",
    "integer division by zero",
    "trap, or too many instructions",
    "read through the cache for read-only data of what this launch writes",
    "outside of the tensor memory that was allocated, or not freed",
    "tensor memory used before its product or store was waited for",
    "race in tensor memory",
]
"""In the order of machine.h."""

HARMLESS = {
    "same value written to shared memory by several warps",
    "same value written to global memory by several warps or blocks",
    # What is loaded and then masked away is no fault; an undefined address, guard, atomic or store is.
    "undefined bytes read",
}


@dataclass
class Finding:
    kernel: str
    kind: str
    source: str
    """The kernel's line, and where it was inlined."""
    ptx_line: int
    ptx: str
    block: int
    warp: int
    lane: int
    """The first that was seen."""
    address: int
    other: int
    """The other warp, lane or block, or the width that was expected: see README.md."""
    count: int
    """How often this instruction did it."""
    where: str = ""
    """The place in a tensor, if one is near."""

    def __str__(self):
        return (
            f"{self.kernel}, {self.source}: {self.kind} ({self.count} times; first: block {self.block}, "
            f"warp {self.warp}, lane {self.lane}, address {self.address:#x}"
            f"{', ' + self.where if self.where else ''}, other {self.other}); "
            f"PTX line {self.ptx_line}: {self.ptx[:100]}"
        )


def faults(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.kind not in HARMLESS]
