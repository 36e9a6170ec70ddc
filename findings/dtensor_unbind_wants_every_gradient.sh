#!/usr/bin/env bash
# torch 2.13.0: q, k, v = qkv.unbind(0) of a DTensor, with v unused in the loss, fails in backward: the gradient of v is made
# as a plain tensor of zeros and stacked with DTensors. Indexing, qkv[0], qkv[1], gives the gradient. Plain tensors: both do.
# Output seen: unbind: aten.stack.default got mixed torch.Tensor and DTensor, ...; indexing: (3, 4)
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

mesh = init_device_mesh("cpu", (1,))
qkv = distribute_tensor(torch.ones(3, 4), mesh, [Replicate()]).requires_grad_()
q, k, v = qkv.unbind(0)
try:
    (q * k).sum().backward()
    raised = ""
except RuntimeError as error:
    raised = str(error)
print("unbind:", raised)
(qkv[0] * qkv[1]).sum().backward()
print("indexing:", tuple(qkv.grad.shape))
plain = torch.ones(3, 4, requires_grad=True)
q, k, v = plain.unbind(0)
(q * k).sum().backward()
dist.destroy_process_group()
assert "mixed torch.Tensor and DTensor" in raised and qkv.grad.shape == plain.grad.shape, "the behaviour has changed"
PY
