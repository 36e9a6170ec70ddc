"""Batch norm over the processes of a group: two processes with a part of a batch each give what one gives
with all of it."""

import pytest
import torch
import torch.distributed as dist
from processes import together

import vitdiv_kernels as vd

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

# Unequal shares, as the counts must be reduced too, and empty ones, which are part of every reduction.
SPLITS = [(3, 2), (5, 0), (0, 5)]
IMAGES, PROCESSES = 5, 2


def tensors():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, IMAGES, 4, 9, 8, generator=generator, dtype=torch.float64)
    parameters = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 4), (4,), (4,))
    ]
    cotangent = torch.randn(IMAGES, 4, 9, 8, generator=generator, dtype=torch.float64)
    return qkv, parameters, cotangent


def step(qkv, parameters, cotangent, backend, process_group=None):
    """Output, running statistics, and the gradients of qkv and of the parameters."""
    leaves = [t.clone().requires_grad_() for t in (qkv, *parameters)]
    (q, k, v), (mix, weight, bias) = leaves[0], leaves[1:]
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    out, gram = vd.reattention(
        q, k, v, mix, norm="batch", norm_weight=weight, norm_bias=bias, running_mean=mean, running_var=var,
        training=True, return_gram=True, process_group=process_group, backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad((out * cotangent).sum() + gram.square().sum(), leaves)
    return [out.detach(), mean, var, *grads]


def share(split, rank):
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def worker(backend):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    qkv, parameters, cotangent = tensors()
    found = {}
    for split in SPLITS:
        mine = share(split, rank)
        found[split] = step(qkv[:, mine], parameters, cotangent[mine], backend, dist.group.WORLD)
    module = vd.nn.ReAttention(32, 4, dtype=torch.float64, backend=backend)
    module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(IMAGES, 9, 32, dtype=torch.float64)
    found["module"] = [module(x[share(SPLITS[0], rank)]).detach(), module.var_norm.running_var]
    dist.destroy_process_group()
    return found


def test_two_processes_are_one(backend):
    if torch.get_default_device().type == "cuda":
        pytest.skip("two processes would need two GPUs")
    parts = together(PROCESSES, worker, backend)
    whole = step(*tensors(), "reference")
    for split in SPLITS:
        out, mean, var, d_qkv, *d_parameters = zip(*(part[split] for part in parts), strict=True)
        assert [len(o) for o in out] == list(split)
        torch.testing.assert_close(torch.cat(out), whole[0])
        for rank in range(PROCESSES):
            torch.testing.assert_close(mean[rank], whole[1])
            torch.testing.assert_close(var[rank], whole[2])
        torch.testing.assert_close(torch.cat(d_qkv, 1), whole[3])
        for shares, total in zip(d_parameters, whole[4:], strict=True):
            torch.testing.assert_close(sum(shares), total)

    alone = vd.nn.ReAttention(32, 4, dtype=torch.float64)
    torch.manual_seed(0)
    for parameter in alone.parameters():
        torch.nn.init.normal_(parameter)
    expected = alone(torch.randn(IMAGES, 9, 32, dtype=torch.float64))
    torch.testing.assert_close(torch.cat([part["module"][0] for part in parts]), expected.detach())
    torch.testing.assert_close(parts[0]["module"][1], alone.var_norm.running_var)
