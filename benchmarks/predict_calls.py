"""What benchmarks/predict.py knows of the operations: their calls, their rivals, and of each Triton kernel
how often its loops are passed and how often it moves its tensors."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitdiv_kernels.ops import _launch


def ceil(count, step):
    return -(-count // step)


def _row_tiles(a):
    return ceil(a["N"], a["BR"])


def _widths(a):
    """Slices of the width that a tile of products is made of: of two sets' the mean."""
    widths = [a[name] for name in ("D", "D2") if a.get(name)]
    return sum(ceil(width, a["BD"]) for width in widths) / len(widths)


def _of_rows(a):
    return ceil(a["keys"], a["BLOCK"])


def _of_width(a):
    return ceil(a["D"], a["BD"])


def _columns(a):
    return ceil(a.get("M", a["N"]), a.get("BC", a["BR"]))


def _turned(a):
    """Steps over signs that are read the other way, on average."""
    return (_row_tiles(a) - 1) / 2 * a["BR"] / a["BC"] if a["ONE_SET"] else _columns(a)


# Passes of a loop, by function and variable, from the arguments of the launch.
LOOPS = {
    ("forward_rows", "tile"): lambda a: a["tiles"],
    ("forward_rows", "j0"): _of_rows,
    ("backward_rows", "tile"): lambda a: a["tiles"],
    ("backward_rows", "j0"): _of_rows,
    ("logits_kernel", "c0"): lambda a: ceil(a["WIDTH"], a["INNER"]),
    ("values_kernel", "k0"): lambda a: ceil(a["inner"], a["INNER"]),
    ("dot_rows", "step"): lambda a: a["STEPS"],
    ("rows_kernel", "d0"): _of_width,
    ("rows_kernel", "e0"): _of_width,
    ("_closed_backward_kernel", "d0"): _of_width,
    ("_closed_backward_kernel", "e0"): _of_width,
    ("products", "d0"): _widths,
    ("tile_of", ""): lambda a: (_row_tiles(a) - 1) / 3,  # of the upper triangle, on average
    ("_from_signs_kernel", "j1"): _turned,
    ("_from_signs_kernel", "j2"): lambda a: _columns(a) - a["ONE_SET"] * _turned(a),
    ("weighted_rows_kernel", "j0"): _columns,
    ("weighted_rows_kernel", "slot"): lambda a: a["slots"],
    ("_join_logarithms_kernel", "_"): lambda a: a["tiles"],
    ("_join_nearest_kernel", "_"): lambda a: a["tiles"],
}


def _of_tiles(a):
    tiles = _row_tiles(a)
    if "D2" in a:
        return {"X": (1, tiles + 1), "Y": (1, tiles + 1), "PARTS": (1, 1)}
    own = {name: (1, 1) for name in ("X_PENALTIES", "Y_PENALTIES", "SIGNS", "PARTS", "INDICES")}
    if not a["ONE_SET"]:
        return own | {"X": (1, _columns(a)), "Y": (1, tiles)}
    return own | {"X": (1, tiles + 1 if a.get("TRIANGLE", True) else 2 * tiles)}


def _of_weights(a):
    if a["TRIANGLE"]:
        x = y = 1, _row_tiles(a) + 1
    else:
        x, y = (1, _columns(a)), (1, _row_tiles(a))
    moved = {"X": x, "WEIGHTS": (1, 1), "ALONG": (1, 1)}
    return moved | ({"Y": y} if "D2" in a or not a["TRIANGLE"] else {})


def _of_gradient(a, factor):
    """The other vectors are read for each tile of rows, the left factor for each tile of the gradient."""
    tiles, outs = _row_tiles(a), ceil(a["D"], a["BO"])
    moved = {factor: (1, outs), "DX": (1, 1)}
    return moved | ({"X": (1, tiles + 1)} if a["Y"] is a["X"] else {"X": (1, 1), "Y": (1, tiles)})


# How often a launch moves each of its tensors (written and read again: 2), through memory and through L2.
MOVED = {
    "logits_kernel": lambda a: {"a": (1, a["column_tiles"]), "b": (1, a["row_tiles"]), "maps": (1, 1)},
    "values_kernel": lambda a: {"maps": (1, a["column_tiles"]), "b": (1, a["row_tiles"]), "result": (1, 1)},
    "forward_rows": lambda a: {"z": (2, 2)},
    "backward_rows": lambda a: {"z": (2, 2), "dy": (2, 2)},
    "dot_rows": lambda a: {"x": (1, 1), "y": (1, 1)},
    "rows_kernel": lambda a: {
        "X": (1, 1 if a["SUMS"] is None and a["UNIT"] is None else 2),
        **dict.fromkeys(("INVERSE_NORMS", "SQUARES", "SUMS", "UNIT"), (1, 1)),
    },
    "_closed_backward_kernel": lambda a: {"X": (1, 2), "DUNIT": (1, 2), "DX": (1, 1)},
    "_tiles_kernel": _of_tiles,
    "_weights_kernel": _of_weights,
    "_from_signs_kernel": lambda a: _of_gradient(a, "SIGNS"),
    "weighted_rows_kernel": lambda a: _of_gradient(a, "WEIGHTS") | {"ALONG": (1, 1)},
    "_join_logarithms_kernel": lambda a: {"PARTS": (2, 2), "ROWS": (1, 1)},
    "_join_nearest_kernel": lambda a: {"PARTS": (1, 1), "INDICES": (1, 1), "NEAREST": (1, 1)},
}


class OfTorch(TorchDispatchMode):
    """The operations of torch that launch a kernel: (name, bytes of tensors read and written, multiply-adds).

    Not views, nor what only makes a tensor.
    """

    NONE = ("empty", "view", "slice", "select", "permute", "transpose", "unsqueeze", "diagonal", "expand",
            "as_strided", "detach", "new_empty", "empty_like", "_unsafe_view", "unflatten", "t", "alias",
            "squeeze", "narrow", "_reshape_alias", "split", "unbind")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.removeprefix("aten::"), kwargs or {}
        result = function(*args, **kwargs)
        if name not in self.NONE:
            read = [x for x in args if isinstance(x, torch.Tensor) and x.numel()]
            if name.startswith("new_"):
                read = []
            if name in ("copy_", "fill_", "zero_") or kwargs.get("beta") == 0:
                read = read[1:]  # what is only written
            written = [x for x in (result, *kwargs.values()) if isinstance(x, torch.Tensor)][:1]
            moved = sum(x.numel() * x.element_size() for x in [*read, *written])
            factors = [x for x in read if x.ndim == 3][-2:]
            products = factors[0].numel() * factors[1].shape[-1] if "bmm" in name else 0
            self.found.append((name, moved, products))
        return result


def launches_of(operation, shape, mode, capability, dtype=torch.bfloat16, penalty="", packed=False):
    """(launches of Triton, operations of torch) of a call."""
    with _launch.recording(divmod(capability, 10)) as launches, OfTorch() as of_torch:
        forward, backward = CALLS[operation](shape, dtype, penalty, packed)
        saved = forward()
        if mode == "bwd":
            launches.clear()
            of_torch.found.clear()
            backward(saved)
    return list(launches), of_torch.found


def _reattention(shape, dtype, penalty, packed):
    from vitdiv_kernels.ops.maps.reattention import triton_kernels

    images, heads, tokens, width = shape
    made = {"dtype": dtype, "device": "meta"}
    if packed:
        q, k, v = torch.empty(images, tokens, 3, heads, width, **made).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = torch.empty(3, images, heads, tokens, width, **made)
    arguments = q, k, v, width**-0.5, None, None, torch.empty(heads, heads, device="meta"), None, False
    arguments = *arguments, None, None, 1e-5

    def forward():
        triton_kernels.reattention_fwd(*arguments, True, False)

    def backward(_):
        triton_kernels.reattention_bwd(q, None, *arguments, [True] * 3 + [False, True, False])

    return forward, backward


def _pairwise_cosine(shape, dtype, penalty, packed):
    from vitdiv_kernels.ops.pairs.pairwise_cosine import triton_kernels

    x, arguments = torch.empty(shape, dtype=dtype, device="meta"), (penalty or "abs", False, 1e-8)

    def backward(found):
        triton_kernels.pairwise_cosine_bwd(found[0], x, None, found[1], *arguments, True, False)

    return lambda: triton_kernels.pairwise_cosine_fwd(x, None, *arguments, True), backward


def _pairwise_rows(shape, dtype, penalty, packed):
    from vitdiv_kernels.ops.pairs.pairwise_rows import triton_kernels

    x, arguments = torch.empty(shape, dtype=dtype, device="meta"), (float(penalty or 10), 1e-8)

    def backward(found):
        rows, saved = found
        triton_kernels.pairwise_logsumexp_bwd(rows, rows, x, None, saved, *arguments, True, False)

    return lambda: triton_kernels.pairwise_logsumexp_fwd(x, None, *arguments, True), backward


def _two_gram(shape, dtype, penalty, packed):
    from vitdiv_kernels.ops.pairs.two_gram import triton_kernels

    x, y = torch.empty(2, *shape, dtype=dtype, device="meta")
    arguments = penalty or "square", 0.0, True, 1e-8, True, False

    def backward(found):
        triton_kernels.two_gram_bwd(found[0], x, y, found[1], *arguments)

    return lambda: triton_kernels.two_gram_fwd(x, y, *arguments), backward


CALLS = {
    "reattention": _reattention,
    "pairwise_cosine": _pairwise_cosine,
    "pairwise_rows": _pairwise_rows,
    "two_gram": _two_gram,
}

# Of the plain formula and of torch.compile of it, forward and backward: passes over the vectors, passes over
# the maps, products of all pairs with a vector. Each elementwise operation or reduction of eager is a pass or
# two; compile joins those between two products. The closed form: passes over the vectors, products of a
# vector with [D, D]. "floor": the inputs and results, and the fewest products that the formula needs.
RIVALS = {
    "reattention": {
        "eager": ((4, 8, 2), (7, 11, 5)), "compile": ((4, 6, 2), (7, 9, 5)), "sdpa": ((4, 0, 2), (7, 0, 5)),
        "floor": ((4, 0, 2), (7, 0, 6)),
    },
    "pairwise_cosine": {
        "eager": ((4, 4, 1), (15, 10, 2)), "compile": ((3, 2, 1), (8, 4, 2)),
        "floor": ((1, 0, 0.5), (2, 0, 1)),
    },
    "pairwise_rows": {
        "eager": ((4, 9, 1), (15, 10, 2)), "compile": ((3, 2, 1), (8, 4, 2)),
        "floor": ((1, 0, 0.5), (2, 0, 1.5)),
    },
    "two_gram": {
        "eager": ((8, 8, 2), (15, 6, 2)), "compile": ((6, 4, 2), (8, 5, 2)),
        "floor": ((2, 0, 1), (3, 0, 2)),
    },
}  # fmt: skip
CLOSED = {"pairwise_cosine": ((3, 1), (6, 2)), "two_gram": ((6, 3), (9, 4))}


def rivals(operation, shape, dtype, gpu, penalty=""):
    """Seconds of each rival, forward and backward, by bytes or by products alone, whichever takes longer."""
    *batch, tokens, width = shape
    vectors = math.prod(batch) * tokens * width
    maps = math.prod(batch) * tokens * tokens
    # float32 in three products of TF32
    slowness = {torch.float32: 6, torch.float64: 16}.get(dtype, 1)
    rate = gpu.processors * gpu.clock * gpu.of_warpgroups / slowness

    def seconds(of_vectors, of_maps, products):
        moved = (of_vectors * vectors + of_maps * maps) * dtype.itemsize
        return max(moved / gpu.bytes_a_second, products / rate)

    found = {
        name: tuple(seconds(x, m, products * maps * width) for x, m, products in modes)
        for name, modes in RIVALS[operation].items()
    }
    if operation in CLOSED and penalty == "square":
        found["closed form"] = tuple(seconds(x, 0, n * vectors * width) for x, n in CLOSED[operation])
    return found
