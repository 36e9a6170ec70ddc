"""What bounds re-attention in Triton on a GPU, in ten seconds: copies, products, sizes of workspace.

The maps that it holds have rows of 197 keys, stored 208 apart, so that each starts at a multiple of 16 bytes.
What it costs to make keys and values as long, and what that saves, is measured here, and the copies that
packed q, k and v ask for.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from bench_reattention import workload as reattention
from measure import Call, clock_of
from torch.nn.functional import pad

MIB = 1 << 20
WORKSPACES = tuple(mib * MIB for mib in (48, 96, 192, 384, 768))


def rows(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], large: int, seconds: float, triton: bool
) -> Iterator[dict]:
    """Of the sections that fit into so many seconds.

    `shape`: B, H, N, d; `large`: rows of the largest product; `triton`: whether its kernels run here.
    """
    end = time.monotonic() + seconds
    sections = [
        ceilings(device, dtype, large),
        copies(device, dtype, shape),
        products(device, dtype, shape),
        *([workspaces(device, dtype, shape)] if triton else []),
    ]
    for row in itertools.chain(*sections):
        yield row
        if time.monotonic() > end:
            return


def _row(section: str, case: str, dtype: torch.dtype, seconds: float, moved=0, operations=0) -> dict:
    return {
        "section": section,
        "case": case,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": seconds * 1e3,
        "gb_s": moved / seconds / 1e9 if moved else None,
        "gflop_s": operations / seconds / 1e9 if operations else None,
    }


def _median(device: str, call: Callable, samples: int = 7) -> float:
    clock, taken = clock_of(torch.device(device)), []
    call()
    while len(taken) < samples:
        seconds = clock([call])
        taken += [] if seconds is None else [seconds]
    return statistics.median(taken)


def ceilings(device, dtype, large):
    source = torch.randn(16 * large, large, device=device).to(dtype)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    seconds = _median(device, lambda: target.copy_(source))
    yield _row("ceiling", f"copy of {moved // 2 / MIB:.0f} MB", dtype, seconds, moved)
    a, b = (torch.randn(large, large, device=device).to(dtype) for _ in range(2))
    seconds = _median(device, lambda: torch.mm(a, b))
    yield _row("ceiling", f"product {large}x{large}x{large}", dtype, seconds, operations=2 * large**3)


def copies(device, dtype, shape):
    """Between the layouts that a call's tensors may have; bytes read plus bytes written."""
    b, h, n, d = shape
    longer = -(-n // 16) * 16
    packed = torch.randn(b, n, 3, h, d, device=device).to(dtype)
    heads = packed.permute(2, 0, 3, 1, 4)[0]
    apart, long = heads.contiguous(), heads.new_zeros(b, h, longer, d)
    cases = {
        "[B,H,N,d], as it is": (apart.clone(), apart),
        "[B,H,N,d] of packed": (torch.empty_like(apart), heads),
        "to packed": (heads, apart),
        "[B,N,H,d] to [B,H,N,d]": (torch.empty_like(apart), apart.view(b, n, h, d).transpose(1, 2)),
        f"{n} rows into {longer}": (long[:, :, :n], apart),
        f"{n} rows of packed into {longer}": (long[:, :, :n], heads),
    }
    for case, (target, source) in cases.items():
        seconds = _median(device, lambda target=target, source=source: target.copy_(source))
        yield _row("copy", case, dtype, seconds, 2 * source.numel() * source.element_size())


def products(device, dtype, shape):
    """QKᵀ and YV of a chunk of images: the maps' rows N or N' apart, keys and values of N or N' rows."""
    b, h, n, d = shape
    images = max(1, min(b, 96 * MIB // (h * n * n * dtype.itemsize)))
    longer = -(-n // 16) * 16
    q, k = (torch.randn(images * h, n, d, device=device).to(dtype) for _ in range(2))
    padded = pad(k, (0, 0, 0, longer - n))
    apart = q.new_zeros(images * h, n, longer)
    cases = {
        f"maps of {n}": (q.new_zeros(images * h, n, n), k),
        f"maps of {n}, {longer} apart": (apart[:, :, :n], k),
        f"maps of {longer}, padded keys": (apart, padded),
    }
    out = torch.empty_like(q)
    for case, (maps, keys) in cases.items():
        operations = 2 * images * h * n * n * d  # those of N keys, whatever is padded
        for name, call in (
            ("QK^T", lambda maps=maps, keys=keys: torch.baddbmm(maps, q, keys.mT, beta=0, out=maps)),
            ("YV", lambda maps=maps, keys=keys: torch.baddbmm(out, maps, keys, beta=0, out=out)),
        ):
            yield _row("product", f"{name}, {case}", dtype, _median(device, call), operations=operations)


def workspaces(device, dtype, shape):
    """Re-attention with workspaces of several sizes: small ones stay in L2, large ones take few launches."""
    from vitdiv_kernels.ops import _workspace

    name = str(dtype).removeprefix("torch.")
    maker = reattention(shape, dtype=name)
    torch.manual_seed(0)
    inputs = maker.inputs(torch.device(device), dtype)
    before = _workspace.WORKSPACE_BYTES
    try:
        for size in WORKSPACES:
            _workspace.WORKSPACE_BYTES = (((0, 0), size),)
            for mode in ("fwd", "fwd+bwd"):
                call = Call(maker.providers["triton"](), inputs, mode)
                call.prepare()
                seconds = statistics.median(call.seconds(1) for _ in range(7))
                wall = call.wall_seconds()
                row = _row("workspace", f"{size // MIB} MB, {mode}", dtype, seconds)
                yield row | {"wall_ms": wall and wall * 1e3}
    finally:
        _workspace.WORKSPACE_BYTES = before
