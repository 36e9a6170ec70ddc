"""The norm of the mixed maps: frozen, cumulative, and under gradient checkpointing."""

import copy

import published
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdiv_kernels.nn import ReAttention

pytestmark = pytest.mark.usefixtures("one_thread")


def made(**options):
    attn = ReAttention(24, 4, norm_gain=1.0, **options).double()
    attn.var_norm.running_mean.normal_(std=0.1)
    attn.var_norm.running_var.uniform_(0.5, 2)
    return attn


def by_timm(attn, torchvision):
    layers = pytest.importorskip("timm.layers")
    frozen = layers.freeze_batch_norm_2d(attn)
    assert type(frozen.var_norm).__name__ == "FrozenBatchNorm2d"
    return frozen


def by_timm_act(attn, torchvision):
    """What timm makes of its own batch norm, here without activation."""
    layers = pytest.importorskip("timm.layers")
    norm = attn.var_norm
    attn.var_norm = layers.FrozenBatchNormAct2d(4, apply_act=False, dtype=torch.float64)
    attn.var_norm.load_state_dict(norm.state_dict())
    return attn


def by_timm_utils(attn, torchvision):
    utils = pytest.importorskip("timm.utils")
    utils.freeze(attn)
    assert not any(parameter.requires_grad for parameter in attn.parameters())
    return attn.requires_grad_()


def by_torchvision(attn, torchvision):
    norm = attn.var_norm
    attn.var_norm = torchvision.ops.FrozenBatchNorm2d(4)
    attn.var_norm.double().load_state_dict(norm.state_dict())
    return attn


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("freeze", [by_timm, by_timm_act, by_timm_utils, by_torchvision])
def test_frozen_batch_norm(freeze, compiled, torchvision):
    """Its statistics are taken and kept, also in a module in training."""
    attn = freeze(made(), torchvision).train()
    assert attn.var_norm.training
    torch._dynamo.reset()
    forward = torch.compile(attn, fullgraph=True, backend="aot_eager") if compiled else None
    before = copy.deepcopy(list(attn.buffers()))
    published.assert_published(attn, forward=forward)
    for ours, theirs in zip(attn.buffers(), before, strict=True):
        assert torch.equal(ours, theirs)


def test_frozen_batch_norm_with_an_activation_is_refused(torchvision):
    layers = pytest.importorskip("timm.layers")
    attn = ReAttention(24, 4)
    attn.var_norm = layers.FrozenBatchNormAct2d(4)
    with pytest.raises(
        TypeError, match="var_norm must be without activation and dropout, got FrozenBatchNormAct2d"
    ):
        attn(torch.randn(2, 5, 24))


@pytest.mark.parametrize("compiled", [False, True])
def test_cumulative_statistics(compiled):
    """momentum=None: the running statistics are the means of those of all batches."""
    attn = made(momentum=None)
    attn.var_norm.reset_running_stats()
    torch._dynamo.reset()
    forward = torch.compile(attn, fullgraph=True, backend="aot_eager") if compiled else None
    published.assert_published(attn, steps=3, forward=forward)
    assert attn.var_norm.num_batches_tracked == 3


def blocks(count_recomputed, momentum):
    torch.manual_seed(2)
    options = {"count_recomputed": count_recomputed, "momentum": momentum, "norm_gain": 1.0}
    return nn.ModuleList(ReAttention(24, 4, **options) for _ in range(2)).double()


def through(modules, x, run):
    for module in modules:
        x = x + run(module, x)
    return x


RUNS = {
    "eager": lambda use_reentrant: lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant),
    "inside compile": lambda use_reentrant: lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant),
    "around compile": lambda use_reentrant: (
        lambda f, x: checkpoint(
            torch.compile(f, fullgraph=True, backend="aot_eager"), x, use_reentrant=use_reentrant
        )
    ),
    "nested": lambda use_reentrant: (
        lambda f, x: checkpoint(
            lambda x: checkpoint(f, x, use_reentrant=use_reentrant), x, use_reentrant=use_reentrant
        )
    ),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("run", RUNS)
def test_a_recomputation_need_not_count(run, use_reentrant, momentum):
    """The statistics and gradients are those of one pass without checkpointing."""
    if run == "inside compile" and use_reentrant:
        pytest.skip("torch.compile takes checkpoints without reentrance alone")
    modules, plain = blocks(False, momentum), blocks(True, momentum)
    torch._dynamo.reset()
    forward = through
    if run == "inside compile":
        forward = torch.compile(through, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(3, 7, 24, dtype=torch.float64, requires_grad=True)
        forward(modules, x, RUNS[run](use_reentrant)).square().sum().backward()
        through(plain, x, lambda f, x: f(x)).square().sum().backward()
    for (name, ours), theirs in zip(modules.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    for (name, ours), theirs in zip(modules.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_counts_as_that_of_torch(use_reentrant):
    attn = made()
    like = copy.deepcopy(attn)
    x = torch.randn(3, 7, 24, dtype=torch.float64, requires_grad=True)
    checkpoint(attn, x, use_reentrant=use_reentrant).sum().backward()
    checkpoint(lambda x: published.reattention(like, x), x, use_reentrant=use_reentrant).sum().backward()
    assert attn.var_norm.num_batches_tracked == 2
    torch.testing.assert_close(attn.var_norm.running_var, like.var_norm.running_var)


def test_what_counts_is_not_asked_of_the_reference_that_calls_modules():
    attn = ReAttention(24, 4, count_recomputed=False, backend="reference")
    attn.var_norm.register_forward_hook(lambda module, inputs, out: None)
    with pytest.raises(
        ValueError, match="count_recomputed must be True where the reference backend calls var_norm"
    ):
        attn(torch.randn(2, 5, 24))
