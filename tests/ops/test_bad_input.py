"""Bad input gets a TypeError or ValueError that names the argument, what was given and what was expected."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import vitdiv_kernels as vd
from vitdiv_kernels import _dispatch, _native, losses
from vitdiv_kernels.ops.pairs.pairwise_rows import pairwise_logsumexp
from vitdiv_kernels.ops.pairs.two_gram import two_gram

X = torch.randn(2, 5, 8)
Q = torch.randn(2, 3, 5, 8)
V3 = torch.ones(3)
MIX = torch.eye(3)


def pairwise(x=X, y=None, **options):
    return vd.pairwise_cosine(x, y, **options)


def gram(q=Q, k=Q, **options):
    return vd.attention_gram(q, k, **options)


def cosine(q=Q, k=Q, q2=Q, k2=Q, **options):
    return vd.attention_cosine(q, k, q2, k2, **options)


def diversity(q=Q, k=Q, **options):
    return vd.attention_diversity(q, k, **options)


def reattention(q=Q, k=Q, v=Q, mix=MIX, **options):
    return vd.reattention(q, k, v, mix, **options)


def normed(**options):
    return reattention(norm="batch", training=True, **options)


# call, its arguments, the error, and what the sentence must contain
BAD = [
    (pairwise, dict(x=[[1.0, 2.0]]), TypeError, ["x must be a torch.Tensor", "list"]),
    (pairwise, dict(x=torch.randn(8)), ValueError, ["x", "[..., N, D]", "[8]"]),
    (pairwise, dict(x=X.int()), TypeError, ["x", "float32", "int32"]),
    (pairwise, dict(x=X.to(torch.complex64)), TypeError, ["x", "complex64"]),
    (
        pairwise,
        dict(x=torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)),
        TypeError,
        ["x", "nested", "each of its"],
    ),
    (pairwise, dict(x=X.to_sparse()), TypeError, ["x", "torch.sparse_coo", "x.to_dense()"]),
    (pairwise, dict(y=X.to_mkldnn()), TypeError, ["y", "torch._mkldnn", "y.to_dense()"]),
    (reattention, dict(mix=MIX.to_sparse()), TypeError, ["mix", "torch.sparse_coo", "mix.to_dense()"]),
    (pairwise, dict(x=X[:, :1]), ValueError, ["x", "N >= 2", "include_self", "[2, 1, 8]"]),
    (pairwise, dict(x=X[:, :0]), ValueError, ["x", "[2, 0, 8]"]),
    (pairwise, dict(x=X[..., :0]), ValueError, ["x", "[2, 5, 0]"]),
    (pairwise, dict(y=3.0), TypeError, ["y must be a torch.Tensor", "float"]),
    (pairwise, dict(y=X[:, :0]), ValueError, ["y", "at least one"]),
    (pairwise, dict(y=X[..., :7]), ValueError, ["y", "[2, M, 8]", "[2, 5, 7]"]),
    (pairwise, dict(y=X[:1]), ValueError, ["y", "[2, M, 8]", "[1, 5, 8]"]),
    (pairwise, dict(y=X[0]), ValueError, ["y", "[2, M, 8]", "[5, 8]"]),
    (pairwise, dict(y=X.double()), TypeError, ["y", "float32", "float64"]),
    (pairwise, dict(y=X.to("meta")), ValueError, ["y", "cpu", "meta"]),
    (pairwise, dict(y=X, include_self=True), ValueError, ["include_self", "y"]),
    (pairwise, dict(penalty="l1"), ValueError, ["penalty", "'signed', 'abs', 'square', 'relu'", "'l1'"]),
    (pairwise, dict(reduction="max"), ValueError, ["reduction", "'mean', 'sum', 'none'", "'max'"]),
    (pairwise, dict(eps=-1.0), ValueError, ["eps", "-1.0"]),
    (pairwise, dict(eps="small"), TypeError, ["eps", "str"]),
    (pairwise, dict(backend="gpu"), ValueError, ["backend", "'reference', 'native', 'triton'", "'gpu'"]),
    (pairwise, dict(backend="triton"), RuntimeError, ["triton", "pairwise_cosine", "not"]),
    (gram, dict(q=None), TypeError, ["q must be a torch.Tensor", "NoneType"]),
    (gram, dict(q=Q[0]), ValueError, ["q", "[B, H, N, d]", "[3, 5, 8]"]),
    (gram, dict(k=Q[:, :2]), ValueError, ["k", "[2, 3, M, 8]", "[2, 2, 5, 8]"]),
    (gram, dict(k=Q[:1]), ValueError, ["k", "[2, 3, M, 8]", "[1, 3, 5, 8]"]),
    (gram, dict(k=Q[..., :4]), ValueError, ["k", "[2, 3, M, 8]", "[2, 3, 5, 4]"]),
    (gram, dict(k=Q[:, :, :0]), ValueError, ["k", "at least one", "[2, 3, 0, 8]"]),
    (gram, dict(k=Q.half()), TypeError, ["k", "float32", "float16"]),
    (gram, dict(q=Q.long(), k=Q.long()), TypeError, ["q", "int64"]),
    (gram, dict(k=Q.to("meta")), ValueError, ["k", "cpu", "meta"]),
    (gram, dict(scale="d"), TypeError, ["scale", "str"]),
    (gram, dict(scale=1j), TypeError, ["scale", "complex"]),
    (gram, dict(scale=np.complex64(1)), TypeError, ["scale", "complex64"]),
    (gram, dict(scale=np.ones(1)), TypeError, ["scale", "ndarray"]),
    (gram, dict(scale=torch.tensor(0.5)), TypeError, ["scale", "got a tensor", "scale.item()"]),
    (gram, dict(backend="native "), ValueError, ["backend", "'native '"]),
    (cosine, dict(k2=None), ValueError, ["q2 and k2", "q2 without k2"]),
    (cosine, dict(q2=None), ValueError, ["q2 and k2", "k2 without q2"]),
    (cosine, dict(q2=Q[:, :, :4]), ValueError, ["q2", "[2, H2, 5, d2]", "[2, 3, 4, 8]"]),
    (cosine, dict(k2=Q[:, :, :4]), ValueError, ["k2", "[2, H2, 5, d2]", "[2, 3, 4, 8]"]),
    (cosine, dict(q2=Q.double(), k2=Q.double()), TypeError, ["q2", "float32", "float64"]),
    (cosine, dict(q2=Q[:1], k2=Q[:1]), ValueError, ["q2", "[2, H2, 5, d2]", "[1, 3, 5, 8]"]),
    (diversity, dict(penalty="cube"), ValueError, ["penalty", "'square'", "'cube'"]),
    (diversity, dict(reduction=None), ValueError, ["reduction", "'mean'", "None"]),
    (
        diversity,
        dict(q=Q[:, :1], k=Q[:, :1], include_self=False),
        ValueError,
        ["q", "H >= 2", "[2, 1, 5, 8]"],
    ),
    (reattention, dict(v=Q[:, :, :4]), ValueError, ["v", "[2, 3, 5, 8]", "[2, 3, 4, 8]"]),
    (reattention, dict(v=Q.double()), TypeError, ["v", "float32", "float64"]),
    (reattention, dict(mix=torch.eye(4)), ValueError, ["mix", "[H, H] with H = 3", "[4, 4]"]),
    (reattention, dict(mix=MIX[None]), ValueError, ["mix", "[1, 3, 3]"]),
    (reattention, dict(mix=MIX.long()), TypeError, ["mix", "int64"]),
    (reattention, dict(mix=MIX.half()), TypeError, ["mix", "float32", "float16"]),
    (reattention, dict(mix=MIX.double()), TypeError, ["mix", "float32", "float64"]),
    (reattention, dict(mix=None), TypeError, ["mix", "NoneType"]),
    (reattention, dict(mix_bias=torch.ones(4)), ValueError, ["mix_bias", "[H] with H = 3", "[4]"]),
    (reattention, dict(pre_mix=torch.ones(3, 4)), ValueError, ["pre_mix", "[3, 4]"]),
    (reattention, dict(pre_bias=V3), ValueError, ["pre_bias", "pre_mix"]),
    (reattention, dict(norm="group"), ValueError, ["norm", "'none', 'batch', 'layer'", "'group'"]),
    (reattention, dict(norm_weight=V3), ValueError, ["norm_weight", "norm"]),
    (reattention, dict(norm="layer", norm_weight=V3[:2]), ValueError, ["norm_weight", "[2]"]),
    (
        reattention,
        dict(norm="layer", running_mean=V3, running_var=V3),
        ValueError,
        ["running_mean", "'layer'"],
    ),
    (reattention, dict(norm="batch"), ValueError, ["running_mean and running_var", "training"]),
    (reattention, dict(norm="batch", running_mean=V3), ValueError, ["running_mean without running_var"]),
    (normed, dict(running_mean=V3, running_var=V3[:1]), ValueError, ["running_var", "[1]"]),
    (normed, dict(running_mean=V3.double(), running_var=V3.double()), TypeError, ["running_mean", "float64"]),
    (normed, dict(q=Q[:1, :, :1], k=Q[:1, :, :1], v=Q[:1, :, :1]), ValueError, ["more than 1 value"]),
    (reattention, dict(dropout_p=1.5), ValueError, ["dropout_p", "1.5"]),
    (reattention, dict(dropout_p=-0.5), ValueError, ["dropout_p", "-0.5"]),
    (reattention, dict(out_scale=None), TypeError, ["out_scale", "NoneType"]),
    (reattention, dict(eps=float("nan")), ValueError, ["eps", "nan"]),
    (reattention, dict(dropout_p=0.1, training=True, backend="native"), ValueError, ["dropout", "reference"]),
    (vd.use_backend, dict(backend="cuda"), ValueError, ["backend", "'native'", "'cuda'"]),
    (vd.nn.ReAttention, dict(dim=10, num_heads=3), ValueError, ["num_heads", "3", "10"]),
    (vd.nn.ReAttention, dict(dim=12, num_heads=3, norm="group"), ValueError, ["norm", "'batch'", "'group'"]),
    (vd.nn.ReAttention, dict(dim=12, num_heads=3, mix_init="zero"), ValueError, ["mix_init", "'zero'"]),
    (vd.nn.ReAttention, dict(dim=12, num_heads=3, qk_norm=True), ValueError, ["norm_layer", "qk_norm"]),
    (vd.nn.TalkingHeadsAttention, dict(dim=10, num_heads=3), ValueError, ["num_heads", "3", "10"]),
    (vd.nn.TalkingHeadsAttention, dict(dim=12, num_heads=3, attn_drop=0.1), ValueError, ["attn_drop", "0.1"]),
    (
        vd.nn.PatchCosineLoss,
        dict(num_prefix_tokens=-1),
        ValueError,
        ["num_prefix_tokens", "0, got -1"],
    ),
    (vd.nn.KoLeoLoss, dict(num_prefix_tokens=1.5), ValueError, ["num_prefix_tokens", "an integer", "1.5"]),
]


@pytest.mark.parametrize(("call", "arguments", "error", "words"), BAD)
def test_the_sentence(call, arguments, error, words):
    with pytest.raises(error) as caught:
        call(**arguments)
    for word in words:
        assert word in str(caught.value)


def mixing(smoothing):
    labels, shares = torch.tensor([0, 1]), torch.rand(5)
    soft = losses.patch_targets(labels, labels.flip(0), shares, num_classes=8, smoothing=smoothing)
    return soft.sum() + losses.patch_mixing(X, labels, labels.flip(0), shares, smoothing=smoothing)


def weak_norm(eps, out_scale):
    return normed(eps=eps, out_scale=out_scale)


NINE = torch.randn(2, 9, 8)
# call, its arguments as numbers of Python that float32 holds exactly
NUMBERS = [
    (pairwise, dict(eps=4.0)),
    (gram, dict(scale=0.5)),
    (weak_norm, dict(eps=0.5, out_scale=2)),
    (
        lambda momentum: normed(running_mean=V3.clone(), running_var=V3.clone(), momentum=momentum),
        dict(momentum=0.5),
    ),
    (lambda scale: pairwise_logsumexp(X, scale=scale), dict(scale=4.0)),
    (
        lambda margin, eps: two_gram(X, X + 1, penalty="hinge", margin=margin, eps=eps),
        dict(margin=0.25, eps=4.0),
    ),
    (lambda t, eps: losses.uniformity(X, t=t, eps=eps), dict(t=2, eps=4.0)),
    (
        lambda temperature, eps: losses.info_nce(X, X + 1, temperature=temperature, eps=eps),
        dict(temperature=0.5, eps=4.0),
    ),
    (
        lambda **options: losses.vf_loss(X, X + 1, **options),
        dict(distance_margin=0.25, cosine_margin=0.5, distance_weight=2, cosine_weight=0.5),
    ),
    (lambda ridge: losses.patch_mgd(X, ridge=ridge), dict(ridge=0.5)),
    (lambda eps: losses.patch_contrast(X, X + 1, eps=eps), dict(eps=4.0)),
    (
        lambda window, side: losses.neighbourhood_contrast(NINE, NINE + 1, window=window, grid=(side, side)),
        dict(window=3, side=3),
    ),
    (mixing, dict(smoothing=0.25)),
    (
        lambda size, grid: losses.cutmix_shares((1, 5, 2, 6), image_size=size, grid=(grid, grid)),
        dict(size=8, grid=4),
    ),
    (
        lambda scale, rows: losses.layer_similarity([(Q, Q), (Q + 1, Q)], scale=scale, rows=rows),
        dict(scale=0.5, rows=2),
    ),
    (lambda prefix: vd.nn.PatchCosineLoss(num_prefix_tokens=prefix)(X), dict(prefix=2)),
]


@pytest.mark.parametrize(("call", "numbers"), NUMBERS)
@pytest.mark.parametrize("kind", ["scalar", "zero-dimensional"])
def test_numbers_of_numpy_are_those_of_python(call, numbers, kind):
    def converted(number):
        if isinstance(number, int):
            return np.int64(number)
        return np.float32(number) if kind == "scalar" else np.array(number, np.float32)

    torch.manual_seed(0)
    expected = call(**numbers)
    torch.manual_seed(0)
    out = call(**{name: converted(number) for name, number in numbers.items()})
    assert type(out) is torch.Tensor
    assert torch.equal(out, expected)


@pytest.mark.parametrize("mask", [dict(attn_mask=torch.ones(5, 5)), dict(is_causal=True)])
def test_masks_are_refused(mask):
    with pytest.raises(ValueError, match="attn_mask"):
        vd.nn.ReAttention(8, 2)(torch.randn(1, 5, 8), **mask)


def test_an_absent_backend_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(_dispatch, "_NATIVE_MISSING", "the kernels are not compiled: run this")
    with pytest.raises(
        RuntimeError, match=r"native.*pairwise_cosine.*the kernels are not compiled: run this"
    ):
        pairwise(backend="native")
    with vd.use_backend("native"), pytest.raises(RuntimeError, match=r"use_backend.*not compiled"):
        pairwise()
    torch.testing.assert_close(pairwise(), pairwise(backend="reference"))
    choice, reason = _dispatch.auto_choice("pairwise_cosine", "cpu")
    assert choice == "reference"
    assert "not compiled" in reason


def test_native_kernels_are_for_cpu_and_cuda_tensors():
    with pytest.raises(RuntimeError, match="CPU and CUDA tensors, got meta"):
        pairwise(x=X.to("meta"), backend="native")


class Gpu:
    name, major, minor = "Tesla T4", 7, 5


class NewGpu:
    name, major, minor = "RTX 5090", 12, 0


class Library:
    cuda_architectures = "80-real 90-real"
    runtime, driver = 12080, 12020  # a driver runs all runtimes of its major version

    @classmethod
    def cuda_runtime_version(cls):
        return cls.runtime

    @classmethod
    def cuda_driver_version(cls):
        return cls.driver


def test_native_says_what_is_missing_on_a_gpu(monkeypatch):
    def missing(operation="attention_gram"):
        return _dispatch.missing("native", "cuda", operation=operation)

    monkeypatch.setattr(_native, "library", lambda: Library)
    monkeypatch.setattr(_native, "CUDA_OPERATIONS", ("attention_gram",))
    monkeypatch.setattr(_dispatch, "_NATIVE_MISSING", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in missing()
    assert "no CUDA kernel for reattention" in missing("reattention")
    monkeypatch.setattr(_native, "OPERATIONS", ("attention_gram",))
    assert _dispatch.missing("native", "cpu", operation="attention_gram") is None
    assert "no compiled kernel for reattention" in _dispatch.missing("native", "cpu", operation="reattention")
    assert _dispatch.resolve("reattention", "cpu", "auto") == "reference"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for gpu, words in [
        (Gpu, "CUDA kernels need a GPU of compute capability 8.0 or newer (Ampere), and Tesla T4 has 7.5"),
        (NewGpu, "compiled for 80-real 90-real, and RTX 5090 has compute capability 12.0: reinstall"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        assert words in missing()
    monkeypatch.setattr(Library, "cuda_architectures", "80-real 90")
    assert missing() is None
    assert missing(None) is None
    assert _dispatch.resolve("attention_gram", "cuda", "native") == "native"
    monkeypatch.setattr(Library, "runtime", 13000)
    for words in (
        "compiled with CUDA 13.0, which needs an NVIDIA driver for CUDA 13 (580 or newer), and the driver",
        "the driver here is for CUDA 12.2: update the driver, or reinstall from the source tree with CUDACXX",
        "CUDACXX naming an nvcc of CUDA 12",
    ):
        assert words in missing()
    monkeypatch.setattr(Library, "driver", 13000)
    assert missing() is None
    monkeypatch.setattr(Library, "cuda_architectures", "")
    assert "compiled for CPUs only" in missing()
    assert "VITDIV_CUDA=1" in missing()
    monkeypatch.setattr(_dispatch, "_NATIVE_MISSING", "the kernels are not compiled: run this")
    assert missing() == "the kernels are not compiled: run this"


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not_run"),
    [
        ("80-real 90-real 100 120-real", [(8, 0), (8, 9), (9, 0), (10, 0), (11, 0), (12, 1)], [(7, 5)]),
        ("80-real", [(8, 0), (8, 6)], [(7, 5), (9, 0)]),
        ("86-real 90", [(8, 6), (8, 9), (9, 0), (10, 3)], [(8, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_which_gpus_compiled_kernels_run_on(architectures, runs, does_not_run):
    assert all(_native.runs_on(architectures, *gpu) for gpu in runs)
    assert not any(_native.runs_on(architectures, *gpu) for gpu in does_not_run)


def test_triton_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(_dispatch, "_TRITON_MISSING", "Triton is not installed: do this")
    for device, words in [("cpu", "run on CUDA tensors; on CPU"), ("meta", "CUDA tensors only, got meta")]:
        assert words in _dispatch.missing("triton", device)
    monkeypatch.setattr(_dispatch, "_INTERPRETED", True)
    assert _dispatch.missing("triton", "cpu") == "Triton is not installed: do this"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in _dispatch.missing("triton", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    assert "8.0 or newer (Ampere), and Tesla T4 has 7.5" in _dispatch.missing("triton", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: NewGpu)
    assert _dispatch.missing("triton", "cuda") == "Triton is not installed: do this"
    monkeypatch.setattr(_dispatch, "_TRITON_MISSING", None)
    assert _dispatch.missing("triton", "cuda") is None


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (None, "Triton is not installed"),
        ("__version__ = '3.4.0'", "need Triton 3.5 or newer, and this is 3.4: install torch 2.9 or newer"),
        ('x = 1\n__version__ = "2.9.1+git0"', "and this is 2.9"),
        ("__version__ = '3.5.0'", None),
        ("__version__ = '3.10.0'", None),
        ("__version__ = '4.0.0'", None),
        ("from .version import __version__", None),
    ],
)
def test_a_triton_too_old_is_named(contents, words, tmp_path, monkeypatch):
    package = tmp_path / "a_triton"
    package.mkdir()
    if contents is not None:
        (package / "__init__.py").write_text(contents)
    monkeypatch.syspath_prepend(tmp_path)
    why_not = _dispatch._no_triton(importlib.util.find_spec("a_triton"))
    assert (why_not is None) if words is None else (words in why_not)
    assert "not installed" in _dispatch._no_triton(importlib.util.find_spec("no_such_package"))


def test_the_gpu_that_is_asked_is_that_of_the_tensors(monkeypatch):
    """Of a machine with an old and a new one."""
    monkeypatch.setattr(_native, "library", lambda: Library)
    monkeypatch.setattr(_native, "CUDA_OPERATIONS", ("attention_gram",))
    monkeypatch.setattr(Library, "cuda_architectures", "120-real")
    for absent in ("_NATIVE_MISSING", "_TRITON_MISSING"):
        monkeypatch.setattr(_dispatch, absent, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", [Gpu, NewGpu].__getitem__)
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    for current, device, fit in [(0, first, False), (0, second, True), (0, "cuda", False), (1, "cuda", True)]:
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        by_table = _dispatch.resolve("attention_gram", device, "auto")
        assert by_table == ("triton" if fit else "reference")
        for backend in ("native", "triton"):
            why_not = _dispatch.missing(backend, device, operation="attention_gram")
            assert fit == (why_not is None)
            assert fit or "Tesla T4 has 7.5" in why_not


@pytest.mark.parametrize(
    ("operation", "call"),
    [("pairwise_cosine", pairwise), ("attention_gram", gram), ("reattention", reattention)],
)
def test_calls_are_resolved_for_the_device_of_their_tensors(operation, call, monkeypatch):
    asked = []

    def resolve(operation, device, backend, condition=None):
        asked.append((operation, device))
        return "reference"

    monkeypatch.setattr(_dispatch, "resolve", resolve)
    call()
    assert asked == [(operation, torch.device("cpu"))]


def test_what_triton_does_not_support_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(_dispatch, "_TRITON_MISSING", None)
    monkeypatch.setattr(_dispatch, "_triton_absent_on", lambda device: None)
    for operation in _dispatch.OPERATIONS:
        assert _dispatch.resolve(operation, "cuda", "auto") == "triton"
    for operation in ("attention_gram", "reattention"):
        assert _dispatch.resolve(operation, "cuda", "auto", _dispatch.MANY_HEADS) == "reference"
        assert _dispatch.resolve(operation, "cpu", "auto", _dispatch.MANY_HEADS) != "triton"
    many = torch.randn(1, 33, 2, 4)
    with pytest.raises(ValueError, match="at most 32 heads"):
        gram(q=many, k=many, backend="triton")
    with pytest.raises(ValueError, match="at most 32 heads"):
        reattention(q=many, k=many, v=many, mix=torch.eye(33), backend="triton")


def test_use_backend_nests_and_a_call_can_overrule_it(monkeypatch):
    taken = []
    monkeypatch.setattr(_dispatch, "TABLE", ())  # the table must not be asked
    with vd.use_backend("reference"):
        with vd.use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
            pairwise()
        taken.append(pairwise())
        with vd.use_backend("triton"):
            taken.append(pairwise(backend="reference"))
        with pytest.raises(KeyError), vd.use_backend("triton"):
            raise KeyError
        taken.append(pairwise())
    assert all(torch.equal(value, taken[0]) for value in taken)


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        ("reference", "reference"),
        ("auto", None),
        ("", None),
        ("triton", 'RuntimeError: backend "triton" (set by the environment variable VITDIV_BACKEND)'),
        ("gpu", "VITDIV_BACKEND must be one of auto, reference, native, triton, got 'gpu'"),
    ],
)
def test_environment_variable(value, outcome):
    program = (
        "import torch, vitdiv_kernels as vd; vd.pairwise_cosine(torch.ones(2, 3));"
        "from vitdiv_kernels import _dispatch; print(_dispatch.resolve('pairwise_cosine', 'cpu', 'auto'))"
    )
    environment = os.environ | {"VITDIV_BACKEND": value, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    expected = outcome or _dispatch.auto_choice("pairwise_cosine", "cpu")[0]
    assert expected in (done.stdout if done.returncode == 0 else done.stderr)
