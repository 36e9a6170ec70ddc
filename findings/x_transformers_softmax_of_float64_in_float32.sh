#!/usr/bin/env bash
# x-transformers 2.31.10 (torch 2.13.0): Attend takes its softmax with dtype=torch.float32, which is meant for half precision, also
# of float64: the output is float64 with the digits of float32. So the model in float64 is no reference for one in float32, and
# torch.autograd.gradcheck, which compares with finite differences, fails. With qk_norm the softmax has the dtype of its input.
# Output seen: qk_norm=False: torch.float64, error 8e-08, gradcheck False; qk_norm=True: torch.float64, error 0e+00, gradcheck True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 x-transformers==2.31.10
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from x_transformers.attend import Attend

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
expected = (4**-0.5 * q @ k.mT).softmax(-1) @ v
seen = {}
for qk_norm in (False, True):
    attend = Attend(heads=2, scale=4**-0.5, qk_norm=qk_norm)
    out = attend(q, k, v)[0]
    error = (out - expected).abs().max().item()
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    passes = torch.autograd.gradcheck(lambda *x: attend(*x)[0], tensors, raise_exception=False)
    seen[qk_norm] = out.dtype, error > 1e-9, passes
    print(f"qk_norm={qk_norm}: {out.dtype}, error {error:.0e}, gradcheck {passes}")
assert seen[False] == (torch.float64, True, False), "the behaviour has changed"
assert seen[True] == (torch.float64, False, True), "the behaviour has changed"
PY
