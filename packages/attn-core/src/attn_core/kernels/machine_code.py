"""What a compiled kernel's hot loop can reach at best: read from NVIDIA machine code, without a GPU.

The hot loop is the innermost loop with the most tensor-core work, the shorter one of equals (the loop without masks).
Its cycles, for a thread block that has a multiprocessor to itself, are at least those of the tensor cores, of issuing
its instructions (four schedulers, one warp instruction each per cycle) and of the special functions (exp2, 16 lanes per
cycle); the largest of the three is the bound, and says what limits the kernel. Real kernels reach 65 to 85 % of it.
"""

import re
from dataclasses import dataclass

# FLOPs per cycle of a multiprocessor's tensor cores with 16-bit operands, multiprocessors, GHz: A100 and H100 SXM.
MACHINES = {"sm_80": (2048, 108, 1.41), "sm_90": (4096, 132, 1.755)}

WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}  # in the names of loads; without one, 32 bits
MEMORY = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}  # bytes of shared memory of a multiprocessor; 1 KiB a block is kept


@dataclass(frozen=True)
class Loop:
    """The hot loop of one kernel: FLOPs of a thread block in one round, and the cycles that each unit needs for it."""

    flops: int
    tensor: float
    issue: float
    special: float
    teraflops: float

    @property
    def limiter(self) -> str:
        """The unit that needs most cycles."""
        return max(("tensor", "issue", "special"), key=lambda name: getattr(self, name))


def hot_loop(code: str, warps: int, architecture: str) -> Loop | None:
    """Bounds of the hot loop in ``code``, the text of ``cuobjdump -sass``; None without a loop of tensor-core products.

    Args:
        warps: of a thread block.
        architecture: ``"sm_80"`` or ``"sm_90"``; others have none.
    """
    if architecture not in MACHINES:
        return None
    per_cycle, multiprocessors, ghz = MACHINES[architecture]
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", code)]
    loops = []
    for at, text in lines:
        jump = re.search(r"\bBRA(?:\.\w+)* .*?(?:0x|`\(\.L_x_)([0-9a-f]+)", text)
        if jump and "0x" in text and int(jump[1], 16) < at:
            loops.append((int(jump[1], 16), at))
    inner = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    bodies = [[text for at, text in lines if first <= at <= last] for first, last in inner]
    if not (found := [(flops, body) for body in bodies if (flops := sum(_flops(text, warps) for text in body))]):
        return None
    flops, body = max(found, key=lambda pair: (pair[0], -len(pair[1])))
    special = sum("MUFU" in text for text in body)
    cycles = flops / per_cycle, len(body) * warps / 4, special * warps * 32 / 16
    return Loop(flops, *cycles, flops * multiprocessors * ghz / max(cycles) / 1e3)


def load_bits(code: str) -> int:
    """Bits that a thread brings from global memory at a time, as most of its loads do; 0 without any."""
    parts = [set(found.split(".")) for found in re.findall(r"\b((?:LDG|LDGSTS)\.\S+)", code)]
    sizes = [next((bits for name, bits in WIDTHS.items() if name in part), 32) for part in parts]
    return max(set(sizes), key=lambda size: (sizes.count(size), size)) if sizes else 0


def resident_blocks(registers: int, shared: int, warps: int, architecture: str) -> int:
    """Blocks that a multiprocessor holds at a time, by registers, shared memory (bytes) and warps; 0: unknown."""
    if architecture not in MEMORY:
        return 0
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, MEMORY[architecture] // (shared + 1024), 64 // warps)


def _flops(instruction: str, warps: int) -> int:
    """Of all warps that issue this tensor-core product; 0 for another instruction."""
    if group := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", instruction):  # one of a warp group, four warps
        return 2 * int(group[1]) * int(group[2]) * int(group[3]) * warps // 4
    if one := re.search(r"\bHMMA\.(\d\d)(\d)(\d+)", instruction):  # 16816: 16×8×16
        return 2 * int(one[1]) * int(one[2]) * int(one[3]) * warps
    return 0
