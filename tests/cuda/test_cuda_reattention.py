"""The CUDA kernels of reattention, emulated, against the plain formula in float64."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_within_budget
from emulation_build import output_of

from vitdiv_kernels._layout import accumulation_dtype

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@dataclass(frozen=True)
class Case:
    """Sizes, and which of the optional arguments are given."""

    sizes: tuple = (1, 3, 18, 21, 16)  # B, H, N, M, d
    pre: str = ""  # "", "mix" or "mix and bias"
    bias: bool = True
    centred: bool = False
    layer: bool = False
    scale: float = 0.3
    eps: float = 1e-5
    needs: str = "out gram"

    def __str__(self):
        flags = [name for name in ("bias", "centred", "layer") if getattr(self, name)]
        return "-".join(["x".join(map(str, self.sizes)), *flags, *self.pre.split(), *self.needs.split()])


def inputs_of(case, dtype):
    """The operator's arguments by name; queries, keys and values have strides of their own."""
    B, H, N, M, d = case.sizes
    acc = accumulation_dtype(torch.empty(0, dtype=dtype))

    def normal(*shape, kind=acc, mean=0.0, spread=1.0):
        return (mean + spread * torch.randn(*shape, dtype=torch.float64)).to(kind)

    q = normal(B, N, H, d, kind=dtype).transpose(1, 2)
    packed = normal(B, M, 2, H, d, kind=dtype).permute(2, 0, 3, 1, 4)
    return dict(
        q=q, k=packed[0], v=packed[1].contiguous(), scale=case.scale,
        pre_mix=normal(H, H, spread=H**-0.5) if case.pre else None,
        pre_bias=normal(H) if case.pre == "mix and bias" else None,
        mix=normal(H, H, spread=H**-0.5), bias=normal(H, spread=0.1) if case.bias else None,
        centred=case.centred, norm_weight=normal(H, mean=1.0, spread=0.3) if case.layer else None,
        norm_bias=normal(H, spread=0.3) if case.layer else None, eps=case.eps,
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
        assert out.shape == (0,)
    if "gram" in case.needs:
        # rounding of the maps is seen in the Gram matrix of uncentred ones
        scale = max(truth[1].abs().max().item(), 1e-6 * case.sizes[2] / case.sizes[3])
        assert_within_budget(gram, rough[1], truth[1], dtype, "gram", scale=scale)
    else:
        assert gram.shape == (0,)
    return out, gram


SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 2, 3, 16),
    (2, 6, 17, 150, 33),
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


LOW = [torch.float16, torch.bfloat16]
# Shapes whose mixed maps stay in registers: one to four parts of the heads, even ones and others; rows of a
# block that are not there; keys that are not there.
IN_REGISTERS = [
    Case(sizes, bias=i % 2 == 0, centred=i % 3 == 1, needs="out")
    for i, sizes in enumerate(
        [
            (1, 1, 1, 1, 32), (2, 3, 18, 21, 64), (1, 4, 49, 40, 48), (1, 6, 97, 33, 64), (2, 7, 17, 5, 32),
            (1, 9, 20, 40, 48), (1, 10, 33, 50, 64), (1, 12, 50, 48, 32), (1, 12, 70, 35, 64),
            (1, 16, 5, 65, 48), (1, 24, 17, 18, 32),
        ]
    )
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_forward(emulator, case, dtype):
    check(emulator, case, dtype)


@pytest.mark.parametrize("architecture", [80, 89, 90])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", IN_REGISTERS, ids=str)
def test_forward_in_registers(emulator, case, dtype, architecture):
    emulator.configure(architecture=architecture)
    check(emulator, case, dtype)


@pytest.mark.parametrize(("H", "d"), [(3, 64), (6, 64), (12, 64), (12, 32), (4, 48)])
@pytest.mark.parametrize("more", ["", "gram", "layer", "pre", "float32", "unaligned"])
def test_which_calls_mix_in_registers(emulator, H, d, more):
    """There tensor cores multiply with the keys, twice, and with the values, and nothing else."""
    case = Case((1, H, 48, 48, d), "mix" if more == "pre" else "", layer=more == "layer", needs=f"out {more}")
    inputs = inputs_of(case, torch.float32 if more == "float32" else torch.bfloat16)
    if more == "unaligned":
        inputs["q"] = F.pad(inputs["q"], (1, 0))[..., 1:]
    with emulator.counting() as counts:
        run(emulator, inputs, case.needs)
    # softmax_rows takes rows 32 by 32
    alone = 3 * H * (d // 16) * 2 * (4 + 3 + 3)
    assert counts["mma"] > alone if more else counts["mma"] == alone


@pytest.mark.parametrize("H", [12, 6, 3])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_images_of_224_pixels_in_registers(emulator, H, dtype):
    check(emulator, Case((1, H, 197, 197, 64), bias=False, needs="out"), dtype)


@pytest.mark.parametrize("d", [32, 48, 64])
@pytest.mark.parametrize("architecture", [80, 90])
def test_any_schedule_gives_the_same_bits_in_registers(emulator, architecture, d):
    emulator.configure(architecture=architecture)
    inputs = inputs_of(Case((2, 12, 50, 40, d)), torch.bfloat16)
    expected = run(emulator, inputs, "out")[0]
    for order, seed in [("reverse", 0), *(("random", seed) for seed in range(2))]:
        emulator.configure(order, seed)
        assert torch.equal(run(emulator, inputs, "out")[0], expected)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_extreme_logits_in_registers(emulator, scale, dtype):
    large = 1e3 if dtype == torch.float16 else 3e3
    case = Case((1, 4, 17, 33, 32), needs="out")
    check(emulator, case, dtype, lambda x: x | {"q": large * x["q"], "scale": scale})


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("larger", "by", "scale"), [("mix", 4096, 1e-3), ("v", 4096, 1e-5), ("mix", 1e-12, 0.3)]
)
def test_nearly_uniform_maps_in_registers(emulator, larger, by, scale, dtype):
    case = Case((1, 3, 33, 65, 32), centred=True, scale=scale, bias=False, needs="out")
    inputs = inputs_of(case, dtype)
    inputs[larger] *= by
    out, truth = run(emulator, inputs, "out")[0], plain(torch.float64, **inputs)[0]
    if larger == "mix" and dtype == torch.float16 and by < 1:  # below its range
        assert not out.any()
    else:
        assert (out.double() - truth).abs().max() < 1e-2 * truth.abs().max()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "mix", "bias"])
def test_nan_and_inf_propagate_in_registers(emulator, where, poison):
    inputs = inputs_of(Case((3, 4, 50, 20, 32)), torch.bfloat16)
    inputs["v"][:, :, 0] = -inputs["v"][:, :, 1]
    inputs[where][{"mix": (1, 0), "bias": (1,)}.get(where, (1, 1, 3, 5))] = poison
    got, truth = run(emulator, inputs, "out")[0], plain(torch.bfloat16, **inputs)[0]
    assert torch.equal(got.isfinite(), truth.isfinite())
    assert torch.equal(got.isnan(), truth.isnan())


def test_plans_keep_warps_busy():
    """Three quarters of a block's warps make maps, and a chunk has keys that travel while others are
    multiplied; but for float64 where a block has 99 KB."""
    plans = output_of("plans.cpp")
    assert len(plans) == 90
    for number, *numbers in plans:
        kilobytes, heads, _, warps, workers, chunk, slices, buffers = map(int, numbers)
        if (number, kilobytes) != ("float64", 99):
            assert 4 * workers >= 3 * warps
            assert chunk >= 32
        # slices make all maps again: none where registers hold the output of all heads
        if number == "float16" and heads <= 12 and kilobytes > 99:
            assert slices == 1
            assert buffers >= 1


@pytest.mark.parametrize(
    ("H", "dtype", "pre"),
    [(12, torch.float16, ""), (6, torch.bfloat16, "mix"), (3, torch.float32, "mix"), (2, torch.float64, "")],
)
def test_forward_at_the_length_of_an_image_of_224_pixels(emulator, H, dtype, pre):
    check(emulator, Case((1, H, 197, 197, 64), pre=pre, layer=pre == "mix", centred=pre == ""), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_more_keys_than_queries(emulator, dtype):
    check(emulator, Case((1, 3, 1, 1025, 24), centred=True), dtype)


@pytest.mark.parametrize(("H", "M", "dtype"), [(12, 577, torch.float16), (6, 1025, torch.bfloat16)])
def test_rows_of_larger_images(emulator, H, M, dtype):
    check(emulator, Case((1, H, 33, M, 64), centred=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_without_eps(emulator, dtype):
    """Of keys that are not there it divides by zero; they must add nothing."""
    check(emulator, Case((1, 3, 18, 21, 16), bias=False, centred=True, layer=True, eps=0.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", [80, 89])
def test_gpus_with_less_shared_memory(emulator, architecture, dtype):
    emulator.configure(architecture=architecture)
    H = {80: 32, 89: 16}[architecture] // (4 if dtype == torch.float64 else 1)
    check(emulator, Case((1, H, 3, 40, 128), pre="mix", layer=True), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("pre", ["", "mix and bias"])
def test_any_schedule_gives_the_same_bits(emulator, pre, dtype):
    inputs = inputs_of(Case((2, 5, 40, 140, 33), pre=pre, layer=True), dtype)
    expected = run(emulator, inputs)
    for order, seed in [("reverse", 0), *(("random", seed) for seed in range(3))]:
        emulator.configure(order, seed)
        assert all(torch.equal(got, x) for got, x in zip(run(emulator, inputs), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pre", ["", "mix and bias"])
def test_extreme_logits(emulator, pre, dtype):
    """Logits of 1e4: one-hot maps, no overflow."""
    large = 1e3 if dtype == torch.float16 else 3e3  # those of the plain formula in float16 are below 65504
    check(
        emulator, Case((1, 3, 17, 33, 16), pre=pre), dtype, lambda x: x | {"q": large * x["q"], "scale": 1.0}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("larger", "scale"), [("mix", 1e-3), ("v", 1e-5)])
def test_nearly_uniform_maps(emulator, larger, scale, dtype):
    """Batch norm multiplies what is left of centred maps; without it their mix is below float16's range."""
    inputs = inputs_of(Case((1, 3, 33, 65, 16), centred=True, scale=scale, bias=False), dtype)
    inputs[larger] *= 4096
    tolerance = {torch.float64: 1e-14 / scale, torch.float32: min(1e-6 / scale, 1e-2)}.get(dtype, 1e-2)
    for got, truth in zip(run(emulator, inputs), plain(torch.float64, **inputs), strict=True):
        assert (got.double() - truth).abs().max() < tolerance * truth.abs().max()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "mix", "bias"])
def test_nan_and_inf_propagate(emulator, where, poison):
    """What the plain formula spoils is spoilt, element by element."""
    inputs = inputs_of(Case((3, 3, 9, 11, 16)), torch.float32)
    inputs["v"][:, :, 0] = -inputs["v"][:, :, 1]  # both signs in each column: Inf times them is NaN
    inputs[where][{"mix": (1, 0), "bias": (1,)}.get(where, (1, 1, 3, 5))] = poison
    got, gram = run(emulator, inputs)
    truth, gram_truth = plain(torch.float32, **inputs)
    assert torch.equal(got.isfinite(), truth.isfinite())
    assert torch.equal(got.isnan(), truth.isnan())
    assert torch.equal(gram.isfinite(), gram_truth.isfinite())


def test_what_does_not_fit_is_refused(emulator):
    emulator.configure(architecture=89)
    message = "32 heads of width 128 do not fit the shared memory of this GPU, 101376"
    with pytest.raises(ValueError, match=message):
        run(emulator, inputs_of(Case((1, 32, 3, 3, 128)), torch.float64))
    with pytest.raises(ValueError, match="heads of width 512 do not fit"):  # the rows' statistics do not
        run(emulator, inputs_of(Case((1, 1, 3, 3, 512)), torch.float16))
    with pytest.raises(ValueError, match="at most 32 heads, got 33"):
        run(emulator, inputs_of(Case((1, 33, 3, 3, 8)), torch.float16))


def test_an_empty_batch_launches_nothing(emulator):
    with emulator.counting() as counts:
        out, gram = run(emulator, inputs_of(Case((0, 3, 9, 11, 16)), torch.float32))
    assert out.shape == (0, 3, 9, 16)
    assert gram.shape == (0, 3, 3)
    assert counts["launches"] == 0


def test_shared_memory_is_read_without_bank_conflicts(emulator):
    inputs = inputs_of(Case((1, 12, 197, 197, 64)), torch.float16)
    with emulator.counting() as counts:
        run(emulator, inputs)
    # four matrices each; the zeros that stand for absent heads meet the banks of one present head
    assert counts["ldmatrix_rounds"] < 4.25 * counts["ldmatrix"]
