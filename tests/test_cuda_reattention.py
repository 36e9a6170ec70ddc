"""The CUDA kernels of reattention, emulated, against the plain formula in float64."""

from dataclasses import dataclass, replace

import emulated_cuda
import pytest
import torch
import torch.nn.functional as F
from comparing import assert_within_budget

from vitdiv_kernels.ops._layout import accumulation_dtype

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def emulator():
    return emulated_cuda.Emulator()


@pytest.fixture(autouse=True)
def usual_schedule(emulator):
    emulator.configure()


@dataclass(frozen=True)
class Case:
    """Sizes, and which of the optional arguments are given."""

    sizes: tuple = (1, 3, 18, 21, 16)  # B, H, N, M, d
    pre: str = ""  # "", "mix" or "mix and bias"
    bias: bool = True
    centred: bool = False
    layer: bool = False
    scale: float = 0.3
    width: int = 0  # of the values, if not d
    needs: str = "out gram"

    def __str__(self):
        flags = [name for name in ("bias", "centred", "layer") if getattr(self, name)]
        return "-".join(["x".join(map(str, self.sizes)), *flags, *self.pre.split(), *self.needs.split()])


def inputs_of(case, dtype):
    """The operator's arguments by name; queries, keys and values are views of packed projections."""
    B, H, N, M, d = case.sizes
    acc = accumulation_dtype(torch.empty(0, dtype=dtype))

    def normal(*shape, kind=acc, mean=0.0, spread=1.0):
        return (mean + spread * torch.randn(*shape, dtype=torch.float64)).to(kind)

    q = normal(B, N, H, d, kind=dtype).transpose(1, 2)
    packed = normal(B, M, 2, H, max(d, case.width), kind=dtype).permute(2, 0, 3, 1, 4)
    return dict(
        q=q, k=packed[0][..., :d], v=packed[1][..., : case.width or d], scale=case.scale,
        pre_mix=normal(H, H, spread=H**-0.5) if case.pre else None,
        pre_bias=normal(H) if case.pre == "mix and bias" else None,
        mix=normal(H, H, spread=H**-0.5), bias=normal(H, spread=0.1) if case.bias else None,
        centred=case.centred, norm_weight=normal(H, mean=1.0, spread=0.3) if case.layer else None,
        norm_bias=normal(H, spread=0.3) if case.layer else None, eps=1e-5,
    )  # fmt: skip


def plain(dtype, *, q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps):
    """Output and centred Gram matrix, in `dtype`."""

    def to(tensor):
        return None if tensor is None else tensor.to(dtype)

    def over_heads(maps, weight, bias):
        return F.conv2d(maps, to(weight)[:, :, None, None], to(bias))

    logits = to(q) @ to(k).mT * scale
    if pre_mix is not None:
        logits = over_heads(logits, pre_mix, pre_bias)
    maps = logits.softmax(-1)
    deviation = maps - 1 / k.shape[2]
    mixed = over_heads(deviation if centred else maps, mix, bias)
    if norm_weight is not None:
        heads_last = mixed.permute(0, 2, 3, 1)
        mixed = F.layer_norm(heads_last, mix.shape[:1], to(norm_weight), to(norm_bias), eps).permute(
            0, 3, 1, 2
        )
    return mixed @ to(v), torch.einsum("bgij,bhij->bgh", deviation, deviation)


def run(emulator, inputs, needs="out gram"):
    return emulator.reattention_fwd(*inputs.values(), needs_out="out" in needs, needs_gram="gram" in needs)


def check(emulator, case, dtype, change=None):
    inputs = inputs_of(case, dtype)
    if change is not None:
        inputs = change(inputs)
    out, gram = run(emulator, inputs, case.needs)
    rough, truth = plain(dtype, **inputs), plain(torch.float64, **inputs)
    if "out" in case.needs:
        assert_within_budget(out, rough[0], truth[0], dtype, "out")
    else:
        assert out is None
    if "gram" in case.needs:
        # rounding of the maps is seen in the Gram matrix of uncentred ones
        scale = max(truth[1].abs().max().item(), 1e-6 * case.sizes[2] / case.sizes[3])
        assert_within_budget(gram, rough[1], truth[1], dtype, "gram", scale=scale)
    else:
        assert gram is None
    return out, gram


SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 2, 3, 16),
    (1, 6, 17, 33, 33),
    (1, 12, 40, 70, 35),
    (1, 16, 17, 40, 64),
    (1, 24, 5, 17, 16),
    (1, 4, 37, 65, 128),
]
GRID = [
    Case(
        sizes, pre=("", "mix and bias", "mix")[(i + j) % 3], bias=i % 2 == 0, centred=(i + j) % 2 == 0,
        layer=j == 1, needs=("out gram", "out", "gram")[(i // 2 + j) % 3],
    )
    for i, sizes in enumerate(SIZES)
    for j in range(2)
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_forward(emulator, case, dtype):
    check(emulator, case, dtype)
