"""The streaming schedule of re-attention in Triton, whichever schedule the table takes: tiles, folds,
layouts."""

import importlib.util

import pytest
import torch
from comparing import assert_within_budget

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import interpreter_arithmetic
import interpreter_checks
import interpreter_speed

from vitdiv_kernels.ops import _launch as _triton
from vitdiv_kernels.ops.maps._triton import heads as _triton_heads
from vitdiv_kernels.ops.maps._triton import tiles as _triton_tiles
from vitdiv_kernels.ops.maps.reattention import triton_kernels
from vitdiv_kernels.ops.maps.reattention.triton_kernels import streaming

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if _triton.INTERPRETED:
    interpreter_checks.install()
    interpreter_arithmetic.install()
    interpreter_speed.install()
pytestmark = pytest.mark.skipif(
    not (ON_GPU or _triton.INTERPRETED), reason="needs a GPU, or TRITON_INTERPRET=1 before Triton is imported"
)
# the tables have no tile for float64, the interpreter needs none
DTYPE = torch.float64 if _triton.INTERPRETED else torch.float32
NAMES = ("out", "gram", "dq", "dk", "dv", "dpre_mix", "dmix", "dbias", "dnorm_weight", "dnorm_bias")


def inputs_of(sizes, dtype=DTYPE, pre=False, layer=False, bias=True, centred=False):
    """(dout, coupling, the operators' arguments from q to eps)."""
    images, heads, queries, keys, width = sizes

    def normal(*shape, spread=1.0, kind=None):
        x = spread * torch.randn(*shape, dtype=torch.float64)
        return x.to(DEVICE, kind or (torch.float64 if dtype == torch.float64 else torch.float32))

    q, dout = normal(images, queries, 2, heads, width, kind=dtype).permute(2, 0, 3, 1, 4)
    k, v = normal(images, keys, 2, heads, width, kind=dtype).permute(2, 0, 3, 1, 4)
    matrix = (heads, heads)
    coupling = normal(images, *matrix)
    return (
        dout,
        coupling + coupling.mT,
        (
            q, k, v, 0.3,
            normal(*matrix, spread=heads**-0.5) if pre else None, normal(heads) if pre else None,
            normal(*matrix, spread=heads**-0.5), normal(heads, spread=0.1) if bias else None, centred,
            1 + normal(heads, spread=0.3) if layer else None, normal(heads, spread=0.3) if layer else None,
            1e-5,
        ),
    )  # fmt: skip


def plain(q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps):
    """Output and centred Gram matrix by the formulas."""

    def mixed(weight, maps, bias):
        maps = torch.einsum("gh,bhij->bgij", weight, maps)
        return maps if bias is None else maps + bias[:, None, None]

    logits = scale * q @ k.mT
    if pre_mix is not None:
        logits = mixed(pre_mix, logits, pre_bias)
    maps = logits.softmax(-1)
    deviations = maps - 1 / maps.shape[3]
    out = mixed(mix, deviations if centred else maps, bias)
    if norm_weight is not None:
        out = torch.nn.functional.layer_norm(out.movedim(1, -1), mix.shape[:1], norm_weight, norm_bias, eps)
        out = out.movedim(-1, 1)
    return out @ v, torch.einsum("bgij,bhij->bgh", deviations, deviations)


def truth_of(dout, coupling, arguments):
    def leaf(x):
        return x.detach().double().requires_grad_() if torch.is_tensor(x) else x

    leaves = [leaf(x) for x in arguments]
    out, gram = plain(*leaves)
    # the coupling is the gradient of the Gram matrix plus its transpose
    loss = 0.5 * (gram * coupling.double()).sum()
    if dout is not None:
        loss = loss + (out * dout.double()).sum()
    q, k, v, _, pre_mix, _, mix, bias, _, norm_weight, norm_bias, _ = leaves
    wanted = [q, k, v, pre_mix, mix, bias, norm_weight, norm_bias]
    given = [x for x in wanted if x is not None]
    found = dict(zip(map(id, given), torch.autograd.grad(loss, given, allow_unused=True), strict=True))
    return out.detach(), gram.detach(), *(None if x is None else found[id(x)] for x in wanted)


def run(dout, coupling, arguments):
    has_dout = dout is not None
    pre, layer = arguments[4] is not None, arguments[9] is not None
    needs = [True, True, has_dout, pre, has_dout, layer and has_dout]
    return (
        *streaming.forward(*arguments, True, True),
        *streaming.backward(dout, coupling, *arguments, needs),
    )


def check(*given, dtype=DTYPE):
    truth, got = truth_of(*given), run(*given)
    for name, g, t in zip(NAMES, got, truth, strict=True):
        if t is None:
            assert g.numel() == 0 or name == "dbias"
        else:
            # ten times what a value off by rounding has: plain formulas in this dtype are in
            # test_reattention.py
            assert_within_budget(g, t, t, dtype, name, scale=10 * t.abs().max().item())
    return got


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 1, 3, 2, 16), {}),
        ((1, 2, 1, 17, 8), {"pre": True}),
        ((1, 3, 65, 17, 33), {"layer": True, "bias": False}),
        ((1, 6, 17, 65, 128), {"centred": True}),
        ((1, 12, 17, 33, 64), {"pre": True, "layer": True}),
        ((1, 24, 17, 19, 80), {"pre": True, "layer": True}),
    ],
    ids=str,
)
def test_all_heads_in_a_tile(sizes, options):
    extras = "pre" in options or "layer" in options
    if not _triton.INTERPRETED and sizes[1] > _triton_tiles.most_heads(DTYPE, extras):
        pytest.skip("the tables have no tile for so many heads")
    check(*inputs_of(sizes, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    check(*inputs_of((2, 6, 33, 17, 32), dtype, pre=True, layer=True), dtype=dtype)


def test_gradient_of_the_gram_alone():
    _, coupling, arguments = inputs_of((2, 3, 17, 19, 16), pre=True)
    check(None, coupling, arguments)


def test_one_hot_maps_have_no_gradient():
    """Logits of 1e4, whose last bit is 1e-3: keys and queries must see the same bits, or 1 is not 1."""
    torch.manual_seed(0)
    _, coupling, arguments = inputs_of((1, 3, 17, 19, 16), torch.float32)
    arguments[0].mul_(1e4)
    needs = [True, True, False, False, False, False]
    truth = truth_of(None, coupling, arguments)[2:4]
    for got, t, other in zip(
        streaming.backward(None, coupling, *arguments, needs)[:2], truth, arguments[1::-1], strict=True
    ):
        # what an error of 1e-5 of a map makes
        budget = 1e-5 * (coupling.abs().max() * other.abs().max()).item()
        assert t.abs().max() < budget
        torch.testing.assert_close(got.double(), t, rtol=0, atol=budget)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_lost_row_of_few_heads_loses_no_other(poison):
    """Few heads are mixed as a Kronecker product: its zeros times NaN must stay in the row of the maps."""
    _, _, arguments = inputs_of((1, 3, 33, 35, 16), torch.float32)
    arguments[0][0, 0, 5, 0] = poison
    out, _ = streaming.forward(*arguments, True, False)
    expected, _ = plain(*arguments)
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("wanted", range(6))
def test_only_what_is_needed(wanted):
    dout, coupling, arguments = inputs_of((1, 3, 17, 19, 16), pre=True, layer=True)
    every = streaming.backward(dout, coupling, *arguments, [True] * 6)
    needs = [i == wanted for i in range(6)]
    outputs_of = ((0,), (1,), (2,), (3,), (4, 5), (6, 7))
    for i, (got, expected) in enumerate(
        zip(streaming.backward(dout, coupling, *arguments, needs), every, strict=True)
    ):
        if i in outputs_of[wanted]:
            assert torch.equal(got, expected)
        else:
            assert got.numel() == 0


def test_the_same_bits_twice():
    given = inputs_of((2, 6, 33, 35, 16), torch.float32, pre=True, layer=True)
    assert all(torch.equal(a, b) for a, b in zip(run(*given), run(*given), strict=True))


def test_empty_batch():
    given = inputs_of((0, 3, 9, 11, 16), pre=True, layer=True)
    shapes = [tuple(x.shape) for x in run(*given)]
    assert shapes[0] == (0, 3, 9, 16)
    assert shapes[1] == (0, 3, 3)
    assert all(x.eq(0).all() for x in run(*given)[5:])


def test_small_coupling_in_float16():
    """The gradient of a mean over many maps is below float16's range until it meets the logits' gradient."""
    _, coupling, arguments = inputs_of((1, 3, 33, 35, 16), torch.float16)
    needs = [True, True, False, False, False, False]
    big = streaming.backward(None, coupling, *arguments, needs)
    small = streaming.backward(None, coupling * 2.0**-10, *arguments, needs)
    for a, b in zip(big[:2], small[:2], strict=True):
        torch.testing.assert_close(a * 2.0**-10, b, rtol=1e-2, atol=2e-7)


def test_views_are_read_in_place():
    """A packed projection's views, 16 elements a step; others are copied, their rows padded."""
    packed = torch.randn(2, 5, 3, 4, 32)
    for x in packed.permute(2, 0, 3, 1, 4):
        assert _triton_heads.aligned(x) is x
    odd = torch.randn(2, 4, 5, 33)
    padded = _triton_heads.aligned(odd)
    assert padded.shape == (2, 4, 5, 48)
    assert torch.equal(padded[..., :33], odd)
    assert padded[..., 33:].eq(0).all()


@pytest.mark.skipif(not _triton.INTERPRETED, reason="on a GPU the table has tiles that fit it")
@pytest.mark.parametrize("tile", [(16, 16, 16, False, True, True), (16, 32, 32, True, False, True)], ids=str)
def test_tiles_of_other_kinds(tile, monkeypatch):
    """Rows in pieces that are read at each step, matrices too, results apart, tiles that are not square."""
    row = _triton_tiles.Tile(*tile, 4, 1, None, "test")
    monkeypatch.setattr(_triton_tiles, "INTERPRETED", row)
    check(*inputs_of((1, 6, 17, 19, 40), pre=True, layer=True))
    check(*inputs_of((1, 17, 17, 19, 16)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("extras", [False, True])
def test_the_table_has_a_tile_for_every_call(extras, dtype):
    for kernel in {key[0] for key in _triton_tiles.TILES}:
        for heads in (1, 2, 6, _triton_tiles.most_heads(dtype, extras)):
            for width in (16, 80, _triton_tiles.MOST_WIDTH):
                padded = _triton_heads.padded_heads(heads)
                tile = _triton_tiles.tile(kernel, padded, width, dtype, extras, interpreted=False)
                assert tile.warps <= padded
                assert tile.width <= max(16, width)
                assert 32 * tile.warps * (tile.maxnreg or 0) <= 65536  # registers of an SM: else no launch


@pytest.mark.parametrize(
    ("heads", "dtype", "options", "takes"),
    [
        (17, torch.bfloat16, {}, "at most 16 heads of torch.bfloat16"),
        (9, torch.float32, {"layer": True}, "at most 8 heads of torch.float32 with layer norm or pre-mix"),
        (3, torch.float64, {}, "no torch.float64"),
    ],
)
def test_more_than_a_tile_holds_is_for_the_workspace(heads, dtype, options, takes):
    dout, coupling, arguments = inputs_of((1, heads, 3, 3, 16), dtype, **options)
    message = (
        f'the schedule "streaming" takes {takes}, at most 128 wide, got {heads} of width 16; take "workspace"'
    )
    with triton_kernels.schedule("streaming"):
        with pytest.raises(ValueError, match=message):
            triton_kernels.reattention_fwd(*arguments, True, False)
        with pytest.raises(ValueError, match=message):
            triton_kernels.reattention_bwd(dout, coupling, *arguments, [True] * 3 + [False] * 3)
    assert triton_kernels.chosen("forward", *arguments[:2], bool(options)) == "workspace"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_a_tile_fits_the_shared_memory(capability):
    """About half of a tile of 16 heads is what a GPU with 99 KB holds."""
    little = capability in ((8, 6), (8, 9), (12, 0))
    most = 8 if little else 16
    with _triton.recording(capability):
        for heads in (1, 8, 9, 16, 17):
            q = torch.empty(2, heads, 197, 64, dtype=torch.bfloat16, device="meta")
            assert _triton_tiles.too_large(heads, 64, q.dtype, False, capability) == (heads > most)
            wide = torch.empty(2, heads, 197, 144, dtype=torch.bfloat16, device="meta")
            with triton_kernels.schedule("streaming"):
                for x in [wide] if heads <= most else [q, wide]:
                    with pytest.raises(ValueError, match="at most"):
                        triton_kernels.chosen("forward", x, x)
            assert triton_kernels.chosen("forward", wide, wide) == "workspace"
