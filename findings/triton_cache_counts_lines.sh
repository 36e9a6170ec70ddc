#!/usr/bin/env bash
# Triton keeps compiled kernels in a cache whose key holds the number of the line where the kernel starts. A comment, or an
# import, added above a kernel compiles it again, on each machine and for each of its signatures, though its code is the
# same; so does another position of a kernel in a file that is generated. A name alone, in another file, does not.
# Output seen: 3.6.0: the same file False, moved to another file False, a comment above True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.6.0 'numpy<2.4'
cd "$folder"
cat > first.py <<'PY'
import triton
import triton.language as tl


@triton.jit
def double(X, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(X + n, 2 * tl.load(X + n))
PY
cp first.py again.py
sed 's/^@triton.jit/# doubles\n@triton.jit/' first.py > commented.py
cat > shown.py <<'PY'
import importlib

import triton


def differs(module):
    keys = [importlib.import_module(name).double.cache_key for name in ("first", module)]
    return keys[0] != keys[1]


first = importlib.import_module("first").double
anew = triton.jit(first.fn).cache_key != first.cache_key
found = anew, differs("again"), differs("commented")
print(f"{triton.__version__}: the same file {found[0]}, moved to another file {found[1]}, a comment above {found[2]}")
assert found == (False, False, True), "the behaviour has changed"
PY
"$folder/venv/bin/python" -W ignore shown.py
