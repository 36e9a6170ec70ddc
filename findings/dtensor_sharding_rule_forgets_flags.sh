#!/usr/bin/env bash
# torch 2.13.0: a DTensor rule of torch.distributed.tensor.experimental.register_sharding is looked up again by tensors and
# int arguments alone. Two calls of a custom operator that differ in a bool (or a string or a float) count as one, and the
# second gets the output shape of the first: the DTensor says (4,), its local part has (2,). No error, on one process too.
# Output seen: False: DTensor (4,), local (4,); True: DTensor (4,), local (2,)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import tempfile

import torch
import torch.distributed as dist

dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding


@torch.library.custom_op("finding::first", mutates_args=())
def first(x: torch.Tensor, half: bool) -> torch.Tensor:
    return x[: len(x) // 2].clone() if half else x.clone()


@first.register_fake
def _(x, half):
    return torch.empty_like(x[: len(x) // 2] if half else x)


@register_sharding(torch.ops.finding.first.default)
def _(x, half):
    return [([Replicate()], [Replicate(), None])]


x = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (1,)), [Replicate()])
shapes = {}
for half in (False, True):
    out = torch.ops.finding.first(x, half)
    shapes[half] = tuple(out.shape), tuple(out.to_local().shape)
    print(f"{half}: DTensor {shapes[half][0]}, local {shapes[half][1]}")
dist.destroy_process_group()
assert shapes == {False: ((4,), (4,)), True: ((4,), (2,))}, "the behaviour has changed"
PY
