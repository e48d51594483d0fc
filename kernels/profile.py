"""What a profiler shows for a launch: a name with the tile sizes, its FLOPs and its bytes.

Triton asks for the name when it compiles a kernel, and for the rest only while a profiler, such as
Proton, hooks launches. FLOPs are those of the products, without padding; bytes are those of each
tensor that the launch reads or writes, counted once, as if the cache kept what tiles share. How
many rows each expert has is known on the device alone: every row counts, and every expert's factor.
"""

from collections.abc import Callable, Iterable
from typing import Any

Arguments = dict[str, Any]


def shown_as(
    name: Callable[[Any], str], work: Callable[[Arguments], dict[str, int]]
) -> dict[str, Any]:
    """Options of triton.jit. `name` takes what a kernel is compiled for, its constants and its
    signature by argument; `work` takes the arguments of a launch."""

    def launch_metadata(grid: Any, kernel: Any, arguments: Arguments) -> dict[str, Any]:
        return {"name": kernel.name, **work(arguments)}

    return {"repr": name, "launch_metadata": launch_metadata}


def gemm_name(compiled: Any) -> str:
    """ticketed_gemm_dX_128x128x64_r16: BLOCK_M × BLOCK_N × BLOCK_K and, with S, BLOCK_R."""
    constants, signature = compiled.constants, compiled.signature
    tiles = constants["TILES"]
    words = ["ticketed_gemm", "dX" if constants["IS_GRAD"] else "forward"]
    if signature["members"][0][1] == "*u8":
        words.append("nf4")
    words.append(f"{tiles.BLOCK_M}x{tiles.BLOCK_N}x{tiles.BLOCK_K}")
    if signature["s_ptr"] != "constexpr":
        words.append(f"r{tiles.BLOCK_R}")
    return "_".join(words)


def gemm_work(arguments: Arguments) -> dict[str, int]:
    """X W', S · outᵀ and the shrink of every member, as far as the launch computes them."""
    y = arguments["y_ptr"]
    M, N = arguments["M"], 0 if y is None else arguments["N"]
    names = ("y_ptr", "v_ptr", "bias_ptr", "s_ptr", "largest_ptr", "spans_ptr")
    flops, tensors = 0, [*(arguments[name] for name in names), *arguments["gains"]]
    # The first of several factors is that of the one member.
    tensors += (arguments["factors"] or ())[1:]
    for member in arguments["members"]:
        flops += 2 * M * N * (member.K + member.R)
        tensors.append(member.partials_ptr)
        shrinks = member.in_ptr is not None and member.partials_ptr is None
        if shrinks:
            flops += 2 * M * member.K * member.R_made
            tensors.append(member.in_ptr)
        if y is not None:
            tensors += [member.w_ptr, member.absmax_ptr, member.absmax2_ptr, member.code2_ptr]
            tensors += [member.offset_ptr, member.code_ptr, member.out_ptr]
        if y is not None or shrinks:
            tensors.append(member.x_ptr)
    return _flops(flops, arguments["members"][0].x_ptr) | _bytes(tensors)


def strips_name(compiled: Any) -> str:
    """strips_dB_dS_64x256_r16: what a walk over the rows makes, BLOCK_M × BLOCK_L, BLOCK_R."""
    tiles, words = compiled.constants["TILES"], ["strips"]
    if compiled.constants["IS_EXPAND"]:
        dS, T, sums, _ = (kind != "constexpr" for kind in compiled.signature["partials"])
        words += ["dB"] * T + ["dS"] * dS + ["sums"] * sums
    else:
        words.append("dA")
    return "_".join([*words, f"{tiles.BLOCK_M}x{tiles.BLOCK_L}", f"r{tiles.BLOCK_R}"])


def strips_work(arguments: Arguments) -> dict[str, int]:
    """Xᵀ S and X times the factor, as far as they are wanted."""
    x, partials = arguments["x_ptr"], arguments["partials"]
    products = (partials.T is not None) + (partials.dS is not None)
    columns = arguments["L"] + sum(arguments["widths"] or ())
    flops = 2 * arguments["M"] * columns * arguments["R"] * products
    tensors = [arguments[name] for name in ("x_ptr", "s_ptr", "largest_ptr", "v_ptr", "B_ptr")]
    tensors += [*arguments["gains"], *partials, *arguments["grads"]]
    for side in arguments["others"] or ():
        tensors += [side.x_ptr, side.B_ptr, side.factor_ptr, side.bias_ptr]
    return _flops(flops, x) | _bytes(tensors)


def expand_name(compiled: Any) -> str:
    """expand_dX_64x128_r16: BLOCK_M × BLOCK_L, and the ranks in one step."""
    tiles = compiled.constants["TILES"]
    made = "dX" if compiled.constants["IS_GRAD"] else "y"
    return f"expand_{made}_{tiles.BLOCK_M}x{tiles.BLOCK_L}_r{tiles.BLOCK_R}"


def expand_work(arguments: Arguments) -> dict[str, int]:
    """S · outᵀ of every member; the y of a gradient is one."""
    flops, tensors = 0, [arguments["s_ptr"], arguments["largest_ptr"], *arguments["gains"]]
    for i, member in enumerate(arguments["members"]):
        flops += 2 * arguments["M"] * member.L * member.R
        tensors += [member.out_ptr, member.bias_ptr]
        if i == 0 or not arguments["IS_GRAD"]:
            tensors.append(member.y_ptr)
    return _flops(flops, arguments["members"][0].y_ptr) | _bytes(tensors)


def shrink_name(compiled: Any) -> str:
    """shrink_beside_x_32x64_r16: with the copy of x or without, BLOCK_M × BLOCK_K, BLOCK_R."""
    tiles, words = compiled.constants["TILES"], ["shrink"]
    if compiled.signature["wide_ptr"] != "constexpr":
        words.append("beside_x")
    return "_".join([*words, f"{tiles.BLOCK_M}x{tiles.BLOCK_K}", f"r{tiles.BLOCK_R}"])


def shrink_work(arguments: Arguments) -> dict[str, int]:
    """drop(x) Aᵀ."""
    names = ("x_ptr", "s_ptr", "wide_ptr", "spans_ptr")
    flops = 2 * arguments["M"] * arguments["K"] * arguments["R"]
    tensors = [*(arguments[name] for name in names), *arguments["factors"]]
    return _flops(flops, arguments["x_ptr"]) | _bytes(tensors)


def decode_name(compiled: Any) -> str:
    """nf4_decode_128x64: quantisation blocks × weights in a block."""
    return "nf4_decode_{ROWS}x{BLOCKSIZE}".format(**compiled.constants)


def decode_work(arguments: Arguments) -> dict[str, int]:
    names = ("packed_ptr", "absmax_ptr", "absmax2_ptr", "code2_ptr", "offset_ptr", "code_ptr")
    return _bytes([*(arguments[name] for name in names), arguments["w_ptr"]])


def augmented_name(compiled: Any) -> str:
    """nf4_decode_augmented_64x64: quantisation blocks × weights in a block."""
    return "nf4_decode_augmented_{ROWS}x{BLOCKSIZE}".format(**compiled.constants)


def augmented_work(arguments: Arguments) -> dict[str, int]:
    moved = decode_work(arguments)["bytes"]
    return {"bytes": moved + _bytes([arguments["B_ptr"], *arguments["gains"]])["bytes"]}


def norms_name(compiled: Any) -> str:
    """row_norms_32x64_r16: BLOCK_N × BLOCK_K, and the ranks in one product."""
    return "row_norms_{BLOCK_N}x{BLOCK_K}_r{BLOCK_R}".format(**compiled.constants)


def norms_work(arguments: Arguments) -> dict[str, int]:
    """The product B A."""
    names = ("w_ptr", "A_ptr", "B_ptr", "norms_ptr")
    flops = 2 * arguments["N"] * arguments["K"] * arguments["R"]
    return _flops(flops, arguments["w_ptr"]) | _bytes(arguments[name] for name in names)


def update_name(compiled: Any) -> str:
    """weight_update_32x128_r16: BLOCK_N × BLOCK_K, and the ranks in one product."""
    return "weight_update_{BLOCK_N}x{BLOCK_K}_r{BLOCK_R}".format(**compiled.constants)


def update_work(arguments: Arguments) -> dict[str, int]:
    """The product B A, in float32 whatever the weight is; W and out are one tensor or two."""
    flops = 2 * arguments["N"] * arguments["K"] * arguments["R"]
    names = ("w_ptr", "out_ptr", "A_ptr", "B_ptr")
    tensors = [*(arguments[name] for name in names), *arguments["gains"]]
    return {"flops32": flops, **_bytes(tensors)}


def mask_name(compiled: Any) -> str:
    """store_keep_mask_32x64: BLOCK_M × BLOCK_K."""
    return "store_keep_mask_{BLOCK_M}x{BLOCK_K}".format(**compiled.constants)


def mask_work(arguments: Arguments) -> dict[str, int]:
    return _bytes([arguments["mask_ptr"]])


def _flops(count: int, operand: Any) -> dict[str, int]:
    """By the bits of an operand, as Proton wants them."""
    return {f"flops{8 * operand.element_size()}": count}


def _bytes(tensors: Iterable[Any]) -> dict[str, int]:
    moved = (t.numel() * t.element_size() for t in tensors if t is not None)
    return {"bytes": sum(moved)}


def gated_forward_name(compiled: Any) -> str:
    """gated_forward_silu_64x64_r16: BLOCK_M × BLOCK_L, and with S of down BLOCK_R."""
    tiles = compiled.constants["TILES"]
    words = ["gated_forward", compiled.constants["ACTIVATION"], f"{tiles.BLOCK_M}x{tiles.BLOCK_L}"]
    if compiled.signature["A_ptr"] != "constexpr":
        words.append(f"r{tiles.BLOCK_R}")
    return "_".join(words)


def gated_forward_work(arguments: Arguments) -> dict[str, int]:
    """S · Qᵀ of gate and up, and h Aᵀ."""
    h, down = arguments["h_ptr"], arguments["R"]
    R = arguments["gate"].R + arguments["up"].R + down
    tensors = [arguments[name] for name in ("A_ptr", "h_ptr", "parts_ptr", "s_ptr")]
    tensors += _of_branches(arguments)
    return _flops(2 * arguments["M"] * arguments["L"] * R, h) | _bytes(tensors)


def gated_backward_name(compiled: Any) -> str:
    """gated_backward_silu_64x32x4_r16: BLOCK_M × BLOCK_L × PARTS, BLOCK_R."""
    constants = compiled.constants
    tiles = constants["TILES"]
    shape = f"{tiles.BLOCK_M}x{tiles.BLOCK_L}x{constants['PARTS']}"
    return f"gated_backward_{constants['ACTIVATION']}_{shape}_r{tiles.BLOCK_R}"


def gated_backward_work(arguments: Arguments) -> dict[str, int]:
    """The low-rank parts of gate, up and dh, and of their factors what is wanted."""
    down, sums = arguments["down"], [arguments[f"{n}_sums"] for n in ("gate", "up", "down")]
    ranks = (arguments["gate"].R, arguments["up"].R, down.R)
    products = sum(
        R * (1 + (each.T_ptr is not None) + (each.dS_ptr is not None))
        for R, each in zip(ranks, sums, strict=True)
    )
    dh = arguments["dh_ptr"]
    tensors = [dh, down.dS_ptr, down.largest_ptr, down.A_ptr]
    tensors += [arguments["dgate_ptr"], arguments["dup_ptr"]]
    tensors += _of_branches(arguments)
    tensors += [tensor for each in sums for tensor in (each.T_ptr, each.grad_ptr, each.dS_ptr)]
    count = 2 * arguments["M"] * arguments["L"] * products
    return _flops(count, dh) | _bytes(tensors)


def gated_gradients_name(compiled: Any) -> str:
    """gated_gradients_silu_64x64_r16: BLOCK_M × BLOCK_L, and the ranks in one step."""
    tiles, activation = compiled.constants["TILES"], compiled.constants["ACTIVATION"]
    return f"gated_gradients_{activation}_{tiles.BLOCK_M}x{tiles.BLOCK_L}_r{tiles.BLOCK_E}"


def gated_gradients_work(arguments: Arguments) -> dict[str, int]:
    """The low-rank parts of gate, up and dh; h takes the place of dh."""
    down, dh = arguments["down"], arguments["dh_ptr"]
    R = arguments["gate"].R + arguments["up"].R + down.R
    tensors = [dh, down.dS_ptr, down.largest_ptr, down.A_ptr]
    tensors += [arguments["dgate_ptr"], arguments["dup_ptr"], *_of_branches(arguments)]
    return _flops(2 * arguments["M"] * arguments["L"] * R, dh) | _bytes(tensors)


def _of_branches(arguments: Arguments) -> list[Any]:
    """The base products, S and B of gate and up."""
    branches = arguments["gate"], arguments["up"]
    return [t for branch in branches for t in (branch.base_ptr, branch.s_ptr, branch.B_ptr)]


def expert_shrink_name(compiled: Any) -> str:
    """expert_shrink_rows_32x64_r16: with the rows or without, BLOCK_M × BLOCK_K, BLOCK_R."""
    tiles, words = compiled.constants["TILES"], ["expert_shrink"]
    if compiled.signature["rows_ptr"] != "constexpr":
        words.append("rows")
    words.append(f"{tiles.BLOCK_M}x{tiles.BLOCK_K}")
    if compiled.signature["F_ptr"] != "constexpr":
        words.append(f"r{tiles.BLOCK_R}")
    return "_".join(words)


def expert_shrink_work(arguments: Arguments) -> dict[str, int]:
    names = ("x_ptr", "order_ptr", "F_ptr", "vector_ptr", "s_ptr", "rows_ptr", "dots_ptr")
    flops = 2 * arguments["M"] * arguments["K"] * arguments["R"]
    tensors = [arguments[name] for name in (*names, "back_ptr")]
    return _flops(flops, arguments["x_ptr"]) | _bytes(tensors)


def expert_product_name(compiled: Any) -> str:
    """expert_product_64x128_r16: BLOCK_M × BLOCK_L, and of a low-rank part BLOCK_R; without a
    product with W expert_add."""
    tiles, signature = compiled.constants["TILES"], compiled.signature
    words = ["expert_add" if signature["x_ptr"] == "constexpr" else "expert_product"]
    words.append(f"{tiles.BLOCK_M}x{tiles.BLOCK_L}")
    if signature["s_ptr"] != "constexpr":
        words.append(f"r{tiles.BLOCK_R}")
    return "_".join(words)


def expert_product_work(arguments: Arguments) -> dict[str, int]:
    names = ("x_ptr", "W_ptr", "s_ptr", "F_ptr", "bias_ptr", "out_ptr")
    flops = 2 * arguments["M"] * arguments["L"] * (arguments["K"] + arguments["R"])
    return _flops(flops, arguments["out_ptr"]) | _bytes(arguments[name] for name in names)


def expert_gradients_name(compiled: Any) -> str:
    """expert_gradients_64x256_r16: BLOCK_M × BLOCK_L, BLOCK_R."""
    tiles = compiled.constants["TILES"]
    return f"expert_gradients_{tiles.BLOCK_M}x{tiles.BLOCK_L}_r{tiles.BLOCK_R}"


def expert_gradients_work(arguments: Arguments) -> dict[str, int]:
    """Xᵀ S of every row."""
    S, x = arguments["s_ptr"], arguments["x_ptr"]
    rows = x.shape[0] if S is None else S.shape[0]
    names = ("x_ptr", "s_ptr", "order_ptr", "w_ptr", "T_ptr", "sums_ptr")
    flops = 2 * rows * arguments["L"] * arguments["R"]
    return _flops(flops, x) | _bytes(arguments[name] for name in names)


def expert_scatter_name(compiled: Any) -> str:
    """expert_scatter_16x128: tokens × BLOCK_L."""
    return "expert_scatter_{0.BLOCK_M}x{0.BLOCK_L}".format(compiled.constants["TILES"])


def expert_scatter_work(arguments: Arguments) -> dict[str, int]:
    return _bytes(arguments[name] for name in ("y_ptr", "back_ptr", "w_ptr", "out_ptr"))


def expert_gate_forward_name(compiled: Any) -> str:
    """expert_gate_forward_silu_64x64_r16: BLOCK_M × BLOCK_L, and with S2 BLOCK_R."""
    tiles = compiled.constants["TILES"]
    words = ["expert_gate_forward", *_glu_words(compiled), f"{tiles.BLOCK_M}x{tiles.BLOCK_L}"]
    if compiled.signature["A_ptr"] != "constexpr":
        words.append(f"r{tiles.BLOCK_R}")
    return "_".join(words)


def _glu_words(compiled: Any) -> list[str]:
    glu = compiled.constants["GLU"]
    words = [glu.activation]
    if glu.limit is not None:
        words.append("clamped")
    if glu.interleaved:
        words.append("interleaved")
    return words


def expert_gate_forward_work(arguments: Arguments) -> dict[str, int]:
    """S · Qᵀ of gate and up, and h Aᵀ; every expert has rows."""
    h, R = arguments["h_ptr"], 2 * arguments["gate"].R + arguments["R"]
    names = ("offsets_ptr", "A_ptr", "h_ptr", "parts_ptr", "s_ptr")
    tensors = [*(arguments[name] for name in names), *_of_first(arguments)]
    return _flops(2 * arguments["P"] * arguments["L"] * R, h) | _bytes(tensors)


def expert_gate_backward_name(compiled: Any) -> str:
    """expert_gate_backward_silu_64x32x4_r16: BLOCK_M × BLOCK_L × PARTS, BLOCK_R."""
    constants = compiled.constants
    tiles = constants["TILES"]
    shape = f"{tiles.BLOCK_M}x{tiles.BLOCK_L}x{constants['PARTS']}"
    return "_".join(["expert_gate_backward", *_glu_words(compiled), shape, f"r{tiles.BLOCK_R}"])


def expert_gate_backward_work(arguments: Arguments) -> dict[str, int]:
    """The low-rank parts of gate, up and v, and what is wanted of their factors."""
    down, sums, R = arguments["down"], arguments["sums"], arguments["gate"].R
    products = 2 * R * (1 + (sums.gate_ptr is not None) + (sums.dS_ptr is not None))
    products += down.R * (1 + (sums.down_ptr is not None))
    names = ("offsets_ptr", "dgate_ptr", "dup_ptr")
    tensors = [*(arguments[name] for name in names), *_of_first(arguments), down.v_ptr]
    tensors += [down.dS_ptr, down.A_ptr, down.w_ptr, down.order_ptr]
    tensors += [sums.gate_ptr, sums.up_ptr, sums.down_ptr, sums.dS_ptr, sums.dw_ptr]
    count = 2 * arguments["P"] * arguments["L"] * products
    return _flops(count, down.v_ptr) | _bytes(tensors)


def expert_gate_gradients_name(compiled: Any) -> str:
    """expert_gate_gradients_silu_64x64_r16: BLOCK_M × BLOCK_L, and the ranks in one step."""
    tiles = compiled.constants["TILES"]
    shape = f"{tiles.BLOCK_M}x{tiles.BLOCK_L}"
    return "_".join(["expert_gate_gradients", *_glu_words(compiled), shape, f"r{tiles.BLOCK_E}"])


def expert_gate_gradients_work(arguments: Arguments) -> dict[str, int]:
    """The low-rank parts of gate, up and v; w h takes the place of v."""
    down, v = arguments["down"], arguments["v_ptr"]
    R = 2 * arguments["gate"].R + down.R
    names = ("offsets_ptr", "v_ptr", "dgate_ptr", "dup_ptr", "dw_ptr")
    tensors = [*(arguments[name] for name in names), *_of_first(arguments)]
    tensors += [down.dS_ptr, down.A_ptr, down.w_ptr, down.order_ptr]
    return _flops(2 * arguments["P"] * arguments["L"] * R, v) | _bytes(tensors)


def expert_sums_name(compiled: Any) -> str:
    """expert_sums_dS_dw_64: what it adds up, BLOCK_M."""
    made = [name for name in ("dS", "dw") if compiled.signature[f"{name}_ptr"] != "constexpr"]
    return "_".join(["expert_sums", *made, str(compiled.constants["BLOCK_M"])])


def expert_sums_work(arguments: Arguments) -> dict[str, int]:
    names = ("dS_parts_ptr", "dw_parts_ptr", "dots_ptr", "order_ptr", "dS_ptr", "dw_ptr")
    return _bytes(arguments[name] for name in names)


def _of_first(arguments: Arguments) -> list[Any]:
    """Base products, B and biases of gate and up, and their S once."""
    gate, up = arguments["gate"], arguments["up"]
    of_both = [t for b in (gate, up) for t in (b.base_ptr, b.B_ptr, b.bias_ptr)]
    return [gate.s_ptr, *of_both]
