"""A kernel is compiled once for each operation, dtype and number of heads, not for each number of tokens, for
each scale or margin, nor for each chunk of a call."""

import importlib.util
import os
import subprocess
import sys

import pytest
from places import python_path

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

# Run on their own: what Triton compiles is known where TRITON_INTERPRET is unset.
SIZES = """
import sys
import torch
from aot import specialised
from vitdiv_kernels.ops import _launch
from vitdiv_kernels.ops.maps._triton import workspace
from vitdiv_kernels.ops.maps.attention_gram import triton_kernels as maps
from vitdiv_kernels.ops.pairs.pairwise_cosine import triton_kernels as cosine
from vitdiv_kernels.ops.pairs.pairwise_rows import triton_kernels as rows
from vitdiv_kernels.ops.maps.reattention import triton_kernels as mixed
from vitdiv_kernels.ops.pairs.two_gram import triton_kernels as grams

def gram(q, k, v, matrix, vector):
    maps.attention_gram_fwd(q, k, 0.125, None, None, 0.125)
    coupling, needs = matrix.expand(2, -1, -1), [True, True, False, False]
    maps.attention_gram_bwd(coupling, q, k, 0.125, None, None, 0.125, needs)

def reattention(q, k, v, matrix, vector):
    arguments = q, k, v, 0.125, matrix, vector, matrix, vector, False, vector, vector, 1e-5
    mixed.reattention_fwd(*arguments, True, True)
    mixed.reattention_bwd(q, matrix[None], *arguments, [True] * 6)
    mixed.head_dots(q, k)

def pairs(q, k, v, matrix, vector):
    x, y, scale = q[:, 0], k[:, 0, :-1], 1 / q.shape[2]
    for second in (None, y):
        sums, saved = cosine.pairwise_cosine_fwd(x, second, "abs", False, 1e-8, True)
        cosine.pairwise_cosine_bwd(sums, x, second, saved, "abs", False, 1e-8, True, second is not None)
        sums, saved = rows.pairwise_logsumexp_fwd(x, second, scale, 1e-8, True)
        rows.pairwise_logsumexp_bwd(sums, sums, x, second, saved, scale, 1e-8, True, second is not None)
        rows.pairwise_nearest(x, second, 1e-8)
    arguments = "hinge", scale, True, 1e-8, True, True
    sums, saved = grams.two_gram_fwd(x, k[:, 0], *arguments)
    grams.two_gram_bwd(sums, x, k[:, 0], saved, *arguments)

for calls in (pairs, gram, reattention):
    kinds, constants = set(), set()
    for tokens in (129, 197, 208, 209, 224, 240, 256):
        q, k, v = torch.empty(2, tokens, 3, 6, 64, dtype=torch.bfloat16, device="meta").permute(2, 0, 3, 1, 4)
        matrix, vector = torch.empty(6, 6, device="meta"), torch.empty(6, device="meta")
        with _launch.recording((9, 0)) as launches:
            calls(q, k, v, matrix, vector)
        for launch in launches:
            name, signature, constexprs, attributes, options = kind = specialised(launch)
            pointers = tuple((n, t) for n, t in signature if t.startswith("*") or t == "constexpr")
            kinds.add(kind)
            constants.add((name, pointers, constexprs, options))
    for kind in sorted(kinds, key=str):
        print(kind)
    print(len(kinds), "kinds of", len(constants))
    if len(kinds) > len(constants) or not kinds:
        sys.exit(1)
"""


# Each image has a coupling of 9 or 49 numbers, where the next one starts.
CHUNKS = """
import sys
import torch
from aot import specialised
from vitdiv_kernels.ops import _launch
from vitdiv_kernels.ops.maps._triton import workspace

workspace.workspace_bytes = lambda capability: 3_200_000  # of 3 images, or of 1
for heads in (3, 7):
    q, k, v = torch.empty(3, 15, heads, 197, 64, dtype=torch.bfloat16, device="meta")
    matrix, coupling = (torch.empty(*images, heads, heads, device="meta") for images in ([], [15]))
    arguments = q, k, v, 0.125, None, None, matrix, None, True, None, None, 1e-5
    with _launch.recording((9, 0)) as launches:
        workspace.backward(q, coupling, *arguments, [True] * 3 + [False, True, False])
    launches = [launch for launch in launches if "coupling" in launch.arguments]
    starts = [launch.arguments["coupling"].storage_offset() % 4 for launch in launches]
    kinds = set(map(specialised, launches))
    print(heads, "heads:", len(kinds), "kinds", starts)
    if len(kinds) > 1 or len(set(starts)) < 2:
        sys.exit(1)
"""


@pytest.mark.parametrize("script", [SIZES, CHUNKS], ids=["sizes", "chunks"])
def test_nothing_is_compiled_anew_for(script):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = python_path()
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
