"""DTensors: a batch sharded over two processes gives what one process gives, with sharded gradients; other
shardings are gathered."""

import pytest
import torch
import torch.distributed as dist
from calls import LOSSES, OPERATIONS, arguments
from processes import together

import vitdiv_kernels as vd

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

PROCESSES, IMAGES, TOKENS = 2, 4, 7


def inputs(images=IMAGES):
    torch.manual_seed(0)
    x, matrices = arguments(images, TOKENS)
    return x.detach().double(), matrices.detach().double()


def step(function, x, matrices):
    x, matrices = x.detach().requires_grad_(), matrices.detach().requires_grad_()
    loss = function(x, matrices)
    return [loss.detach(), *torch.autograd.grad(loss, (x, matrices), allow_unused=True)]


def several_axes(x, matrices, backend):
    """Leading axes [images, 2]."""
    x = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return sum(
        vd.pairwise_cosine(x, penalty=penalty, reduction="none", backend=backend).square().sum()
        for penalty in ("abs", "signed")
    )


def statistics(x, matrices, backend):
    """Running statistics are those of the whole batch."""
    from torch.distributed.tensor import DTensor, Replicate

    running = [torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)]
    if isinstance(x, DTensor):
        running = [DTensor.from_local(t, x.device_mesh, [Replicate()]) for t in running]
    q, k, v = x.reshape(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
    out = vd.reattention(
        q, k, v, matrices[0], norm="batch", training=True, running_mean=running[0], running_var=running[1],
        norm_weight=matrices[1, 0], norm_bias=matrices[1, 1], backend=backend,
    )  # fmt: skip
    return out.square().sum() + running[0].sum() + running[1].sum()


SHARDED = (
    "patch_contrast", "koleo", "uniformity", "info_nce", "vf_loss", "gram_anchoring", "linear_cka",
    "patch_soft_orthogonality", "gradient_diversity",
)  # fmt: skip
FUNCTIONS = OPERATIONS | {name: lambda x, _, backend, loss=LOSSES[name]: loss(x) for name in SHARDED}
FUNCTIONS |= {"several axes": several_axes, "statistics": statistics}


def worker(backend):
    dist.init_process_group("gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, found = init_device_mesh("cpu", (PROCESSES,)), {}
    for name, function in FUNCTIONS.items():
        for images, axis in ((IMAGES, 0), (3, 0), (IMAGES, 1)):
            if name in ("several axes", *SHARDED) and (images == 3 or (axis == 1 and name in SHARDED)):
                continue  # their reshapes of unequal shards are not DTensor's
            x, matrices = inputs(images)
            sharded = distribute_tensor(x, mesh, [Shard(axis)])
            whole = distribute_tensor(matrices, mesh, [Replicate()])
            made = step(lambda x, m, f=function: f(x, m, backend), sharded, whole)
            placements = [None if t is None else t.placements for t in made]
            found[name, images, axis] = [None if t is None else t.full_tensor() for t in made], placements
    dist.destroy_process_group()
    return found


@pytest.mark.usefixtures("library")
def test_two_processes_are_one():
    from torch.distributed.tensor import Shard

    backend = "native"
    found = together(PROCESSES, worker, backend)[0]
    for (name, images, axis), (made, placements) in found.items():
        expected = step(lambda x, m, f=FUNCTIONS[name]: f(x, m, backend), *inputs(images))
        for got, right in zip(made, expected, strict=True):
            if right is None:
                assert got is None
            else:
                torch.testing.assert_close(got, right, msg=lambda m, n=name: f"{n}: {m}")
        if axis == 0:
            assert placements[1] == (Shard(0),), (name, images, placements)
