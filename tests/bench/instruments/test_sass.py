"""The control-flow analysis of machine code, on listings small enough to check by eye."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.instruments import sass


def _listing(*lines: str) -> str:
    body = "\n".join(
        f"        /*{16 * i:04x}*/   {line} ;   /* 0x0000000000000000 */"
        for i, line in enumerate(lines)
    )
    return f"\t\tFunction : kernel\n{body}\n"


def test_instructions_keep_opcode_guard_and_target() -> None:
    first, second, third = sass.parse(
        _listing("HMMA.16816.F32.BF16 R24, R72.reuse, R28, R24", "@!P0 BRA 0x10", "BRA.U UP0, 0x0")
    )
    assert (first.base, first.kind, first.is_mma) == ("HMMA", "mma", True)
    assert (second.guarded, second.target) == (True, 0x10)
    assert (third.guarded, third.target) == (True, 0)


def test_how_an_instruction_is_scheduled_belongs_to_no_operand() -> None:
    branch, load = sass.parse(
        _listing("@P0 BRA 0x10   &req={1,0}   ?trans5", "LDS R0, [R2]  &rd=0x2  &wr=0x1 ?trans1")
    )
    assert (branch.operands, branch.target) == ("0x10", 0x10)
    assert load.operands == "R0, [R2]"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("UTCHMMA gdesc[UR6], gdesc[UR10], tmem[UR8]", "mma"),
        ("LDSM.16.M88.4 R4, [R2]", "shared"),
        ("LDGSTS.E.BYPASS.128 [R3], [R4.64]", "global"),
        ("STL [R1], R2", "local"),
        ("LDTM.x64 R4, tmem[UR4]", "tensor_memory"),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "convert"),
        ("FFMA R1, R2, R3, R4", "float"),
        ("SHFL.IDX PT, R1, R2, R3, 0x101f", "shuffle"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "sync"),
        ("LOP3.LUT R1, R2, 0xf, RZ, 0xc0, !PT", "integer"),
        ("PRMT R1, R2, 0x7632, R3", "move"),
        ("EXIT", "branch"),
    ],
)
def test_classes(line: str, kind: str) -> None:
    assert sass.parse(_listing(line))[0].kind == kind


def test_a_loop_ends_at_its_back_edge() -> None:
    code = sass.parse(
        _listing("MOV R1, RZ", "HMMA.16816.F32 R0, R1, R2, R0", "IADD3 R1, R1, 0x1, RZ",
                 "@!P0 BRA 0x10", "STG.E [R2], R0", "EXIT")
    )  # fmt: skip
    (loop,) = sass.hot_loops(code)
    assert [i.base for i in loop.instructions] == ["HMMA", "IADD3", "BRA"]
    assert loop.mma == Counter(HMMA=1)
    assert loop.by_class == Counter(mma=1, integer=1, branch=1)


def test_a_waiting_loop_moved_out_of_line_belongs_to_the_loop_and_the_epilogue_does_not() -> None:
    code = sass.parse(
        _listing("SYNCS.PHASECHK P0, [UR4]",  # 0x00: head of the loop
                 "@!P0 BRA 0x60",             # 0x10: not yet: wait out of line
                 "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
                 "@P1 BRA 0x0",
                 "STG.E [R2], R0",            # 0x40: epilogue, amid the loop
                 "EXIT",
                 "SYNCS.PHASECHK P0, [UR4]",  # 0x60: waiting loop
                 "@!P0 BRA 0x60",
                 "BRA 0x20",
                 "BRA 0x90")
    )  # fmt: skip
    (hot,) = sass.hot_loops(code)
    assert sorted(hot.addresses) == [0x00, 0x10, 0x20, 0x30, 0x60, 0x70, 0x80]
    assert [sorted(loop.addresses) for loop in sass.loops(code)[1:]] == [[0x60, 0x70]]


def test_inner_loops_without_products_do_not_hide_the_hot_loop() -> None:
    code = sass.parse(
        _listing("HMMA.16816.F32 R0, R1, R2, R0",
                 "IADD3 R1, R1, 0x1, RZ",
                 "@P0 BRA 0x10",
                 "@P1 BRA 0x0",
                 "HMMA.16816.F32 R0, R1, R2, R0",
                 "HMMA.16816.F32 R4, R1, R2, R4",
                 "@P2 BRA 0x40",
                 "EXIT")
    )  # fmt: skip
    busiest, other = sass.hot_loops(code)
    assert (busiest.mma, other.mma) == (Counter(HMMA=2), Counter(HMMA=1))
    assert len(sass.loops(code)) == 3


def test_only_the_innermost_loop_with_products_is_hot() -> None:
    code = sass.parse(
        _listing("HMMA.16816.F32 R0, R1, R2, R0", "@P0 BRA 0x0", "STG.E [R2], R0",
                 "@P1 BRA 0x0", "EXIT", "MOV R0, R0", "EXIT")
    )  # fmt: skip
    (hot,) = sass.hot_loops(code)
    assert sum(hot.mma.values()) == 1


def test_bsync_goes_to_the_point_that_its_bssy_names() -> None:
    code = sass.parse(
        _listing("BSSY B0, 0x40", "@P0 BRA 0x30", "BSYNC B0", "BSYNC B0",
                 "HMMA.16816.F32 R0, R1, R2, R0", "@P1 BRA 0x0", "EXIT")
    )  # fmt: skip
    (hot,) = sass.hot_loops(code)
    assert len(hot.instructions) == 6


@pytest.mark.parametrize("text", ["", _listing("EXIT") * 2])
def test_a_listing_must_be_of_one_function(text: str) -> None:
    with pytest.raises(ValueError, match="text must list one function"):
        sass.parse(text)
