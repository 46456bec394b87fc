"""Bounds read from machine code: which loop is the hot one, and which of its units needs most cycles."""

import pytest

from attn_core.kernels.machine_code import hot_loop, load_bits, resident_blocks


def code(*instructions: str) -> str:
    """As ``cuobjdump -sass`` prints it: an address of 16 bytes each, the encoding behind."""
    return "\n".join(f"        /*{16 * i:04x}*/    {text} ;    /* 0x0 */" for i, text in enumerate(instructions))


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"  # of a warp group: 2·64·64·16 FLOPs
OTHER = "FFMA R1, R2, R3, R4"


def test_the_loop_without_masks_counts_and_what_surrounds_it_does_not() -> None:
    masked = [PRODUCT, *[OTHER] * 9, "@P0 BRA 0x0"]
    plain = [PRODUCT, *[OTHER] * 4, "@P0 BRA 0xb0"]
    loop = hot_loop(code(*masked, *plain, "@P1 BRA 0x0", "EXIT"), 8, "sm_90")
    assert loop is not None
    assert loop.flops == 2 * 64 * 64 * 16 * 2
    assert loop.tensor == loop.flops / 4096
    assert loop.issue == 6 * 8 / 4


@pytest.mark.parametrize(
    ("extra", "limiter"), [([], "tensor"), (["MUFU.EX2 R1, R2"] * 8, "special"), ([OTHER] * 80, "issue")]
)
def test_the_unit_that_needs_most_cycles_limits(extra: list[str], limiter: str) -> None:
    loop = hot_loop(code(PRODUCT, *extra, "@P0 BRA 0x0"), 4, "sm_90")
    assert loop is not None
    assert loop.limiter == limiter
    cycles = max(loop.tensor, loop.issue, loop.special)
    assert loop.teraflops == pytest.approx(loop.flops / cycles * 132 * 1.755e9 / 1e12)


def test_ampere_multiplies_by_warps() -> None:
    loop = hot_loop(code("HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 BRA 0x0"), 4, "sm_80")
    assert loop is not None
    assert loop.flops == 2 * 16 * 8 * 16 * 4


def test_no_products_and_other_architectures_have_no_bound() -> None:
    assert hot_loop(code(OTHER, "@P0 BRA 0x0"), 4, "sm_90") is None
    assert hot_loop(code(PRODUCT, "@P0 BRA 0x0"), 4, "sm_100") is None
    assert hot_loop(code(PRODUCT, "EXIT"), 4, "sm_90") is None


def test_the_width_of_most_loads_is_read_from_their_names() -> None:
    wide, narrow = "LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64]", "LDG.E.U16.CONSTANT R1, desc[UR4][R2.64]"
    assert load_bits(code(wide, wide, narrow)) == 128
    assert load_bits(code(narrow, "LDG.E.64 R2, desc[UR4][R4.64]", narrow)) == 16
    assert load_bits(code("LDG.E R2, desc[UR4][R4.64]")) == 32
    assert load_bits(code(PRODUCT)) == 0


def test_blocks_are_bounded_by_registers_memory_or_warps() -> None:
    assert resident_blocks(180, 50_000, 8, "sm_90") == 1  # 8 · 32 · 184 of 65,536 registers
    assert resident_blocks(96, 100 * 1024, 4, "sm_90") == 2
    assert resident_blocks(32, 0, 4, "sm_90") == 16
    assert resident_blocks(32, 0, 4, "sm_100") == 0
