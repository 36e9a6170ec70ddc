"""What losses/README.md says about cost is what happens: the largest intermediate of each closed form."""

import inspect
import re

import pytest
import torch
from conftest import need
from places import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitdiv_kernels import losses, use_backend

# Sizes apart from each other, so that a number of elements tells what a tensor is.
B, N, D, H, WIDTH, CLASSES = 2, 211, 13, 3, 7, 17
README = ROOT / "vitdiv_kernels" / "losses" / "README.md"


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns; views count as they are."""

    def __init__(self):
        super().__init__()
        self.elements, self.shape = 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.elements:
                self.elements, self.shape = tensor.numel(), tuple(tensor.shape)
        return out


def tokens():
    return torch.randn(B, N, D, requires_grad=True)


def heads():
    return torch.randn(B, H, N, WIDTH, requires_grad=True)


def weights():
    return torch.randn(B, N, D, requires_grad=True)


def context():
    return torch.randn(B, N - 15, D, requires_grad=True)  # 14 x 14 patches


LOGITS = B * N * CLASSES
# loss, its inputs, the number of elements of what it may make: that of its inputs, or of D x D matrices
CLOSED = {
    "pairwise_cosine": (lambda x: losses.pairwise_cosine(x, penalty="signed"), [tokens], B * N * D),
    "pairwise_cosine between": (
        lambda x, y: losses.pairwise_cosine(x, y, penalty="signed"), [tokens, tokens], B * N * D,
    ),
    "pairwise_cosine square": (lambda x: losses.pairwise_cosine(x, penalty="square"), [tokens], B * N * D),
    "patch_contrast": (losses.patch_contrast, [tokens, tokens], B * N * D),
    "neighbourhood_contrast": (losses.neighbourhood_contrast, [context, context], B * N * D),
    "patch_soft_orthogonality": (losses.patch_soft_orthogonality, [tokens], B * N * D),
    "patch_condition_orthogonality": (losses.patch_condition_orthogonality, [tokens], B * N * D),
    "patch_mixing": (
        lambda z: losses.patch_mixing(z, torch.zeros(B).long(), torch.ones(B).long(), torch.rand(N)),
        [lambda: torch.randn(B, N, CLASSES, requires_grad=True)],
        LOGITS,
    ),
    "region_masks": (lambda x: x.sum() * losses.region_masks((N, 1)).sum(), [tokens], B * N * D),
    "region_means": (
        lambda x: losses.region_means(x, torch.ones(2, x.shape[1], 1)), [tokens], B * N * D,
    ),
    "region_mixing": (
        lambda z: losses.region_mixing(z, torch.ones(z.shape) / CLASSES, torch.ones(z.shape[1], N, 1)),
        [lambda: torch.randn(B, 2, CLASSES, requires_grad=True)],
        B * N * D,
    ),
    "weight_condition_orthogonality": (losses.weight_condition_orthogonality, [weights], B * N * D),
    "gram_anchoring": (losses.gram_anchoring, [tokens, tokens], B * N * D),
    "gram_anchoring of a batch": (
        lambda x, y: losses.gram_anchoring(x, y, level="batch"), [tokens, tokens], B * N * D,
    ),
    "linear_cka": (losses.linear_cka, [tokens, tokens], B * N * D),
    "gradient_diversity": (losses.gradient_diversity, [tokens], B * N * D),
}  # fmt: skip
# by tiles in a fused kernel: nothing larger than the inputs either, or than two bits a pair, in words of 32
SIGNS = B * N * 2 * ((N + 31) // 32)
TILES = {
    "pairwise_cosine abs": (losses.pairwise_cosine, [tokens], SIGNS),
    "weight_soft_orthogonality": (losses.weight_soft_orthogonality, [weights], B * N * D),
    "patch_mhs": (losses.patch_mhs, [tokens], B * N * D),
    "weight_mhs": (losses.weight_mhs, [weights], B * N * D),
    "koleo": (losses.koleo, [tokens], B * N * D),
    # as info_nce
    "region_contrast": (losses.region_contrast, [context], 2 * B * N * D),
    "uniformity": (losses.uniformity, [tokens], B * N * D),
    # the gradients of both, made in the forward, are one tensor
    "info_nce": (losses.info_nce, [tokens, tokens], 2 * B * N * D),
    "vf_loss": (losses.vf_loss, [tokens, tokens], 2 * B * N * D),
    "gram_anchoring without negatives": (
        lambda x, y: losses.gram_anchoring(x, y, negatives="remove"), [tokens, tokens], 2 * B * N * D,
    ),
    "attention_diversity": (losses.attention_diversity, [heads, heads], B * H * N * WIDTH),
    "head_cross_cosine": (losses.head_cross_cosine, [heads] * 4, 2 * B * H * N * WIDTH),
    "head_contrast": (losses.head_contrast, [heads] * 4, 2 * B * H * N * WIDTH),
    "head_mhs": (losses.head_mhs, [heads, heads], B * H * N * WIDTH),
    "head_mgd": (losses.head_mgd, [heads, heads], B * H * N * WIDTH),
    "head_soft_orthogonality": (losses.head_soft_orthogonality, [heads, heads], B * H * N * WIDTH),
    "head_condition_orthogonality": (losses.head_condition_orthogonality, [heads, heads], B * H * N * WIDTH),
}  # fmt: skip
# rows in turn
ROWS = {
    "cos_reg": (lambda *x: losses.cos_reg([x[:2], x[2:]], rows=8), [heads] * 4, B * H * N * 8),
    "layer_similarity": (
        lambda *x: losses.layer_similarity([x[:2], x[2:]], rows=8), [heads] * 4, B * H * N * 8,
    ),
}  # fmt: skip


def with_shares(logits):
    labels = torch.zeros(B).long()
    return losses.patch_mixing(logits, labels, labels + 1, torch.linspace(0, 1, logits.shape[1]))


def largest(loss, inputs):
    with Largest() as mode:
        loss(*(make() for make in inputs)).sum().backward()
    return mode


@pytest.mark.parametrize("name", CLOSED | ROWS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_closed_form_makes_all_pairs(name, backend):
    need(backend)
    loss, inputs, elements = (CLOSED | ROWS)[name]
    with use_backend(backend):
        mode = largest(loss, inputs)
    assert mode.elements <= elements < N * N * B, f"an intermediate of shape {mode.shape}"


@pytest.mark.parametrize("name", TILES)
def test_no_tile_kernel_makes_all_pairs(name):
    need("native")
    loss, inputs, elements = TILES[name]
    mode = largest(loss, inputs)
    assert mode.elements <= elements < N * N * B, f"an intermediate of shape {mode.shape}"


def test_linear_cka_counts_the_wider_features():
    """In tiles where the features of either are wider than three quarters of the patches are many."""
    need("native")
    x = torch.randn(B, 64, 8, requires_grad=True), torch.randn(B, 64, 256, requires_grad=True)
    for inputs in (x, x[::-1]):
        assert largest(losses.linear_cka, [lambda a=a: a for a in inputs]).elements <= B * 64 * (256 + 8)


@pytest.mark.parametrize("name", ROWS)
def test_rows_in_turn_are_not_kept_for_the_backward(name):
    saved = []
    loss, inputs, elements = ROWS[name]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss(*(make() for make in inputs)).sum()
    assert 0 < max(saved) < elements


@pytest.mark.parametrize(
    ("loss", "inputs"),
    [
        (lambda x: losses.pairwise_cosine(x, backend="reference"), [tokens]),
        (lambda x: losses.patch_mgd(x), [tokens]),
        (lambda x: losses.koleo(x, backend="reference"), [tokens]),
    ],
)
def test_the_mode_sees_all_pairs_where_they_are(loss, inputs):
    assert largest(loss, inputs).elements >= B * N * N


COMPILED = [
    "patch_contrast",
    "neighbourhood_contrast",
    "patch_condition_orthogonality",
    "patch_mixing",
    "weight_soft_orthogonality",
    "gram_anchoring",
    "koleo",
    "uniformity",
    "info_nce",
    "head_condition_orthogonality",
    "region_mixing",
    "region_contrast",
]


@pytest.mark.parametrize(
    ("loss", "inputs"),
    [
        *((CLOSED | TILES)[name][:2] for name in COMPILED),
        (lambda *x: losses.cos_reg([x[:2], x[2:]], rows=128), [heads] * 4),
    ],
    ids=[*COMPILED, "cos_reg"],
)
def test_losses_compile_whole(loss, inputs):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = [make() for make in inputs]
    results = []
    for function in (compiled, loss):
        torch.manual_seed(1)  # of start vectors
        value = function(*x)
        results.append((value, *torch.autograd.grad(value, x, allow_unused=True)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", CLOSED | TILES | ROWS)
def test_a_second_derivative_raises_or_is_right(name):
    """Also where only a part of a loss is differentiable once, and another way leads around that."""
    loss, inputs, _ = (CLOSED | TILES | ROWS)[name]
    x = [make()[..., :12, :].detach().double().requires_grad_() for make in inputs]
    if name in ("neighbourhood_contrast", "region_contrast"):
        x = [each.detach()[:, :9].requires_grad_() for each in x]
    if name == "neighbourhood_contrast":
        x[1].requires_grad_(False)  # a target
    if name == "patch_mixing":
        loss = with_shares
    try:
        assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)
    except RuntimeError as error:
        if "differentiable once" not in str(error):
            raise


@pytest.mark.parametrize("name", ["koleo", "uniformity", "info_nce", "vf_loss"])
def test_the_reference_may_be_differentiated_twice(name):
    loss, inputs, _ = TILES[name]
    x = [make()[..., :12, :].detach().double().requires_grad_() for make in inputs]
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)


def test_the_table_has_every_loss():
    rows = re.findall(r"^\| `(\w+)", README.read_text(), re.MULTILINE)
    functions = [name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))]
    assert sorted(set(rows)) == sorted(functions)
    assert sorted(losses.__all__) == sorted(functions)


def test_every_loss_of_the_table_that_is_closed_is_measured_here():
    text = README.read_text()
    closed = re.findall(r"^\| `(\w+)[^|]*\|[^|]*\| closed form", text, re.MULTILINE)
    assert closed
    measured = {name.split()[0] for name in CLOSED} | {
        "cutmix_shares",
        "patch_targets",
        "similar_block_ratio",
    }
    assert set(closed) <= measured
