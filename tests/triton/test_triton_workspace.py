"""The workspace schedule of re-attention in Triton: chunks of images and of rows, memory, and the tables."""

import importlib.util

import pytest
import torch
from comparing import assert_within_budget

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import interpreter_arithmetic
import interpreter_checks
import interpreter_speed
from allocations import Copies, beyond_results
from conftest import need

from vitdiv_kernels.ops import _launch as _triton
from vitdiv_kernels.ops.maps._triton import row_tiles, workspace
from vitdiv_kernels.ops.maps.reattention import triton_kernels

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if _triton.INTERPRETED:
    interpreter_checks.install()
    interpreter_arithmetic.install()
    interpreter_speed.install()
runs = pytest.mark.skipif(
    not (ON_GPU or _triton.INTERPRETED), reason="needs a GPU, or TRITON_INTERPRET=1 before Triton is imported"
)
NAMES = ("out", "gram", "dq", "dk", "dv", "dpre_mix", "dmix", "dbias", "dnorm_weight", "dnorm_bias")


def inputs_of(sizes, dtype=torch.float64, pre=False, layer=False, device=None):
    """(dout, coupling, arguments from q to eps); heads lie beside each other, as a projection leaves them."""
    images, heads, queries, keys, width = sizes

    def heads_of(rows):
        x = torch.randn(images, rows, heads, width, dtype=torch.float64)
        return x.to(device or DEVICE, dtype).transpose(1, 2)

    def parameter(*shape):
        x = torch.randn(*shape, dtype=torch.float64) * heads**-0.5
        return x.to(device or DEVICE, torch.float64 if dtype == torch.float64 else torch.float32)

    q, k, v, dout = heads_of(queries), heads_of(keys), heads_of(keys), heads_of(queries)
    pre_mix, pre_bias = (parameter(heads, heads), parameter(heads)) if pre else (None, None)
    norm = (parameter(heads), parameter(heads)) if layer else (None, None)
    coupling = parameter(images, heads, heads)
    mix, bias = parameter(heads, heads), parameter(heads)
    return (
        dout,
        coupling + coupling.mT,
        (q, k, v, width**-0.5, pre_mix, pre_bias, mix, bias, False, *norm, 1e-5),
    )


def inputs_of_meta(sizes):
    """The same on meta tensors, in bfloat16, without random numbers of their size."""
    images, heads, queries, keys, width = sizes
    made = {"dtype": torch.bfloat16, "device": "meta"}
    q, k = (torch.empty(images, heads, rows, width, **made) for rows in (queries, keys))
    matrix = torch.empty(heads, heads, device="meta")
    coupling = torch.empty(images, heads, heads, device="meta")
    return q, coupling, (q, k, k, width**-0.5, None, None, matrix, None, False, None, None, 1e-5)


def run(module, dout, coupling, arguments):
    needs = [True] * 3 + [arguments[4] is not None, True, arguments[9] is not None]
    return *module.forward(*arguments, True, True), *module.backward(dout, coupling, *arguments, needs)


class Compiled:
    """The compiled CPU kernels in float64, with the functions of a schedule."""

    @staticmethod
    def forward(*arguments):
        return torch.ops.vitdiv.reattention_fwd(*map(Compiled.double, arguments))

    @staticmethod
    def backward(*arguments):
        return torch.ops.vitdiv.reattention_bwd(*map(Compiled.double, arguments))

    @staticmethod
    def double(x):
        return x.double().cpu() if torch.is_tensor(x) else x


def check(sizes, dtype=torch.float64, **options):
    given = inputs_of(sizes, dtype, **options)
    truth, got = run(Compiled, *given), run(workspace, *given)
    for name, g, t in zip(NAMES, got, truth, strict=True):
        # ten times what a value off by rounding has: plain formulas in this dtype are in test_reattention.py
        if t.numel():
            assert_within_budget(g.cpu(), t, t, dtype, name, scale=10 * t.abs().max().item())
    return got


@pytest.fixture
def limit(monkeypatch):
    """limit(bytes) sets the size of the workspace."""

    def set_limit(size):
        monkeypatch.setattr(workspace, "workspace_bytes", lambda capability: size)

    return set_limit


@runs
@pytest.mark.parametrize("heads", [3, 12, 24])
@pytest.mark.parametrize("size", [1, 40_000])
def test_chunks_of_rows_and_of_images(limit, heads, size):
    """1 byte: 16 rows of one image at a time. 40 KB: rows or images, as the heads have it."""
    need("native")
    limit(size)
    check((3, heads, 21, 19, 8))


@runs
def test_rows_walked_in_blocks_with_everything(limit, monkeypatch):
    """70 keys in blocks of 32 (float64), 20 rows in chunks of 16."""
    need("native")
    limit(1)
    monkeypatch.setattr(workspace, "INTERPRETED_BLOCK", 32)
    check((1, 2, 20, 70, 8), pre=True, layer=True)


@runs
@pytest.mark.parametrize("sizes", [(2, 3, 1, 5, 200), (1, 2, 17, 1, 16), (1, 32, 2, 17, 1)], ids=str)
def test_one_query_one_key_and_other_widths(sizes):
    need("native")
    check(sizes, pre=True)


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_chunks_of_rows_with_everything_in_16_bits(limit, dtype):
    need("native")
    limit(1)
    check((2, 3, 37, 21, 8), dtype, pre=True, layer=True)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dk_and_dv_grow_in_float32(limit, dtype):
    need("native")
    whole = check((1, 4, 64, 33, 16), dtype)
    limit(1)
    in_chunks = check((1, 4, 64, 33, 16), dtype)
    for name, a, b in zip(NAMES, whole, in_chunks, strict=True):
        assert a.dtype == b.dtype, name


@runs
def test_many_heads_in_float16():
    """Where tiles have 32 rows, the coupling is mixed in one product of TF32."""
    need("native")
    check((1, 17, 3, 19, 16), torch.float16, pre=True)


@runs
@pytest.mark.parametrize("layout", ["packed", "heads first", "width 5", "last stride 2", "expanded dout"])
def test_layouts(layout):
    need("native")
    dout, coupling, arguments = inputs_of((2, 3, 16, 16, 5 if layout == "width 5" else 16))
    if layout == "heads first":
        arguments = *(x.contiguous() for x in arguments[:3]), *arguments[3:]
    elif layout == "last stride 2":
        arguments = *(torch.stack([x, x], -1)[..., 0] for x in arguments[:3]), *arguments[3:]
    elif layout == "expanded dout":
        dout = dout[:, :, :1, :1].expand_as(dout)
    given = dout, coupling, arguments
    for name, g, t in zip(NAMES, run(workspace, *given), run(Compiled, *given), strict=True):
        torch.testing.assert_close(g.cpu(), t, msg=name)


@pytest.mark.parametrize("tokens", [197, 208])
@pytest.mark.parametrize("layout", ["packed", "[B, N, H, d]", "[B, H, N, d]"])
def test_nothing_is_copied_to_another_layout(layout, tokens):
    made, heads = {"dtype": torch.bfloat16, "device": "meta"}, 12
    if layout == "packed":
        q, k, v = torch.empty(128, tokens, 3, heads, 64, **made).permute(2, 0, 3, 1, 4)
        dout = torch.empty(128, tokens, heads, 64, **made).transpose(1, 2)
    elif layout == "[B, N, H, d]":
        q, k, v, dout = torch.empty(4, 128, tokens, heads, 64, **made).transpose(2, 3)
    else:
        q, k, v, dout = torch.empty(4, 128, heads, tokens, 64, **made)
    mix = torch.empty(heads, heads, device="meta")
    arguments = q, k, v, 0.125, None, None, mix, None, False, None, None, 1e-5
    with _triton.recording((9, 0)), Copies() as copies:
        triton_kernels.reattention_fwd(*arguments, True, False)
        assert copies.bytes == 0
        triton_kernels.reattention_bwd(dout, None, *arguments, [True] * 3 + [False, True, False])
        assert copies.bytes == 4 * heads * (heads + 1)  # parameters' gradients, made in float64


@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("heads", [1, 12, 32])
@pytest.mark.parametrize(
    ("images", "queries", "keys"), [(0, 5, 5), (128, 197, 197), (7, 577, 577), (3, 4097, 4097), (5, 1, 65)]
)
def test_the_workspace_is_bounded(images, heads, queries, keys, maps):
    limit = 32 << 20
    size = workspace.plan(images, heads, queries, keys, 2, maps, limit)
    covered = torch.zeros(images, queries, dtype=torch.int)
    for chunk in workspace.chunks(size, images, queries):
        assert chunk.last - chunk.first <= size.images
        assert chunk.bottom - chunk.top <= size.rows
        covered[chunk.first : chunk.last, chunk.top : chunk.bottom] += 1
    assert bool((covered == 1).all())
    bytes_of_maps = maps * size.images * size.rows * heads * 2 * -(-keys // 16) * 16
    assert bytes_of_maps <= limit
    assert size.rows == queries or size.rows % 16 == 0
    if size.rows < queries:
        last = (queries - 1) % size.rows + 1
        assert size.rows - last < 16 * -(-queries // size.rows)


def held(direction, images, sizes, dtype=torch.bfloat16):
    """Bytes of all tensors that a call makes on meta tensors, but for its outputs: at least its peak."""
    dout, coupling, arguments = inputs_of((images, *sizes), dtype, device="meta")
    with _triton.recording((9, 0)):
        if direction == "forward":
            return beyond_results(workspace.forward, *arguments, True, True)
        needs = [True] * 3 + [False, True, False]
        return beyond_results(workspace.backward, dout, coupling, *arguments, needs)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_does_not_grow_with_the_maps(direction):
    limit = workspace.workspace_bytes((9, 0))
    few, many = (held(direction, images, (12, 197, 197, 64)) for images in (64, 128))
    partial_sums = 25 * 3 * 16 * 16 * 4  # an image
    assert many <= limit + 128 * partial_sums
    assert many <= few + limit // 2 + 64 * partial_sums
    # 4096 tokens: the maps of one image are 512 MB
    assert held(direction, 1, (16, 4096, 4096, 64)) <= limit + 8 * 16 * 4096 * 64 * 4


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_call_has_tiles(direction):
    for heads in range(1, 33):
        for keys in (1, 2, 17, 197, 577, 4097):
            for dtype in _triton.DTYPES:
                for extras in (False, True):
                    tiles = row_tiles.row_config(direction, heads, keys, dtype, extras)
                    assert heads <= tiles.share * heads <= tiles.tile_rows
                    assert tiles.one_block == (keys <= tiles.block)
                    assert tiles.block % (16 * tiles.split) == 0
                    assert 32 * tiles.warps * (tiles.maxnreg or 0) <= 65536  # registers of an SM
    sources = {row.source for row in row_tiles.ROWS.values()}
    assert all(s in ("cost model", "aot") or s.startswith("measured on ") for s in sources)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_meta_tensors_record_the_launches(capability):
    dout, coupling, arguments = inputs_of((128, 12, 197, 197, 64), torch.bfloat16, device="meta")
    needs = [True] * 3 + [False, True, False]
    with _triton.recording(capability) as launches:
        out, gram = triton_kernels.reattention_fwd(*arguments, True, True)
        forward = len(launches)
        triton_kernels.reattention_bwd(dout, coupling, *arguments, needs)
        sums = triton_kernels.head_dots(dout, out)
    assert (out.shape, gram.shape, sums.shape) == ((128, 12, 197, 64), (128, 12, 12), (12,))
    kernels = [launch.kernel.__name__ for launch in launches]
    backward = len(kernels) - forward - 1
    of_chunk = ["logits_kernel", "forward_rows", "values_kernel"]
    assert kernels[:forward] == of_chunk * (forward // 3)
    of_chunk = ["logits_kernel"] * 2 + ["backward_rows"] + ["values_kernel"] * 3
    assert kernels[forward:] == [*of_chunk * (backward // 6), "dot_rows"]


@pytest.mark.parametrize(("images", "heads", "queries"), [(1, 12, 600_000), (200_000, 1, 1)])
def test_grids_of_many_rows_and_few_keys(images, heads, queries):
    """Only the first axis of a grid has more than 65535 programs."""
    sizes = images, heads, queries, 9, 1024
    dout, coupling, arguments = inputs_of_meta(sizes)
    with _triton.recording((9, 0)) as launches:
        triton_kernels.reattention_fwd(*arguments, True, True)
        triton_kernels.reattention_bwd(dout, coupling, *arguments, [True] * 3 + [False, True, False])
        triton_kernels.head_dots(dout, dout)
    assert len(launches) > 9
    for launch in launches:
        assert launch.grid[0] < 1 << 31
        assert all(programs < 1 << 16 for programs in launch.grid[1:]), launch.kernel.__name__


@runs
@pytest.mark.parametrize("shape", [(2, 3, 300, 35), (1, 1, 1, 1), (0, 4, 5, 8), (1, 2, 9, 5000)])
def test_head_dots(shape):
    x, y = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE).mT.contiguous().mT
    expected = (x.double() * y.double()).sum((0, 2, 3))
    torch.testing.assert_close(triton_kernels.head_dots(x, y), expected.float())


@runs
@pytest.mark.parametrize("heads", [3, 12])
def test_nan_stays_in_its_query_row(heads):
    """Tiles of 3 heads hold several query rows, which a mix must not mingle."""
    dout, _, (q, *others) = inputs_of((1, heads, 6, 6, 8))
    q[0, 1, 2, 3] = float("nan")
    out, _ = workspace.forward(q, *others, True, False)
    assert out.isnan().any(-1)[0].tolist() == [[i == 2 for i in range(6)]] * heads
    q[0, 1, 2, 3], dout[0, 2, 4] = 1, float("inf")
    dq = workspace.backward(dout, None, q, *others, [True] + [False] * 5)[0]
    assert dq.isfinite().all(-1)[0].tolist() == [[i != 4 for i in range(6)]] * heads


@runs
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_lost_row_of_few_heads_loses_no_other(poison):
    """What is NaN where the compiled kernels have NaN: of an infinite logit, too."""
    need("native")
    given = inputs_of((1, 3, 33, 35, 16))
    given[2][0][0, 0, 5, 0] = poison
    for name, g, t in zip(NAMES, run(workspace, *given), run(Compiled, *given), strict=True):
        assert torch.equal(g.isnan().cpu(), t.isnan()), name


@runs
def test_a_layer_norm_without_eps_has_no_nan_past_the_keys():
    """There mixed maps are 0 for all heads, exactly: 8 keys, and a mix of whole numbers without a bias."""
    need("native")
    dout, coupling, (*heads_and_mix, _, _, centred, weight, bias, _) = inputs_of((1, 3, 5, 8, 4), layer=True)
    mix = torch.tensor([[2.0, -1, 3], [0, 1, -2], [-3, 2, 4]], dtype=torch.float64, device=DEVICE)
    given = dout, coupling, (*heads_and_mix, mix, None, centred, weight, bias, 0.0)
    for name, g, t in zip(NAMES, run(workspace, *given), run(Compiled, *given), strict=True):
        torch.testing.assert_close(g.cpu(), t, msg=name)


@runs
def test_the_gradient_of_the_gram_alone():
    need("native")
    _, coupling, arguments = inputs_of((2, 3, 17, 19, 16), pre=True)
    needs = [True, True, False, True, False, False]
    got = workspace.backward(None, coupling, *arguments, needs)
    truth = Compiled.backward(None, coupling.cpu(), *arguments, needs)
    for name, g, t in zip(NAMES[2:], got, truth, strict=True):
        torch.testing.assert_close(g.cpu(), t, msg=name)


@runs
def test_one_hot_maps_have_no_gradient():
    """Logits of 1e4, whose last bit is 1e-3: dq and dk must see the same bits, or 1 is not 1."""
    _, coupling, arguments = inputs_of((1, 3, 17, 19, 16), torch.float32)
    arguments[0].mul_(1e5)
    dq, dk, *_ = workspace.backward(None, coupling, *arguments, [True, True] + [False] * 4)
    for gradient, other in ((dq, arguments[1]), (dk, arguments[0])):
        # what an error of 1e-5 of a map makes
        assert gradient.abs().max() < 1e-5 * coupling.abs().max() * other.abs().max()


@runs
@pytest.mark.parametrize("wanted", range(6))
def test_only_what_is_needed(wanted):
    dout, coupling, arguments = inputs_of((1, 3, 17, 19, 16), pre=True, layer=True)
    every = workspace.backward(dout, coupling, *arguments, [True] * 6)
    got = workspace.backward(dout, coupling, *arguments, [i == wanted for i in range(6)])
    outputs = ((0,), (1,), (2,), (3,), (4, 5), (6, 7))[wanted]
    for i, (one, whole) in enumerate(zip(got, every, strict=True)):
        assert torch.equal(one, whole) if i in outputs else one.numel() == 0


@runs
def test_the_same_bits_twice():
    given = inputs_of((2, 6, 33, 35, 16), torch.float32, pre=True, layer=True)
    assert all(torch.equal(a, b) for a, b in zip(run(workspace, *given), run(workspace, *given), strict=True))


@runs
def test_empty_batch():
    given = inputs_of((0, 3, 9, 11, 16), pre=True, layer=True)
    out, gram, *gradients = run(workspace, *given)
    assert (out.shape, gram.shape) == ((0, 3, 9, 16), (0, 3, 3))
    assert all(x.eq(0).all() for x in gradients[3:])


@runs
def test_small_coupling_in_float16():
    """The gradient of a mean over many maps is below float16's range until it meets the logits' gradient."""
    _, coupling, arguments = inputs_of((1, 3, 33, 35, 16), torch.float16)
    needs = [True, True, False, False, False, False]
    large = workspace.backward(None, coupling, *arguments, needs)
    small = workspace.backward(None, coupling * 2.0**-10, *arguments, needs)
    for a, b in zip(large[:2], small[:2], strict=True):
        torch.testing.assert_close(a * 2.0**-10, b, rtol=1e-2, atol=2e-7)
