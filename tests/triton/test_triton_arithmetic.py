"""The interpreter's arithmetic is that of a GPU: known values, and a fault that shows in it alone."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from places import python_path

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import formulas
import interpreter_arithmetic
import interpreter_speed
import triton
import triton.language as tl
from comparing import assert_within_budget

from vitdiv_kernels.ops import _launch as _triton
from vitdiv_kernels.ops.maps.attention_gram import triton_kernels

runs = pytest.mark.skipif(
    not _triton.INTERPRETED, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)
if _triton.INTERPRETED:
    interpreter_arithmetic.install()
    interpreter_speed.install()


@triton.jit
def _product(X, Y, Z, K: tl.constexpr, PRECISION: tl.constexpr):
    """Z += X Y of [16, K] and [K, 16]."""
    m, k = tl.arange(0, 16), tl.arange(0, K)
    x = tl.load(X + m[:, None] * K + k[None, :])
    y = tl.load(Y + k[:, None] * 16 + m[None, :])
    place = Z + m[:, None] * 16 + m[None, :]
    tl.store(place, tl.dot(x, y, tl.load(place), input_precision=PRECISION, out_dtype=tl.float32))


@triton.jit
def _function(X, Y, Z, NAME: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(X + n)
    if NAME == "exp":
        z = tl.exp(x)
    elif NAME == "exp2":
        z = tl.exp2(x)
    elif NAME == "log":
        z = tl.log(x)
    elif NAME == "sqrt":
        z = tl.sqrt(x)
    elif NAME == "divide":
        z = x / tl.load(Y + n)
    elif NAME == "twice":
        z = x + x
    else:
        z = x
    tl.store(Z + n, z.to(Z.dtype.element_ty))


def product(x, y, z, precision="ieee"):
    z = z.clone()
    _triton.launch(_product, (1,), x, y, z, K=x.shape[1], PRECISION=precision, num_warps=1, num_stages=1)
    return z


def function(name, x, y=None, dtype=torch.float32):
    z = torch.empty(x.shape, dtype=dtype)
    arguments = x, x if y is None else y, z
    _triton.launch(_function, (1,), *arguments, NAME=name, N=x.numel(), num_warps=1, num_stages=1)
    return z


def one_product(x, y, z=0.0, dtype=torch.float32, precision="ieee"):
    """z + x . y, with lists x and y."""
    a, b = torch.zeros(16, 16), torch.zeros(16, 16)
    a[0, : len(x)], b[: len(y), 0] = torch.tensor(x), torch.tensor(y)
    return product(a.to(dtype), b.to(dtype), torch.full((16, 16), z), precision)[0, 0].item()


def exponent(x):
    return math.frexp(x)[1] - 1


def cut(x, unit):
    return int(x / unit) * unit  # towards zero


def by_blocks(x, y, z, block):
    """The definition, for one element, in fractions."""
    total = Fraction(z)
    for k in range(0, len(x), block):
        pairs = [(a, b) for a, b in zip(x[k : k + block], y[k : k + block], strict=True) if a and b]
        exponents = [exponent(a) + exponent(b) for a, b in pairs] + ([exponent(total)] if total else [])
        if exponents:
            unit = Fraction(2) ** (max(exponents) - 24)
            total = sum((cut(Fraction(a) * Fraction(b), unit) for a, b in pairs), cut(total, unit))
        if total:
            total = cut(total, Fraction(2) ** (exponent(total) - 23))
    return float(total)


@runs
@pytest.mark.parametrize(
    ("dtype", "precision", "block"),
    [(torch.float16, "ieee", 8), (torch.bfloat16, "ieee", 8), (torch.float32, "tf32", 4)],
    ids=str,
)
def test_tensor_cores_cut(dtype, precision, block):
    """Factors of very different sizes, with zeros among them."""
    x, y = (torch.randn(2, 16, 32) * torch.randint(-1, 9, (2, 16, 32)).exp2()).to(dtype)
    x[:, 3], x[2], z = 0, 0, torch.randn(16, 16)
    y, z[:, 5] = y.mT.contiguous(), 0
    got = product(x, y, z, precision)
    bits = 0x7FFFFFFF ^ 0x1FFF  # of TF32; int32 has a sign
    read = [(t.view(torch.int32) & (bits - 2**31)).view(torch.float32) if block == 4 else t for t in (x, y)]
    x, y = (t.double().tolist() for t in read)
    columns = list(zip(*y, strict=True))
    expected = [[by_blocks(x[m], columns[n], z[m, n].item(), block) for n in range(16)] for m in range(16)]
    assert got.double().tolist() == expected


@runs
def test_known_values():
    low = 2.0**-10
    # TF32 has 10 places; what is below is cut, or with three products kept
    assert one_product([1 + 1.75 * low], [1.0], precision="tf32") == 1 + low
    assert one_product([-1 - 1.75 * low], [1.0], precision="tf32") == -1 - low
    assert one_product([1 + 1.75 * low], [1.0], precision="tf32x3") == 1 + 1.75 * low
    assert one_product([1 + 1.75 * low], [1.0]) == 1 + 1.75 * low
    for dtype in (torch.float16, torch.bfloat16):
        # seven of 1.9 * 2^-25 are 1.7 units of 1's last place, and all cut; toward zero, not down
        terms = [1.875 * 2.0**-10] * 7, [2.0**-15] * 7
        assert one_product(*terms, 1.0, dtype) == 1
        assert one_product(*terms, -1.0, dtype) == -1
        # one place more than float32's
        assert one_product([2.0**-12] * 2, [2.0**-12] * 2, 1.0, dtype) == 1 + 2.0**-23
        assert one_product([2.0**-12], [2.0**-12], 1.0, dtype) == 1
        assert one_product([2.0**-12], [-(2.0**-12)], 1.0, dtype) == 1 - 2.0**-24
    with interpreter_arithmetic.exact():
        assert one_product([1 + 1.75 * low], [1.0], precision="tf32") == 1 + 1.75 * low
        assert one_product([1.75 * low], [2.0**-14], 1.0, torch.float16) == 1 + 2.0**-23


@runs
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_what_is_not_finite(precision):
    inf, nan = float("inf"), float("nan")
    assert one_product([inf], [2.0], 1.0, precision=precision) == inf
    assert one_product([2.0, 1.0], [-inf, 3.0], 1.0, precision=precision) == -inf
    for x, y in ([inf, inf], [1.0, -1.0]), ([nan], [1.0]), ([inf], [0.0]):
        assert one_product(x, y, precision=precision) != one_product(x, y, precision=precision)


@runs
@pytest.mark.parametrize(
    ("name", "ulps"), [("exp2", 2), ("exp", 2), ("sqrt", 1), ("log", 1), ("divide", 2)], ids=str
)
def test_functions_are_off_by_their_bound(name, ulps):
    x, y = 20 * torch.rand(2, 2048) + 0.01
    x, y = (-x if name == "exp2" else x), y + 1
    if name == "exp":
        x = x / 32  # its own argument is rounded, too
    exact = {"divide": torch.div}.get(name) or (lambda x, _: getattr(torch, name)(x))
    got, truth = function(name, x, y), exact(x.double(), y.double())
    unit = truth.abs().log2().floor().sub(23).exp2()
    error = ((got.double() - truth) / unit).abs()
    allowed = ulps + (x.abs() * 1.5 if name == "exp" else 0)
    assert bool((error <= allowed).all())
    assert error.max() > ulps - 0.25
    assert torch.equal(got, function(name, x, y))
    if name in ("sqrt", "divide"):
        with interpreter_arithmetic.exact():
            assert torch.equal(function(name, x, y), truth.float())


@runs
def test_exact_results():
    zero, inf = torch.zeros(16), float("inf")
    assert bool((function("exp2", zero) == 1).all())
    assert bool((function("exp", zero) == 1).all())
    assert bool((function("exp2", zero - inf) == 0).all())
    assert bool((function("sqrt", zero) == 0).all())
    assert bool((function("divide", zero + 1, zero) == inf).all())
    assert bool(function("divide", zero, zero).isnan().all())


@runs
def test_bfloat16_is_rounded_to_even():
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    bits[:8] = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0, 1])
    x = bits.view(torch.float32)
    assert torch.equal(function("", x, dtype=torch.bfloat16).nan_to_num(7), x.bfloat16().nan_to_num(7))
    y = x.bfloat16()
    assert torch.equal(function("", y).nan_to_num(7), y.float().nan_to_num(7))
    with pytest.raises(triton.runtime.errors.InterpreterError, match="convert to float32 first"):
        function("twice", y[:16])


@runs
def test_one_product_of_tf32_is_seen(monkeypatch):
    """What torch's setting allows is too little for float32's budget; exact arithmetic does not notice."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    q, k = torch.randn(2, 1, 3, 33, 32)
    truth = formulas.attention_gram(q.double(), k.double(), 1.0)
    plain = formulas.attention_gram(q, k, 1.0)

    def within_budget():
        got = truth + triton_kernels.attention_gram_fwd(q, k, 1.0, None, None, 1.0)[0] - centred
        assert_within_budget(got, plain, truth, torch.float32, "gram")

    centred = formulas.attention_gram(q.double(), k.double(), 1.0, centered=True)
    within_budget()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with pytest.raises(AssertionError, match="gram: error"):
        within_budget()
    with interpreter_arithmetic.exact():
        within_budget()


# Run on its own: the interpreter compiles nothing.
SCRIPT = """
import json
import sys
import triton
from test_triton_arithmetic import _function, _product
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def ptx(capability, kernel, signature, *constants):
    kinds = signature | dict.fromkeys(kernel.arg_names[3:], "constexpr")
    source = ASTSource(kernel, kinds, {(3 + i,): value for i, value in enumerate(constants)})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

pointers = dict.fromkeys("XYZ", "*fp32")
found = {name: ptx(90, _function, pointers, name, 32) for name in ("exp", "exp2", "sqrt", "divide")}
for capability in (80, 90, 100):
    for precision in ("tf32", "tf32x3", "ieee"):
        found[f"{capability} {precision}"] = ptx(capability, _product, pointers, 16, precision)
json.dump(found, sys.stdout)
"""


def test_the_ptx_is_as_modelled(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": python_path(), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    ptx = json.loads(run.stdout)
    assert "ex2.approx.f32" in ptx["exp"]
    assert "ex2.approx.ftz.f32" in ptx["exp2"]
    assert "sqrt.approx.ftz.f32" in ptx["sqrt"]
    assert "div.full.f32" in ptx["divide"]
    for capability in (80, 90, 100):
        one, three, none = (ptx[f"{capability} {precision}"] for precision in ("tf32", "tf32x3", "ieee"))
        products = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*tf32")
        assert len(products.findall(three)) > len(products.findall(one)) > 0
        # what rounding took away is passed on as it is
        assert "cvt.rna.tf32" not in one
        assert three.count("cvt.rna.tf32") == three.count("sub.f32") > 0
        assert "tf32" not in none
