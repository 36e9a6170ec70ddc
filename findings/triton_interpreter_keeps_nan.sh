#!/usr/bin/env bash
# Triton's interpreter, TRITON_INTERPRET=1, is no model of a GPU for NaN: tl.maximum(NaN, 1) is NaN up to 3.7 and 1 from 3.8 on, as
# on a GPU; tl.max of (NaN, 1) is 1 since 3.5 (NaN in 3.4). Code that relies on the one fails with the other, and on a GPU.
# Output seen: 3.6.0: maximum nan, max 1.0; 3.8.0: maximum 1.0, max 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 'numpy<2.4'
cd "$folder"
cat > shown.py <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(X, OUT):
    x = tl.load(X + tl.arange(0, 2))
    tl.store(OUT + tl.arange(0, 2), tl.maximum(x, tl.full((2,), 1.0, tl.float32)))
    tl.store(OUT + 2, tl.max(x, 0))


out = torch.zeros(3)
kernel[(1,)](torch.tensor([float("nan"), 1.0]), out)
print(f"{triton.__version__}: maximum {out[0]}, max {out[2]}")
assert str(out[0].item()) == sys.argv[1] and out[2] == 1, "the behaviour has changed"
PY
for release in 3.6.0=nan 3.8.0=1.0; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/${release%=*}" "triton==${release%=*}"
    PYTHONPATH="$folder/${release%=*}" TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore shown.py "${release#*=}"
done
