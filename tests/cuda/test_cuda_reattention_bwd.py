"""The CUDA kernels of reattention's backward, emulated, against autograd of the plain formula in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from comparing import assert_within_budget
from test_cuda_reattention import Case as Inputs
from test_cuda_reattention import inputs_of, plain

from vitdiv_kernels._layout import accumulation_dtype
from vitdiv_kernels.ops.maps.reattention.function import Gradients, Needs

LOW = [torch.float16, torch.bfloat16]
DTYPES = [*LOW, torch.float32, torch.float64]


@dataclass(frozen=True)
class Case(Inputs):
    """What reaches the backward: the gradient of the output, that of the Gram matrix, or both."""

    given: str = "dout"
    images: int = 0  # of the coupling, if not one for each
    needs: str = ""  # "": all that there are

    def all_needs(self):
        if self.needs:
            return self.needs.split()
        needs = ["dq", "dk"]
        if "dout" in self.given:
            needs += ["dv", "dfolded_mix"] + (["dnorm"] if self.layer else [])
        return needs + (["dpre_mix"] if self.pre else [])

    def __str__(self):
        return "-".join([super().__str__(), *self.given.split(), *self.needs.split()])


OF = dict(
    dq="q", dk="k", dv="v", dpre_mix="pre_mix", dfolded_mix="mix", dfolded_bias="bias",
    dnorm_weight="norm_weight", dnorm_bias="norm_bias",
)  # fmt: skip


def cotangents_of(case, dtype):
    B, H, N, _, d = case.sizes
    dout = torch.randn(B, N, H, d, dtype=torch.float64).to(dtype).transpose(1, 2)
    dgram = torch.randn(case.images or B, H, H, dtype=torch.float64)
    dgram = dgram.to(accumulation_dtype(dout))
    return dout if "dout" in case.given else None, dgram if "dgram" in case.given else None


def plain_gradients(dtype, inputs, dout, dgram):
    kinds = {name: x for name, x in inputs.items() if torch.is_tensor(x)}
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in kinds.items()}
    out, gram = plain(dtype, **(inputs | leaves))
    total = 0
    if dout is not None:
        total = total + (out * dout.to(dtype)).sum()
    if dgram is not None:
        total = total + (gram * dgram.to(dtype)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, gradients, strict=True))


def run(emulator, inputs, dout, dgram, needs):
    """Gradients by name, of those that `needs` names."""
    coupling = None if dgram is None else dgram + dgram.mT
    wanted = [name in needs for name in Needs._fields]
    found = Gradients(*emulator.reattention_bwd(dout, coupling, *inputs.values(), wanted))
    return {name: x for name, x in found._asdict().items() if x.shape != (0,)}


def check(emulator, case, dtype, change=None):
    inputs = inputs_of(case, dtype)
    if change is not None:
        inputs = change(inputs)
    dout, dgram = cotangents_of(case, dtype)
    got = run(emulator, inputs, dout, dgram, case.all_needs())
    rough = plain_gradients(dtype, inputs, dout, dgram)
    truth = plain_gradients(torch.float64, inputs, dout, dgram)
    assert got
    for name, gradient in got.items():
        expected = truth.get(OF[name])
        if expected is None:  # there is no bias
            assert gradient.isfinite().all()
            continue
        scale = max(expected.abs().max().item(), 1e-9)
        assert_within_budget(gradient, rough[OF[name]], expected, dtype, name, scale=scale)
    return got


def assert_close(got, inputs, dout, dgram, tolerance):
    """Relative to the largest element of each gradient, whatever the plain formula makes of it."""
    truth = plain_gradients(torch.float64, inputs, dout, dgram)
    for name, x in got.items():
        expected = truth[OF[name]]
        assert (x.double() - expected).abs().max() < tolerance * expected.abs().max(), name


SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 2, 3, 16),
    (2, 6, 17, 33, 33),
    (1, 12, 40, 70, 35),
    (1, 16, 17, 40, 64),
    (1, 24, 5, 17, 16),
    (1, 4, 37, 65, 128),
]
GRID = [
    Case(
        sizes, pre=("", "mix and bias", "mix")[(i + j) % 3], bias=i % 2 == 0, centred=(i + j) % 2 == 0,
        layer=j == 1, given=("dout dgram", "dout", "dgram")[(i // 2 + 2 * j) % 3],
    )
    for i, sizes in enumerate(SIZES)
    for j in range(2)
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_backward(emulator, case, dtype):
    check(emulator, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "needs",
    ["dq", "dk", "dv", "dpre_mix", "dfolded_mix", "dnorm", "dv dfolded_mix", "dk dnorm", "dq dv dpre_mix"],
)
def test_only_gradients_that_are_needed(emulator, needs, dtype):
    for layer in (True,) if "dnorm" in needs else (False, True):
        case = Case((2, 3, 18, 21, 16), pre="mix", layer=layer, given="dout dgram", needs=needs)
        assert len(check(emulator, case, dtype)) == len(needs.split()) + needs.count(
            "dfolded_mix"
        ) + needs.count("dnorm")


@pytest.mark.parametrize(
    ("H", "dtype", "pre"),
    [(12, torch.float16, ""), (6, torch.bfloat16, "mix"), (3, torch.float32, "mix"), (2, torch.float64, "")],
)
def test_backward_at_the_length_of_an_image_of_224_pixels(emulator, H, dtype, pre):
    given = "dout" if pre else "dout dgram"
    check(emulator, Case((1, H, 197, 197, 64), pre=pre, layer=bool(pre), given=given), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "M"), [(1, 600), (130, 3)])
def test_many_more_keys_than_queries_or_fewer(emulator, N, M, dtype):
    check(emulator, Case((1, 3, N, M, 24), centred=True, given="dout dgram"), dtype)


def test_rows_that_do_not_fit_are_made_in_chunks(emulator):
    """The same numbers as of whole rows, which need more shared memory."""
    for case, dtype in [
        (Case((1, 12, 17, 197, 64), pre="mix", layer=True, given="dout dgram"), torch.bfloat16),
        (Case((1, 12, 17, 197, 64), layer=True), torch.float16),
        (Case((1, 6, 17, 197, 64), given="dout dgram"), torch.float64),
    ]:
        emulator.configure(architecture=89 if dtype != torch.float64 else 90)
        check(emulator, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"pre": "mix and bias", "layer": True}], ids=["plain", "all"])
@pytest.mark.parametrize("images", [2, 1, 0])
def test_the_workspace_holds_some_images_or_rows_of_one(emulator, images, options, dtype):
    """Two of three images at a time, one, or 16 rows of one, whose dk and dv grow."""
    case = Case((3, 3, 37, 40, 20), given="dout dgram", **options)
    planes = 3 if case.pre and dtype in LOW else 2
    row = planes * 3 * 48 * dtype.itemsize
    emulator.configure(workspace=37 * images * row if images else 20 * row)
    check(emulator, case, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("where", ["q", "dout"])
def test_rows_that_share_a_tile_spoil_no_other(emulator, where, dtype):
    """Of query rows with what is not finite, and of others as without them."""
    case = Case((1, 3, 12, 20, 16), given="dout", needs="dq")
    inputs, (dout, _) = inputs_of(case, dtype), cotangents_of(case, dtype)
    expected = run(emulator, inputs, dout, None, ["dq"])["dq"]
    (inputs | {"dout": dout})[where][0, 1, 5, 2] = float("nan")
    got = run(emulator, inputs, dout, None, ["dq"])["dq"]
    others = [i for i in range(12) if i != 5]
    assert torch.equal(got[:, :, others], expected[:, :, others])
    heads = [1] if where == "q" else [0, 1, 2]
    assert got[:, heads, 5].isnan().all()
    assert where == "dout" or torch.equal(got[:, [0, 2], 5], expected[:, [0, 2], 5])


@pytest.mark.parametrize(("H", "M", "dtype"), [(12, 577, torch.float16), (6, 1025, torch.bfloat16)])
def test_rows_of_larger_images(emulator, H, M, dtype):
    check(emulator, Case((1, H, 17, M, 64), centred=True, given="dout dgram"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs", ["", "dv"])
def test_layer_norm_without_eps(emulator, needs, dtype):
    """Of queries and keys that are not there it divides by zero; they must add nothing."""
    sizes = (1, 3, 18, 8, 16)  # 1/8 is exact: nothing stands beside the mixed maps
    check(emulator, Case(sizes, bias=False, centred=True, layer=True, eps=0.0, needs=needs), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", [80, 89])
def test_gpus_with_less_shared_memory(emulator, architecture, dtype):
    emulator.configure(architecture=architecture)
    H = {torch.float64: (16, 6), torch.float32: (32, 16)}.get(dtype, (32, 16))[architecture == 89]
    check(emulator, Case((1, H, 3, 40, 128), pre="mix", layer=True), dtype)


@pytest.mark.parametrize("given", ["dout", "dgram"])
def test_as_many_heads_as_may_be_in_float64(emulator, given):
    check(emulator, Case((1, 32, 5, 17, 64), pre="mix and bias", layer=True, given=given), torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pre", ["", "mix and bias"])
def test_any_schedule_gives_the_same_bits(emulator, pre, dtype):
    case = Case((2, 6, 40, 70, 33), pre=pre, layer=True, given="dout dgram")
    inputs, cotangents = inputs_of(case, dtype), cotangents_of(case, dtype)
    expected = run(emulator, inputs, *cotangents, case.all_needs())
    for order, seed in [("reverse", 0), *(("random", seed) for seed in range(3))]:
        emulator.configure(order, seed)
        got = run(emulator, inputs, *cotangents, case.all_needs())
        assert all(torch.equal(got[name], x) for name, x in expected.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pre", ["", "mix and bias"])
def test_extreme_logits(emulator, pre, dtype):
    """Logits of 1e4: one-hot maps, no overflow."""
    large = 1e3 if dtype == torch.float16 else 3e3  # those of the plain formula in float16 are below 65504
    case = Case((1, 3, 17, 33, 16), pre=pre)
    inputs = inputs_of(case, dtype)
    inputs |= {"q": large * inputs["q"], "scale": 1.0}
    dout, _ = cotangents_of(case, dtype)
    got = run(emulator, inputs, dout, None, case.all_needs())
    truth = plain_gradients(torch.float64, inputs, dout, None)
    assert all(x.isfinite().all() for x in got.values())
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-2}.get(dtype, 0.1)
    for name in ("dv", "dfolded_mix"):
        assert (got[name] - truth[OF[name]]).abs().max() < tolerance * truth[OF[name]].abs().max()


def maps_and_terms(inputs, dout):
    """The maps, and for gradients beyond the softmax the largest sum of their terms' absolute values."""
    inputs = {name: x.double() if torch.is_tensor(x) else x for name, x in inputs.items()}
    q, k, v, scale, pre_mix, pre_bias = list(inputs.values())[:6]
    products = scale * q @ k.mT
    logits = products
    if pre_mix is not None:
        logits = torch.einsum("gh,bhij->bgij", pre_mix, products) + pre_bias[:, None, None]
    maps = logits.softmax(-1)
    da = torch.einsum("gh,bgij->bhij", inputs["mix"].abs(), dout.double().abs() @ v.abs().mT)
    dl = maps * (da + (maps * da).sum(-1, keepdim=True))
    dz = dl if pre_mix is None else torch.einsum("gh,bgij->bhij", pre_mix.abs(), dl)
    sums = {
        "dq": scale * dz @ k.abs(), "dk": scale * dz.mT @ q.abs(),
        "dpre_mix": torch.einsum("bgij,bhij->gh", dl, products.abs()),
    }  # fmt: skip
    return maps, {name: x.max() for name, x in sums.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pre", ["", "mix and bias"])
def test_nearly_one_hot_maps(emulator, pre, dtype, seed):
    """dL is next to nothing, of terms that are not, and queries are large: by the size of the terms."""
    torch.manual_seed(seed)
    case = Case((1, 3, 17, 33, 16), pre=pre)
    inputs = inputs_of(case, dtype)
    inputs["q"] = 3e3 * inputs["q"]
    dout, _ = cotangents_of(case, dtype)
    maps, _ = maps_and_terms(inputs, dout)
    certain = (maps.amax(-1) > 1 - 1e-6).all(1)  # where two keys are as good, maps hang on a logit's rounding
    dout = dout * certain[:, None, :, None]
    _, terms = maps_and_terms(inputs, dout)
    got = run(emulator, inputs, dout, None, case.all_needs())
    truth = plain_gradients(torch.float64, inputs, dout, None)
    for name, x in got.items():
        exact = terms.get(name, 16 * truth[OF[name]].abs().max())
        assert (x.double() - truth[OF[name]]).abs().max() < torch.finfo(dtype).eps * exact, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_and_large_cotangents(emulator, dtype):
    """float16 keeps the gradient of the logits in units of its own, however small the Gram matrix's part."""
    for given, factor in [("dgram", 1e-6), ("dgram", 1e4), ("dout", 2.0**-10), ("dout", 64.0)]:
        case = Case((1, 3, 17, 33, 16), given=given, needs="dq dk")
        inputs = inputs_of(case, dtype)
        dout, dgram = (None if x is None else x * factor for x in cotangents_of(case, dtype))
        got = run(emulator, inputs, dout, dgram, case.all_needs())
        truth = plain_gradients(torch.float64, inputs, dout, dgram)
        tolerance = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 1e-2)
        for name, x in got.items():
            error = (x.double() - truth[OF[name]]).abs().max().item()
            tiny = 2.0**-24 if dtype == torch.float16 else 0  # what the outputs can hold
            assert error < tolerance * truth[OF[name]].abs().max().item() + tiny, (given, factor, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_with_a_large_cotangent(emulator, dtype):
    """By key the units of float16 come from the queries of all tiles, more than a warp has lanes."""
    case = Case((1, 2, 530, 3, 16), needs="dk dpre_mix", pre="mix")
    inputs = inputs_of(case, dtype)
    dout = cotangents_of(case, dtype)[0] * 2.0**-6
    dout[:, :, -1] *= 2.0**16
    got = run(emulator, inputs, dout, None, case.all_needs())
    assert_close(got, inputs, dout, None, {torch.float64: 1e-11, torch.float32: 1e-4}.get(dtype, 1e-2))


@pytest.mark.parametrize("large", ["mean", "mixed"])
def test_the_largest_gradients_of_logits(emulator, large):
    """float16's units leave room for a row's mean of dA by A, and for what dL becomes by mixing."""
    H = 16 if large == "mixed" else 3
    case = Case((1, H, 17, 33, 16), pre="mix" if large == "mixed" else "", scale=1.0, needs="dq dk")
    inputs = inputs_of(case, torch.float16) | {"mix": torch.eye(H)}
    q, k, v, dout = inputs["q"], inputs["k"], inputs["v"], torch.ones(1, H, 17, 16).half()
    k[:], q[:] = 0, 1
    if large == "mixed":  # two keys pull with the same strength in opposite directions, for all heads
        inputs["pre_mix"][:] = 1 / H
        k[:, :, 0, 1] = k[:, :, 1, 2] = 0.5
        k[:, :, 2:] = -2
        v[:] = v[:, :1, :1]
        v[:, :, 1] = -v[:, :, 0]
    else:  # half of the attention is on a key without value, the rest on 32 that are alike
        k[:, :, 0, 0] = 3.47
        v[:] = 1
        v[:, :, 0] = 0
    got = run(emulator, inputs, dout, None, case.all_needs())
    assert_close(got, inputs, dout, None, 1e-2)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("which", ["mix", "dgram"])
def test_large_entries_that_cancel_over_heads(emulator, which, dtype):
    """Heads that are all alike, as in a collapsed model: the low parts of the matrices are what is left."""
    H, large = 6, 1e2 if dtype == torch.bfloat16 and which == "mix" else 1e3
    case = Case((1, H, 17, 33, 16), bias=False)
    inputs, (dout, dgram) = inputs_of(case, dtype), cotangents_of(replace(case, given="dout dgram"), dtype)
    for x in inputs["q"], inputs["k"], inputs["v"], dout:
        x[:] = x[:, :1]
    matrix = large * torch.randn(H, H, dtype=torch.float64)
    matrix = matrix - matrix.mean(0)
    matrix = matrix - matrix.mean(1, keepdim=True) + 1 / H  # rows and columns have sums of 1
    needs = ["dq", "dk"]
    if which == "dgram":
        dout, dgram = None, ((matrix + matrix.mT) / 2).float()[None]
    else:
        dgram, inputs["mix"] = None, matrix.float()
        needs.append("dv")
    got = run(emulator, inputs, dout, dgram, needs)
    assert_close(got, inputs, dout, dgram, 2e-2)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_values_with_a_large_offset(emulator, dtype):
    """Rounded maps do not sum to 1, and the mean of dA by them must not lack what they lack."""
    case = Case((1, 3, 17, 33, 16), bias=False, scale=1.0, needs="dq dk")
    inputs = inputs_of(case, dtype) | {"mix": torch.eye(3)}
    dout = torch.zeros(1, 3, 17, 16).to(dtype)
    dout[..., 0] = 1
    largest = 2047 if dtype == torch.float16 else 255  # with its predecessor exact in dA
    inputs["v"][..., 0] = largest - torch.randint(0, 2, (1, 3, 33))
    got = run(emulator, inputs, dout, None, case.all_needs())
    assert_close(got, inputs, dout, None, 2e-2)


@pytest.mark.parametrize("images", [1, 2])
def test_one_coupling_for_all_images(emulator, images):
    check(emulator, Case((2, 3, 18, 21, 16), given="dout dgram", images=images), torch.float32)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout", "mix"])
def test_nan_and_inf_propagate(emulator, where, poison):
    """What the plain formula spoils is spoilt, image by image."""
    case = Case((3, 3, 9, 11, 16), layer=True, given="dout dgram")
    inputs = inputs_of(case, torch.float32)
    dout, dgram = cotangents_of(case, torch.float32)
    poisoned = (inputs | {"dout": dout})[where]
    poisoned[(1, 1, *(0, 0)[: poisoned.dim() - 2])] = poison
    got = run(emulator, inputs, dout, dgram, case.all_needs())
    truth = plain_gradients(torch.float32, inputs, dout, dgram)
    for name, x in got.items():
        spoilt = (~truth[OF[name]].isfinite()).flatten(1 if x.dim() == 4 else 0).any(-1)
        assert torch.equal((~x.isfinite()).flatten(1 if x.dim() == 4 else 0).any(-1), spoilt), name


def test_what_does_not_fit_is_refused(emulator):
    emulator.configure(architecture=89)
    case = Case((1, 1, 3, 3, 512))
    message = "backward of heads of width 512 does not fit the shared memory of this GPU, 101376"
    with pytest.raises(ValueError, match=message):
        check(emulator, case, torch.float64)
    with pytest.raises(ValueError, match="at most 32 heads, got 33"):
        check(emulator, Case((1, 33, 3, 3, 8)), torch.float16)


def test_an_empty_batch_has_no_gradient(emulator):
    case = Case((0, 3, 9, 11, 16), pre="mix", layer=True)
    got = run(emulator, inputs_of(case, torch.float32), *cotangents_of(case, torch.float32), case.all_needs())
    assert got["dq"].shape == (0, 3, 9, 16)
    assert all(not x.any() for name, x in got.items() if name.startswith(("dp", "dm", "db", "dn")))


def test_shared_memory_is_read_without_bank_conflicts(emulator):
    case = Case((1, 12, 64, 64, 64), given="dout dgram")
    inputs, cotangents = inputs_of(case, torch.float16), cotangents_of(case, torch.float16)
    with emulator.counting() as counts:
        run(emulator, inputs, *cotangents, case.all_needs())
    # four matrices each; the zeros that stand for absent heads meet the banks of one present head
    assert counts["ldmatrix_rounds"] < 4.2 * counts["ldmatrix"]
