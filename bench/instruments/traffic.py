"""FLOPs and bytes of every launch of a LoRA step, from the arguments of the launch.

A launch is one or more *passes*: the shrink tiles and the GEMM tiles of ticketed_gemm, the chunks
of the rank in strips. Of each pass the model says, argument by argument (those of all members of a
launch under one name),

    distinct bytes   each byte that the pass touches counted once: its traffic to memory, if the
                     cache keeps what the tiles of one pass share and nothing from pass to pass
    issued bytes     every tl.load and tl.store of every program: the traffic to the caches

``traffic(launch)`` is tested byte by byte against the loads and stores that the kernels really make
in Triton's interpreter. Launches with anything the model does not know are refused, so that a new
argument of a kernel cannot be overlooked. Synchronisation words, a few hundred bytes, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from . import gated_traffic
from .passes import Pass, Values, cdiv, names


class LaunchLike(Protocol):
    """What the model reads of a launch: stub_driver.Launch, or one in the interpreter.

    ``arguments`` hold an object with shape and dtype for each pointer; an argument that is None or
    a constant may stand in ``constexprs``.
    """

    @property
    def name(self) -> str: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...
    @property
    def constexprs(self) -> Mapping[str, Any]: ...


def traffic(launch: LaunchLike) -> list[Pass]:
    """The passes of one launch. NotImplementedError: a kernel or an argument is not modelled."""
    if launch.name not in _KERNELS:
        raise NotImplementedError(f"launch must be one of {sorted(_KERNELS)}, got {launch.name}")
    known, count = _KERNELS[launch.name]
    values = {**launch.arguments, **launch.constexprs}
    given = [item for value in values.items() for item in spread(*value)]
    unknown = [name for name, value in given if name not in known and _is_set(value)]
    if unknown:
        raise NotImplementedError(
            f"bench/instruments/traffic.py must model the arguments {unknown} of {launch.name}"
        )
    return count(Values({**values, **dict(given)}), launch.grid)


def compulsory_bytes(passes: list[Pass]) -> int:
    """Bytes of a launch whose passes shared a cache without limit: X, which they share, once."""
    x = [p.read["x_ptr"] for p in passes]
    return sum(p.bytes for p in passes) - sum(x) + max(x)


_OF_ONE_LAYER = {
    "x_ptr": "x_ptr",
    "B_ptr": "B_ptr",
    "factor_ptr": "grads.factor",
    "bias_ptr": "grads.bias",
}
"""The pointers to one of several layers, by the names of those of the first."""


def spread(name: str, value: Any) -> list[tuple[str, Any]]:
    """A value by its name, those of a tuple by theirs: the pointer to a gain b is gains.b."""
    if name == "members":
        return [item for member in value for item in member._asdict().items()]
    if name == "factors" and value is not None:
        return [("in_ptr", factor) for factor in value]
    if name == "others" and value is not None:
        return [(_OF_ONE_LAYER[key], getattr(side, key)) for side in value for key in _OF_ONE_LAYER]
    if hasattr(value, "_asdict"):
        if name.isupper():
            return [*value._asdict().items()]
        return [(f"{name}.{field}", part) for field, part in value._asdict().items()]
    return [(name, value)]


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


_GEMM_ARGUMENTS = names(
    "num_partials factors ranks s_ptr largest_ptr y_ptr sync_ptr keep_scale seed_ptr seed_low "
    "seed_high threshold M N num_chunks rows_per_sample stride_sm stride_ym IS_GRAD "
    "DROPOUT EVEN_K BLOCK_M BLOCK_N BLOCK_K BLOCK_R BLOCK_E BLOCK_S GROUP_M MASK_PARTS UNIT "
    "FACTOR_UNIT PRECISION SHUFFLES MMA_SYNC PAIRS SETTLES "
    # the same X and W once more, where they have descriptors
    "x_desc_0 w_desc_0 x_desc_1 w_desc_1 x_desc_2 w_desc_2 "
    # of each member
    "x_ptr w_ptr absmax_ptr absmax2_ptr code2_ptr offset_ptr code_ptr partials_ptr in_ptr out_ptr "
    "scaling K R R_made first_r stride_xm stride_xk stride_wk stride_wn stride_in_l stride_in_r "
    "stride_out_l stride_out_r IS_NF4 BLOCKSIZE BLOCKSIZE2 SHARING"
)


def _ticketed_gemm(v: Values, grid: tuple[int, int, int]) -> list[Pass]:
    members = [Values(member._asdict()) for member in v["members"]]
    passes = []
    if v["sync_ptr"] is not None:
        passes.append(Pass("sum" if members[0]["partials_ptr"] is not None else "shrink"))
        for member, partials in zip(members, v["num_partials"], strict=True):
            _producers(passes[0], v, member, partials)
        if v["largest_ptr"] is not None:
            passes[0].writes("largest_ptr", 4 * v.count("largest_ptr"))
    if v["y_ptr"] is None:
        return passes
    gemm = Pass("gemm")
    for member in members:
        _product(gemm, v, member)
    if v["largest_ptr"] is not None:
        largest = 4 * v.count("largest_ptr")
        gemm.reads("largest_ptr", largest, cdiv(v["N"], v["BLOCK_N"]) * largest)
    gemm.writes("y_ptr", v["M"] * v["N"] * v.itemsize("y_ptr"))
    return [*passes, gemm]


def _product(gemm: Pass, v: Values, member: Values) -> None:
    """X W' and S · outᵀ of one member."""
    M, N, K, R = v["M"], v["N"], member["K"], member["R"]
    across, down = cdiv(N, v["BLOCK_N"]), cdiv(M, v["BLOCK_M"])
    x = M * K * member.itemsize("x_ptr")
    gemm.flops += 2 * M * N * K
    gemm.reads("x_ptr", x, across * x)
    if member["IS_NF4"]:
        _packed_weight(gemm, v, member, across, down)
    else:
        w = N * K * member.itemsize("w_ptr")
        gemm.reads("w_ptr", w, down * w)
    if v["s_ptr"] is not None:
        s, out = v.itemsize("s_ptr"), member.itemsize("out_ptr")
        gemm.flops += 2 * M * N * R
        masks = v["DROPOUT"] and v["IS_GRAD"]
        gemm.reads("s_ptr", M * R * s, across * (v["MASK_PARTS"] if masks else 1) * M * R * s)
        gemm.reads("out_ptr", N * R * out, down * N * R * out)


def _packed_weight(gemm: Pass, v: Values, member: Values, across: int, down: int) -> None:
    """An NF4 weight that the GEMM decodes, once for each block of rows."""
    elements, tiles = v["N"] * member["K"], across * down
    gemm.reads("w_ptr", elements // 2, down * elements // 2)
    blocks, shared = cdiv(elements, member["BLOCKSIZE"]), down * elements // member["SHARING"]
    absmax = member.itemsize("absmax_ptr")
    code = member.count("code_ptr") * member.itemsize("code_ptr")
    gemm.reads("absmax_ptr", blocks * absmax, shared * absmax)
    gemm.reads("code_ptr", code, tiles * code)
    if member["offset_ptr"] is not None:
        outer, table = member.itemsize("absmax2_ptr"), member.itemsize("code2_ptr")
        gemm.reads("absmax2_ptr", cdiv(blocks, member["BLOCKSIZE2"]) * outer, shared * outer)
        # Masked lanes look up entry 0.
        padded = cdiv(member["K"], v["BLOCK_K"]) * v["BLOCK_K"] * v["BLOCK_N"]
        lookups = tiles * padded // member["SHARING"]
        gemm.reads("code2_ptr", member.count("code2_ptr") * table, lookups * table)
        offset = member.itemsize("offset_ptr")
        gemm.reads("offset_ptr", offset, tiles * offset)


def _producers(shrink: Pass, v: Values, member: Values, num_partials: int) -> None:
    """The columns of S that a member adds to those of the others."""
    M, K, R = v["M"], member["K"], member["R_made"]
    if member["partials_ptr"] is not None:
        partials = num_partials * M * R * member.itemsize("partials_ptr")
        shrink.reads("partials_ptr", partials, partials)
    else:
        x, factor = M * K * member.itemsize("x_ptr"), K * R * member.itemsize("in_ptr")
        chunks, row_tiles = cdiv(R, v["BLOCK_R"]), cdiv(M, v["BLOCK_S"])
        # Chunks of the rank of the same rows have neighbouring tickets and share the cache.
        shrink.reads("x_ptr", x, chunks * x)
        shrink.reads("in_ptr", factor, row_tiles * factor)
        shrink.flops += 2 * M * K * R
    shrink.writes("s_ptr", M * R * v.itemsize("s_ptr"))


_STRIP_ARGUMENTS = names(
    "x_ptr s_ptr largest_ptr B_ptr partials.dS partials.T grads.factor others widths sync_ptr "
    "scaling keep_scale "
    "seed_ptr seed_low seed_high threshold M L R rows_per_range num_ranges tile_rows stride_xm "
    "stride_xl stride_sm stride_vm stride_vl stride_bl stride_br stride_gl stride_gr IS_EXPAND "
    "DROPOUT PAIRS SETTLES BLOCK_M BLOCK_L BLOCK_R UNIT FACTOR_UNIT PRECISION"
)


def _strips(v: Values, grid: tuple[int, int, int]) -> list[Pass]:
    M, R, x = v["M"], v["R"], v.itemsize("x_ptr")
    # The columns of all layers; each of them reads its own S.
    widths = (v["L"], *(v["widths"] or ()))
    L, (blocks, ranges, chunks) = sum(widths), grid
    passes = []
    for chunk in range(chunks):
        # The grid runs over the chunks last: each of them reads the whole of X from memory.
        width = min(v["BLOCK_R"], R - chunk * v["BLOCK_R"])
        walk = Pass(f"walk {chunk}")
        walk.reads("x_ptr", M * L * x, M * L * x)
        if v["partials.dS"] is not None:
            factor = L * width * v.itemsize("B_ptr")
            walk.flops += 2 * M * L * width
            walk.reads("B_ptr", factor, ranges * factor)
            walk.writes("partials.dS", blocks * M * width * v.itemsize("partials.dS"))
        if v["partials.T"] is not None:
            S = M * width * v.itemsize("s_ptr")
            walk.flops += 2 * M * L * width
            walk.reads("s_ptr", len(widths) * S, blocks * S)
            if v["largest_ptr"] is not None:
                # Ranges of rows begin with a tile of dS.
                largest = 4 * width * cdiv(M, v["tile_rows"])
                walk.reads("largest_ptr", largest, blocks * largest)
            walk.writes("partials.T", ranges * L * width * v.itemsize("partials.T"))
        passes.append(walk)
    if v["partials.T"] is not None:
        T = ranges * L * R * v.itemsize("partials.T")
        passes[-1].reads("partials.T", T, T)
        if v["grads.factor"] is not None:
            passes[-1].writes("grads.factor", L * R * v.itemsize("grads.factor"))
    return passes


_EXPAND_ARGUMENTS = names(
    "ranks s_ptr largest_ptr keep_scale seed_ptr seed_low seed_high threshold M columns tile_rows "
    "stride_sm "
    "IS_GRAD DROPOUT BLOCK_M BLOCK_L BLOCK_R UNIT FACTOR_UNIT PRECISION PAIRS SETTLES SHUFFLES "
    "MMA_SYNC "
    # of each member
    "out_ptr y_ptr bias_ptr scaling L R first_r stride_out_l stride_out_r"
)


def _expand(v: Values, grid: tuple[int, int, int]) -> list[Pass]:
    M, rows = v["M"], cdiv(v["M"], v["BLOCK_M"])
    expand = Pass("expand")
    for i, member in enumerate(Values(member._asdict()) for member in v["members"]):
        L, R = member["L"], member["R"]
        S, out = M * R * v.itemsize("s_ptr"), L * R * member.itemsize("out_ptr")
        expand.flops += 2 * M * L * R
        expand.reads("s_ptr", S, cdiv(L, v["BLOCK_L"]) * S)
        expand.reads("out_ptr", out, rows * out)
        if member["bias_ptr"] is not None:
            bias = L * member.itemsize("bias_ptr")
            expand.reads("bias_ptr", bias, rows * bias)
        if i == 0 or not v["IS_GRAD"]:
            expand.writes("y_ptr", M * L * member.itemsize("y_ptr"))
    if v["largest_ptr"] is not None:
        largest = 4 * v.count("largest_ptr")
        expand.reads("largest_ptr", largest, _largest_loaded(v))
    return [expand]


def _largest_loaded(v: Values) -> int:
    """A tile reads those of all columns in the tiles of dS that its rows are in."""
    M, BLOCK_M, rows = v["M"], v["BLOCK_M"], v["tile_rows"]
    firsts = range(0, M, BLOCK_M)
    tiles = sum(cdiv(min(first + BLOCK_M, M), rows) - first // rows for first in firsts)
    return 4 * int(v["columns"]) * tiles * int(v["stride_sm"])


_SHRINK_ARGUMENTS = names(
    "x_ptr factors in_ptr ranks s_ptr wide_ptr keep_scale seed_ptr seed_low seed_high threshold M "
    "K R padded rows_per_sample stride_xm stride_xk stride_ar stride_ak DROPOUT BLOCK_M BLOCK_K "
    "BLOCK_R PRECISION PAIRS SETTLES SHUFFLES MMA_SYNC"
)


def _shrink(v: Values, grid: tuple[int, int, int]) -> list[Pass]:
    M, K, R, e = v["M"], v["K"], v["R"], v.itemsize("x_ptr")
    tiles, chunks = cdiv(M, v["BLOCK_M"]), cdiv(R, v["BLOCK_R"])
    shrink, A = Pass("shrink", 2 * M * K * R), R * K * v["factors"][0].dtype.itemsize
    shrink.reads("x_ptr", M * K * e, chunks * M * K * e)
    shrink.reads("in_ptr", A, tiles * A)
    if v["s_ptr"] is not None:
        shrink.writes("s_ptr", M * R * e)
    if v["wide_ptr"] is not None:
        shrink.writes("wide_ptr", M * (K + v["padded"]) * e)
    return [shrink]


_DECODE_ARGUMENTS = names(
    "packed_ptr absmax_ptr absmax2_ptr code2_ptr offset_ptr code_ptr w_ptr num_bytes num_elements "
    "num_blocks BLOCKSIZE BLOCKSIZE2 ROWS SHUFFLES"
)


def _nf4_decode(v: Values, grid: tuple[int, int, int]) -> list[Pass]:
    programs, blocks = grid[0], v["num_blocks"]
    decode = Pass("decode")
    decode.reads("packed_ptr", v["num_bytes"], v["num_bytes"])
    absmax = blocks * v.itemsize("absmax_ptr")
    decode.reads("absmax_ptr", absmax, absmax)
    code = v.count("code_ptr") * v.itemsize("code_ptr")
    decode.reads("code_ptr", code, programs * code)
    if v["offset_ptr"] is not None:
        outer, table = v.itemsize("absmax2_ptr"), v.itemsize("code2_ptr")
        decode.reads("absmax2_ptr", cdiv(blocks, v["BLOCKSIZE2"]) * outer, blocks * outer)
        # Masked lanes of the last program look up entry 0.
        lookups = programs * v["ROWS"] * table
        decode.reads("code2_ptr", v.count("code2_ptr") * table, lookups)
        decode.reads("offset_ptr", v.itemsize("offset_ptr"), programs * v.itemsize("offset_ptr"))
    decode.writes("w_ptr", v["num_elements"] * v.itemsize("w_ptr"))
    return [decode]


_AUGMENTED_ARGUMENTS = names(
    "packed_ptr absmax_ptr absmax2_ptr code2_ptr offset_ptr code_ptr B_ptr w_ptr scaling K R "
    "first_r columns parts stride_bn stride_br rows more_rows BLOCKSIZE BLOCKSIZE2 ROWS EVEN "
    "SHUFFLES"
)


def _nf4_decode_augmented(v: Values, grid: tuple[int, int, int]) -> list[Pass]:
    """Of rows that hold whole blocks; others load an absmax for each weight."""
    programs, K, blocks = grid[0], v["K"], v.count("absmax_ptr")
    rows = programs // v["parts"]
    if not v["EVEN"]:
        raise NotImplementedError("bench/instruments/traffic.py must model blocks across rows")
    decode = Pass("decode")
    decode.reads("packed_ptr", rows * K // 2, rows * K // 2)
    absmax = blocks * v.itemsize("absmax_ptr")
    decode.reads("absmax_ptr", absmax, absmax)
    code = v.count("code_ptr") * v.itemsize("code_ptr")
    decode.reads("code_ptr", code, programs * code)
    if v["offset_ptr"] is not None:
        outer, table = v.itemsize("absmax2_ptr"), v.itemsize("code2_ptr")
        decode.reads("absmax2_ptr", cdiv(blocks, v["BLOCKSIZE2"]) * outer, blocks * outer)
        # Masked lanes of the last part of a row look up entry 0.
        decode.reads("code2_ptr", v.count("code2_ptr") * table, programs * v["ROWS"] * table)
        decode.reads("offset_ptr", v.itemsize("offset_ptr"), programs * v.itemsize("offset_ptr"))
    B = rows * v["R"] * v.itemsize("B_ptr")
    decode.reads("B_ptr", B, B)
    decode.writes("w_ptr", rows * (K + v["columns"]) * v.itemsize("w_ptr"))
    return [decode]


_Count = Callable[[Values, tuple[int, int, int]], list[Pass]]
_KERNELS: dict[str, tuple[frozenset[str], _Count]] = {
    "ticketed_gemm": (_GEMM_ARGUMENTS, _ticketed_gemm),
    "strips": (_STRIP_ARGUMENTS, _strips),
    "expand": (_EXPAND_ARGUMENTS, _expand),
    "shrink": (_SHRINK_ARGUMENTS, _shrink),
    "nf4_decode": (_DECODE_ARGUMENTS, _nf4_decode),
    "nf4_decode_augmented": (_AUGMENTED_ARGUMENTS, _nf4_decode_augmented),
    **gated_traffic.KERNELS,
}
