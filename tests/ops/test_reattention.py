"""reattention: output, Gram matrix, running statistics and every gradient, on every backend."""

import functools
import math
from dataclasses import dataclass, replace

import formulas
import operation_checks as checks
import pytest
import torch
from comparing import assert_within_budget, gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from vitdiv_kernels import attention_gram, reattention
from vitdiv_kernels.nn import ReAttention
from vitdiv_kernels.ops.maps.reattention import fold


@dataclass(frozen=True)
class Case:
    """Sizes, and which of the optional arguments are given."""

    sizes: tuple = (2, 3, 9, 7, 16)  # B, H, N, M, d
    norm: str = "none"
    training: bool = True
    mix_bias: bool = True
    pre: str = ""  # "", "mix" or "mix and bias"
    affine: bool = True
    running: bool = True
    gram: bool = True
    out_scale: float = 1.0
    scale: float | None = None

    def __str__(self):
        flags = [
            name for name in ("training", "mix_bias", "affine", "running", "gram") if getattr(self, name)
        ]
        return "-".join(["x".join(map(str, self.sizes)), self.norm, *flags, *self.pre.split()])


def inputs_of(case, dtype=torch.float64, parameter_dtype=None):
    """Differentiable inputs by name, and the other arguments."""
    batch, heads, queries, keys, width = case.sizes
    parameter_dtype = parameter_dtype or dtype

    def normal(*shape, kind=dtype, mean=0.0, spread=1.0):
        return (mean + spread * torch.randn(*shape, dtype=torch.float64)).to(kind).requires_grad_()

    def parameter(*shape, **options):
        return normal(*shape, kind=parameter_dtype, **options)

    inputs = {
        "q": normal(batch, heads, queries, width, spread=1.2),
        "k": normal(batch, heads, keys, width, spread=1.2),
        "v": normal(batch, heads, keys, width),
        "mix": parameter(heads, heads, spread=heads**-0.5),
    }
    if case.mix_bias:
        inputs["mix_bias"] = parameter(heads, spread=0.1)
    if case.pre:
        inputs["pre_mix"] = parameter(heads, heads, spread=heads**-0.5)
    if case.pre == "mix and bias":
        inputs["pre_bias"] = parameter(heads)
    if case.affine and case.norm != "none":
        inputs["norm_weight"] = parameter(heads, mean=1.0, spread=0.3)
        inputs["norm_bias"] = parameter(heads, spread=0.3)
    options = dict(norm=case.norm, training=case.training, out_scale=case.out_scale, scale=case.scale)
    if case.norm == "batch" and case.running:
        options["running_mean"] = parameter(heads, mean=1 / keys, spread=0.1).detach()
        options["running_var"] = torch.rand(heads, dtype=torch.float64).to(parameter_dtype) / keys + 1e-3
    return inputs, options


def results(operation, inputs, options, gram, kind=None, running_kind=None):
    """Output, Gram matrix, running statistics and gradients, all by name, of one call."""
    cast = {name: t.detach().to(kind).requires_grad_() if kind else t for name, t in inputs.items()}
    options = dict(options)
    for name in ("running_mean", "running_var"):
        if name in options:
            options[name] = options[name].to(running_kind or kind or options[name].dtype, copy=True)
    out, gram_matrix = operation(**cast, **options)
    generator = torch.Generator(out.device).manual_seed(1)
    outputs = [out] + ([gram_matrix] if gram else [])
    cotangents = [
        torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float64).to(t.dtype) * weight
        for t, weight in zip(outputs, (1.0, 0.1), strict=False)
    ]
    found = {"out": out.detach(), **gradients(outputs, cotangents, cast)}
    if gram:
        found["gram"] = gram_matrix.detach()
    return found | {name: options[name] for name in ("running_mean", "running_var") if name in options}


def fused(backend, gram):
    def operation(**arguments):
        out = reattention(**arguments, return_gram=gram, backend=backend)
        return out if gram else (out, None)

    return operation


def check(backend, case, dtype=torch.float64, parameter_dtype=None, change=None, cancelling=()):
    """`cancelling`: the inputs whose gradient is a sum of terms as large as the largest gradient."""
    inputs, options = inputs_of(case, dtype, parameter_dtype)
    if change is not None:
        inputs = change(inputs)
    truth = results(formulas.reattention, inputs, options, case.gram, torch.float64)
    plain = results(formulas.reattention, inputs, options, case.gram, running_kind=dtype)
    got = results(fused(backend, case.gram), inputs, options, case.gram)
    largest = max(truth[name].abs().max() for name in inputs)
    for name, expected in truth.items():
        if expected.abs().max() < 1e-8 * largest:  # 0 without rounding: a bias before a norm or a softmax
            rounding = 1e-9 if dtype == torch.float64 else 1e-4
            assert got[name].abs().max() <= max(rounding * largest, 4 * plain[name].abs().max()), name
        else:
            scale = largest if name in cancelling else None
            assert_within_budget(got[name], plain[name], expected, dtype, name, scale)
    assert got["out"].dtype == dtype
    assert all(got[name].dtype == t.dtype for name, t in inputs.items())


def formula(norm):
    def call(q, k, v, mix, pre_mix, norm_weight):
        options = {} if norm == "none" else {"norm": norm, "norm_weight": norm_weight, "training": True}
        return formulas.reattention(q, k, v, mix, pre_mix=pre_mix if norm == "none" else None, **options)

    return call


def formula_inputs():
    inputs = formulas.heads("q", "k", "v")
    heads = inputs["q"].shape[1]
    mixes = {name: torch.randn(heads, heads, dtype=torch.float64) for name in ("mix", "pre_mix")}
    return inputs | mixes | {"norm_weight": 1 + 0.1 * torch.randn(heads, dtype=torch.float64)}


# For test_plain_formulas.py: formulas, and their inputs.
FORMULAS = {norm: (formula(norm), formula_inputs) for norm in ("none", "batch", "layer")}


def check_instructions(dtype):
    """For test_capabilities.py: the kernels on odd sizes, so that vectors, register blocks and tiles have
    remainders, and on a width that is no multiple of eight."""
    check("native", Case((2, 7, 33, 19, 20), "batch"), dtype)
    check("native", Case((2, 7, 33, 19, 20), "layer", pre="mix and bias"), dtype)


NORMS = [("none", True), ("batch", True), ("batch", False), ("layer", True)]
# Every value of every size at least once; the options go round beside them.
SIZES = [
    (2, 1, 2, 3, 16),
    (2, 3, 1, 2, 33),  # of one image a batch norm would make -1 and 1, whatever the maps
    (3, 6, 3, 1, 35),
    (2, 12, 17, 17, 32),
    (1, 16, 65, 17, 64),
    (2, 24, 17, 65, 16),
    (1, 3, 197, 197, 80),
    (1, 6, 65, 65, 128),
    (1, 12, 3, 197, 64),
    (5, 3, 17, 17, 64),
]


def case_of(i, j):
    """SIZES[i] with NORMS[j], the other options mixed."""
    norm, training = NORMS[j]
    return Case(
        SIZES[i], norm, training, mix_bias=i % 2 == 0,
        pre=("", "mix and bias", "mix")[(i + j) % 3], affine=i % 3 != 0,
        running=not training or i % 2 == 0, gram=(i + j) % 2 == 0,
        out_scale=(1.0, 0.25)[j % 2], scale=(None, 0.1)[i % 2],
    )  # fmt: skip


@pytest.mark.usefixtures("threads_in_turn")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("j", range(len(NORMS)), ids=str)
@pytest.mark.parametrize("i", range(len(SIZES)), ids=str)
def test_values_and_gradients(backend, interpreted, i, j, dtype):
    if interpreted and max(SIZES[i][2:4]) > 65:
        pytest.skip("slow: shorter rows stand for it; tests/triton has rows in blocks")
    check(backend, case_of(i, j), dtype)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("pre", ["", "mix", "mix and bias"])
@pytest.mark.parametrize("mix_bias", [False, True])
@pytest.mark.parametrize(("norm", "training"), NORMS)
def test_every_combination(backend, norm, training, mix_bias, pre, affine, gram):
    case = Case(norm=norm, training=training, mix_bias=mix_bias, pre=pre, affine=affine, gram=gram)
    check(backend, case)
    check(backend, replace(case, sizes=(1, 4, 19, 23, 8)), torch.float32)


@pytest.mark.usefixtures("threads_in_turn")
@pytest.mark.parametrize("pre", ["", "mix and bias"])
@pytest.mark.parametrize(("norm", "training"), NORMS)
@pytest.mark.parametrize("parameters", ["own dtype", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(backend, dtype, parameters, norm, training, pre):
    case = Case((2, 6, 33, 33, 32), norm, training, pre=pre)
    check(backend, case, dtype, torch.float32 if parameters == "float32" else dtype)


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("norm", "training"), NORMS)
def test_whole_images_beside_a_part_of_one(backend, threads, norm, training, dtype):
    """Three images on two threads: two are done whole, the rows of the third are shared."""
    check(backend, Case((3, 4, 77, 65, 20), norm, training, pre="mix and bias"), dtype)
    # width of whole vectors: the first of an image's tasks adds to dk and dv in place
    check(backend, Case((1, 4, 77, 65, 32), norm, training, pre="mix and bias"), dtype)


@pytest.mark.parametrize("pre", ["", "mix and bias"])
@pytest.mark.parametrize(("norm", "training"), NORMS)
def test_rows_longer_than_what_stays_in_l1(backend, interpreted, norm, training, pre):
    if interpreted:
        pytest.skip("slow: tests/triton has rows in blocks")
    check(backend, Case((1, 12, 5, 500, 8), norm, training, pre=pre, gram=True), torch.float32)


@pytest.mark.parametrize(
    ("mix_bias", "pre", "affine"),
    [(False, "", False), (True, "mix and bias", True), (True, "", True), (False, "mix", True)],
)
@pytest.mark.parametrize(("norm", "training"), NORMS)
def test_gradcheck(backend, interpreted, norm, training, mix_bias, pre, affine):
    case = Case((2, 2, 2, 3, 2), norm, training, mix_bias=mix_bias, pre=pre, affine=affine)
    inputs, options = inputs_of(replace(case, running=not training))

    def operation(*tensors):
        arguments = dict(zip(inputs, tensors, strict=True))
        return reattention(**arguments, **options, return_gram=True, backend=backend)

    torch.autograd.gradcheck(operation, tuple(inputs.values()), fast_mode=interpreted)


@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gram_is_attention_gram(backend, gram_dtype):
    inputs, _ = inputs_of(Case((2, 4, 17, 19, 16)), gram_dtype)
    _, gram = reattention(**inputs, return_gram=True, backend=backend)
    torch.testing.assert_close(gram, attention_gram(inputs["q"], inputs["k"], backend=backend))


@pytest.mark.parametrize("stat_dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics_are_those_of_batch_norm(backend, stat_dtype):
    """Three steps of training and one of evaluation, beside torch's module on the maps."""
    module = torch.nn.BatchNorm2d(4, momentum=0.3, dtype=torch.float64)
    mean, var = torch.zeros(4, dtype=stat_dtype), torch.ones(4, dtype=stat_dtype)
    mix = torch.randn(4, 4, dtype=torch.float64)
    for step in range(4):
        module.train(step < 3)
        q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
        expected = module(torch.einsum("gh,bhij->bgij", mix, formulas.softmax_maps(q, k))) @ v
        got = reattention(
            q, k, v, mix, norm="batch", running_mean=mean, running_var=var, training=step < 3, momentum=0.3,
            backend=backend,
        )  # fmt: skip
        exact = 1e-5 if stat_dtype == torch.float32 else 1e-10
        torch.testing.assert_close(got, expected.detach(), rtol=exact, atol=exact)
        torch.testing.assert_close(mean.double(), module.running_mean, rtol=exact, atol=exact)
        torch.testing.assert_close(var.double(), module.running_var, rtol=exact, atol=exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_batch_norm_of_nearly_uniform_attention(backend, dtype):
    """The variance of the maps is far below the square of their mean: E[x^2] - E[x]^2 would lose it."""
    inputs, options = inputs_of(Case((2, 4, 50, 60, 32), "batch", running=False), dtype)
    q = (inputs.pop("q") * 1e-3).detach()
    maps = formulas.softmax_maps(q.double(), inputs["k"].double())
    mixed = torch.einsum("gh,bhij->bgij", inputs["mix"].double(), maps)
    weight, bias = inputs["norm_weight"].double(), inputs["norm_bias"].double()
    mixed = torch.nn.functional.batch_norm(mixed, None, None, weight, bias, True, eps=1e-14)
    expected = mixed @ inputs["v"].double()
    got = reattention(q, **inputs, **options, eps=1e-14, backend=backend)
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < (2e-2 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize(("norm", "training"), NORMS)
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits(backend, norm, training, sign):
    """Logits of 1e4: one-hot maps, no overflow."""
    case = Case((2, 3, 9, 11, 16), norm, training, gram=False)

    # A (dA - delta) of a map that is one-hot but for 1e-8 or so
    def change(t):
        return t | {"q": (sign * 3e3 * t["q"]).detach().requires_grad_()}

    check(backend, case, change=change, cancelling=("q", "k"))
    inputs, options = inputs_of(case, torch.float32)
    inputs["q"] = sign * 1e4 * inputs["q"]
    out = reattention(**inputs, **options, backend=backend)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), list(inputs.values())))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "mix"])
@pytest.mark.parametrize(("norm", "training"), NORMS)
def test_nan_and_inf_propagate(backend, norm, training, where, poison):
    """What the plain formula spoils is spoilt, element by element; the images that it spares stay clean."""
    batch = norm == "batch" and training  # the gradient of a bias before it is 0 whatever the inputs
    case = Case((3, 3, 9, 11, 16), norm, training, mix_bias=not batch, running=not training, gram=False)
    inputs, options = inputs_of(case, torch.float32)
    with torch.no_grad():
        (inputs[where][1] if where in "qkv" else inputs[where]).flatten()[5] = poison
    expected = results(formulas.reattention, inputs, options, gram=False)
    got = results(fused(backend, gram=False), inputs, options, gram=False)
    # The kernels add some terms of these apart from the products, so that what is Inf may be Inf - Inf.
    may_cancel = {"v": {"mix"}, "mix": {"v", "norm_weight"}}.get(where, set())
    if where == "v" and batch and got["out"].is_cuda:
        may_cancel = may_cancel | {"out"}  # without reading v the host cannot tell
    if backend == "triton" and where == "v":
        # few heads are mixed by a matrix with zeros, which makes NaN of a row's Inf
        may_cancel = may_cancel | {"k"}
    for name, truth in expected.items():
        assert torch.equal(got[name].isfinite(), truth.isfinite()), name
        if name not in may_cancel or backend == "reference" or poison != poison:
            assert torch.equal(got[name].isnan(), truth.isnan()), name
            if name == "out":
                assert torch.equal(got[name] == float("inf"), truth == float("inf")), name

    if where == "mix" or batch:  # which reach every image
        return
    clean = [0, 2]
    without = {
        n: t.detach()[clean].requires_grad_() if n in ("q", "k", "v") else t for n, t in inputs.items()
    }
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    outs = [reattention(**tensors, **options, backend=backend) for tensors in (leaves, without)]
    cotangent = torch.randn_like(outs[0])
    spoilt_run = torch.autograd.grad(outs[0], [leaves[n] for n in "qkv"], cotangent)
    spared = [outs[0][clean], *(grad[clean] for grad in spoilt_run)]
    alone = [outs[1], *torch.autograd.grad(outs[1], [without[n] for n in "qkv"], cotangent[clean])]
    for a, b in zip(spared, alone, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("norm", "training"), NORMS)
def test_empty_batch(backend, norm, training):
    inputs, options = inputs_of(Case((0, 3, 9, 11, 16), norm, training, pre="mix and bias"), torch.float32)
    before = {name: options[name].clone() for name in ("running_mean", "running_var") if name in options}
    out, gram = reattention(**inputs, **options, return_gram=True, backend=backend)
    assert out.shape == (0, 3, 9, 16)
    assert gram.shape == (0, 3, 3)
    out.sum().backward()
    assert inputs["q"].grad.shape == (0, 3, 9, 16)
    assert inputs["mix"].grad.eq(0).all()
    assert all(torch.equal(options[name], value) for name, value in before.items())  # as torch's batch norm


def packed(inputs):
    """q, k, v as views into one packed projection [B, N, 3, H, d]."""
    qkv = torch.stack([inputs[name].detach() for name in "qkv"]).permute(1, 3, 0, 2, 4).contiguous()
    return dict(zip("qkv", qkv.permute(2, 0, 3, 1, 4).unbind(0), strict=True))


def each(layout):
    return lambda inputs: {name: layout(inputs[name].detach()) for name in "qkv"}


LAYOUTS = {
    "packed qkv": packed,
    "sliced tokens": each(lambda t: torch.cat([t * float("nan"), t, t], 2)[:, :, 9:18]),
    "part of the width": each(lambda t: torch.cat([t, t * float("nan")], 3)[..., : t.shape[3]]),
    "batch inside": each(lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)),
    "last stride 2": each(lambda t: t.repeat_interleave(2, 3)[..., ::2]),
    "transposed": each(lambda t: t.mT.contiguous().mT),
    "expanded": each(lambda t: t[:1].expand_as(t)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("norm", "training"), NORMS)
def test_layouts(backend, layout, norm, training):
    def change(inputs):
        relaid = {name: t.requires_grad_() for name, t in LAYOUTS[layout](inputs).items()}
        return inputs | relaid | {"mix": inputs["mix"].detach().mT.requires_grad_()}

    check(backend, Case((3, 4, 9, 9, 12), norm, training), change=change)


@pytest.mark.parametrize(("norm", "training"), NORMS)
def test_items_more_than_2_to_31_elements_apart(backend, far_apart, norm, training):
    near, options = inputs_of(Case((2, 3, 5, 7, 16), norm, training, running=not training), torch.float16)
    checks.assert_far_apart(functools.partial(reattention, **options, backend=backend), near, far_apart)


def test_incoming_gradients_of_any_layout(backend):
    inputs, _ = inputs_of(Case((2, 3, 9, 9, 16)))
    out = reattention(**inputs, backend=backend)
    wanted = list(inputs.values())
    for cotangent in (torch.ones((), dtype=out.dtype).expand_as(out), torch.randn_like(out.mT).mT):
        got = torch.autograd.grad(out, wanted, cotangent, retain_graph=True)
        expected = torch.autograd.grad(out, wanted, cotangent.contiguous(), retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("norm", "training"), NORMS)
def test_only_the_gradients_asked_for(backend, interpreted, norm, training):
    inputs, options = inputs_of(
        Case(
            (1 if interpreted else 2, 3, 9, 11, 16), norm, training, pre="mix and bias", running=not training
        )
    )

    def gradients_of(wanted):
        leaves = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in inputs.items()}
        out, gram = reattention(**leaves, **options, return_gram=True, backend=backend)
        (out.square().sum() + gram.square().sum()).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    every = gradients_of(inputs)
    for wanted in inputs:
        for name, grad in gradients_of([wanted]).items():
            if name == wanted:
                torch.testing.assert_close(grad, every[name])
            else:
                assert grad is None


@pytest.mark.parametrize("used", ["out", "gram"])
def test_one_of_two_outputs_used(backend, used):
    inputs, options = inputs_of(Case((2, 3, 9, 11, 16), "batch", running=False))
    index = ("out", "gram").index(used)
    got = reattention(**inputs, **options, return_gram=True, backend=backend)[index]
    truth = formulas.reattention(**inputs, **options)[index]
    keys = (inputs["q"], inputs["k"])
    got, truth = (torch.autograd.grad(value.square().sum(), keys) for value in (got, truth))
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("norm", "training"), NORMS)
def test_backward_twice_and_inputs_untouched(backend, norm, training):
    inputs, options = inputs_of(Case((2, 3, 33, 33, 16), norm, training, pre="mix and bias"), torch.float32)

    def loss(*tensors):
        return reattention(**dict(zip(inputs, tensors, strict=True)), **options, backend=backend).sum()

    checks.assert_backward_twice(loss, *inputs.values())


def test_backward_after_the_running_statistics_moved_on(backend):
    """A second forward updates the buffers before the first one's backward, as with gradient accumulation."""
    inputs, options = inputs_of(Case((2, 3, 9, 9, 16), "batch"))
    (expected,) = torch.autograd.grad(reattention(**inputs, **options, backend=backend).sum(), inputs["mix"])
    first = reattention(**inputs, **options, backend=backend)
    reattention(**inputs, **options, backend=backend)
    (got,) = torch.autograd.grad(first.sum(), inputs["mix"])
    torch.testing.assert_close(got, expected)


def test_autocast_casts_like_scaled_dot_product_attention(backend):
    inputs, options = inputs_of(Case((2, 3, 17, 17, 16), "batch", running=False), torch.float32)
    low = inputs | {name: inputs[name].bfloat16() for name in "qkv"}
    expected = reattention(**low, **options, backend=backend)
    with torch.autocast(expected.device.type, dtype=torch.bfloat16):
        assert torch.equal(reattention(**inputs, **options, backend=backend), expected)
        assert torch.equal(reattention(**inputs | {"v": low["v"]}, **options, backend=backend), expected)
    assert expected.dtype == torch.bfloat16


def test_dropout():
    """Before the mix, in training only; a kept entry is divided by what is kept, so the mean stays."""
    inputs, _ = inputs_of(Case((1, 2, 40, 50, 8), mix_bias=False))
    out = reattention(**inputs, dropout_p=0.5, training=False)
    torch.testing.assert_close(out, reattention(**inputs))
    ones = inputs | {"v": torch.ones_like(inputs["v"]), "mix": torch.eye(2, dtype=torch.float64)}
    dropped = reattention(**ones, dropout_p=0.5, training=True)
    assert dropped.std() > 0.05
    assert abs(dropped.mean().item() - 1) < 0.1
    assert reattention(**inputs, dropout_p=1.0, training=True).eq(0).all()


def test_any_shape_layout_and_options(backend, interpreted):
    @settings(max_examples=5 if interpreted else 40, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def holds(data):
        draw = data.draw
        names = ("B", "H", "N", "M", "d")
        most = (3, 7, 40, 40, 70)
        sizes = tuple(draw(st.integers(2 if n == "M" else 1, m), n) for n, m in zip(names, most, strict=True))
        norm, training = draw(st.sampled_from(NORMS), "norm, training")
        if norm != "none" and sizes[1] == 1:
            sizes = (sizes[0], 2, *sizes[2:])  # the norm of one head takes out its mix
        case = Case(
            sizes, norm, training, mix_bias=draw(st.booleans(), "bias"),
            pre=draw(st.sampled_from(["", "mix", "mix and bias"]), "pre"),
            affine=draw(st.booleans(), "affine"), running=not training or draw(st.booleans(), "running"),
            gram=draw(st.booleans(), "gram"), out_scale=draw(st.floats(0.1, 4), "out_scale"),
            scale=draw(st.none() | st.floats(0.01, 2).map(lambda x: x * sizes[-1] ** -0.5), "scale"),
        )  # fmt: skip
        torch.manual_seed(draw(st.integers(0, 10**6), "seed"))
        orders = [draw(st.permutations(range(4)), "order of the axes in memory") for _ in range(3)]

        def change(inputs):
            for name, order in zip("qkv", orders, strict=True):
                relaid = inputs[name].detach().permute(order).contiguous()
                inputs[name] = relaid.permute([order.index(axis) for axis in range(4)]).requires_grad_()
            return inputs

        check(backend, case, change=change)

    holds()


def test_layer_norm_with_eps_zero(backend):
    """Padding columns of a tile have equal values over heads: their variance of 0 must reach nothing."""
    leaves = [torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8), torch.eye(4)]
    leaves = [x.requires_grad_() for x in leaves]
    out = reattention(*leaves, norm="layer", norm_weight=torch.ones(4), eps=0.0, backend=backend)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize(("weight", "bias"), [(0.05, 1.0), (1e-3, 10.0), (0.0, 1.0)])
def test_batch_norm_whose_shift_is_large(backend, weight, bias):
    """The gradient of the variance is a small part of what the shift adds to the output."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 6, 65, 32).unbind()
    v, dout = (torch.randn(2, 2, 6, 65, 32) + 1).unbind()
    mix = torch.eye(6) + 0.3 * torch.randn(6, 6)

    def gradients(dtype, backend):
        leaves = [x.to(dtype).requires_grad_() for x in (q.clone(), k.clone(), v.clone(), mix.clone())]
        norm = {
            "norm_weight": torch.full((6,), weight, dtype=dtype),
            "norm_bias": torch.full((6,), bias, dtype=dtype),
        }
        reattention(*leaves, norm="batch", training=True, backend=backend, **norm).backward(dout.to(dtype))
        return [x.grad.double() for x in leaves]

    exact, plain = gradients(torch.float64, "reference"), gradients(torch.float32, "reference")
    for truth, yardstick, ours in zip(exact, plain, gradients(torch.float32, backend), strict=True):
        assert (ours - truth).norm() <= 3 * (yardstick - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optional", [True, False])
def test_batch_norm_in_cpp_is_that_in_torch(dtype, optional):
    heads, queries, keys = 5, 7, 9

    def random(*shape):
        return torch.rand(*shape, dtype=dtype) + 0.5

    gram, mix, mix_bias, norm_weight = (
        random(3, heads, heads), random(heads, heads), random(heads), random(heads)
    )  # fmt: skip
    if not optional:
        mix_bias = norm_weight = None
    operators = torch.ops.vitdiv
    arguments = gram, mix, mix_bias, norm_weight, queries, keys, 1e-3, 0.7
    results = operators.batch_norm_fwd(*arguments)
    assert_all_close(results, fold.batch_norm_fwd(*arguments))
    _, var, _, mixed_covariance, _ = results
    arguments = random(heads), var, mix, 3 * queries * keys, 1e-3
    dvar, coupling = operators.batch_norm_coupling(*arguments)
    assert_all_close((dvar, coupling), fold.batch_norm_coupling(*arguments))
    arguments = gram[0], mix, norm_weight, var, mixed_covariance, dvar if optional else None, 1e-3, 0.7
    assert_all_close(operators.batch_norm_bwd(*arguments), fold.batch_norm_bwd(*arguments))


def assert_all_close(results, expected):
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value)


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_bias_before_batch_norm_has_no_gradient(backend, bad):
    """Exactly none, as batch norm takes it out again: rounding noise would be Adam's full learning rate."""
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    mix, bias = torch.randn(4, 4), torch.randn(4, requires_grad=True)
    out = reattention(q, k, v, mix, mix_bias=bias, norm="batch", training=True, backend=backend)
    (dbias,) = torch.autograd.grad(out, bias, torch.randn_like(out) + bad)
    assert torch.equal(dbias, torch.zeros(4))
    frozen = reattention(
        q, k, v, mix, mix_bias=bias, norm="batch", running_mean=torch.zeros(4), running_var=torch.ones(4),
        backend=backend,
    )  # fmt: skip
    (dbias,) = torch.autograd.grad(frozen.sum(), bias)
    torch.testing.assert_close(dbias, v.sum((0, 2, 3)) * 9 / (1 + 1e-5) ** 0.5)


def test_adam_leaves_a_bias_before_batch_norm_where_it_is():
    module = ReAttention(32, 4, backend="reference")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0)
    before = module.reatten_matrix.bias.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(2, 9, 32)).square().mean().backward()
        optimizer.step()
    assert torch.equal(module.reatten_matrix.bias.detach(), before)
