"""Finds the fastest rows of a table of the Triton kernels on the GPU that is here, and writes them into it.

It knows the tables of pairwise_cosine, pairwise_rows and two_gram, dicts in their triton_configs.py, and the
one that they share, in _tiles.py: a row a line, whose last field says where the row comes from. The tables of
maps are changed by hand.
Candidates that do not fit the GPU are passed over. Run the ahead-of-time test afterwards: a row has to
compile for every GPU of its generation. Example:

    python benchmarks/tune.py pairwise_cosine.FORWARD --dtype bfloat16 --seconds 120
"""

import argparse
import importlib
import itertools
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

import vitdiv_kernels
from vitdiv_kernels.ops.pairs.pairwise_rows import pairwise_logsumexp
from vitdiv_kernels.ops.pairs.two_gram import two_gram

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPES = {
    "pairwise_cosine": [(256, 196, 384), (32, 577, 768), (16, 1024, 768)],
    "pairwise_rows": [(256, 196, 384), (16, 1024, 768), (1, 1024, 768)],
    "two_gram": [(256, 196, 384), (16, 1024, 768)],
    "_tiles": [(256, 196, 384), (64, 1024, 768)],
}


def _grid(**choices: Iterable) -> list[dict]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _from_signs(**choices: Iterable) -> list[dict]:
    return [row for row in _grid(**choices) if row["rows"] % row["columns"] == 0]


def _call(operation: Callable, backward: bool, shape, dtype, device) -> Callable[[], object]:
    # it requires a gradient, so that the forward keeps what a backward needs
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    forward = partial(operation, x, backend="triton")
    if not backward:
        return forward
    loss = forward().sum()
    return lambda: torch.autograd.grad(loss, x, retain_graph=True)


def _cosine(penalty: str) -> Callable:
    return partial(vitdiv_kernels.pairwise_cosine, penalty=penalty)


def _logsumexp(x: torch.Tensor, backend: str) -> torch.Tensor:
    return pairwise_logsumexp(x, scale=10.0, backend=backend)


def _two_gram(x: torch.Tensor, backend: str) -> torch.Tensor:
    return two_gram(x, x.detach().flip(0), penalty="hinge", margin=0.1, backend=backend)


_FORWARD = _grid(rows=(64, 128), width=(32, 64, 128), warps=(4, 8), stages=(2, 3, 4))
_GRADIENT = _grid(
    rows=(64, 128, 256), out=(64, 128, 256), inner=(32, 64), warps=(4, 8), stages=(2, 3), maxnreg=(None,)
)
# Table: the function of (shape, dtype, device) that runs its kernel, and the rows to try.
TABLES = {
    "pairwise_cosine.FORWARD": (partial(_call, _cosine("abs"), False), _FORWARD),
    "pairwise_cosine.FROM_SIGNS": (
        partial(_call, _cosine("abs"), True),
        _from_signs(rows=(32, 64), columns=(32, 64), out=(64, 128, 256), warps=(4, 8), stages=(2, 3)),
    ),
    "pairwise_rows.FORWARD": (partial(_call, _logsumexp, False), _FORWARD),
    "pairwise_rows.WEIGHTS": (partial(_call, _logsumexp, True), _FORWARD),
    "two_gram.FORWARD": (partial(_call, _two_gram, False), _FORWARD),
    "two_gram.WEIGHTS": (partial(_call, _two_gram, True), _FORWARD),
    "_tiles.GRADIENT": (partial(_call, _logsumexp, True), _GRADIENT),
}


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Median time of one call; on a GPU with a cold L2."""
    if device == "cuda":
        import triton

        return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def tune(name: str, shapes, dtype, device: str, seconds: float, limit: int | None) -> tuple:
    """(key, best row, its time over that of the present row): the geometric mean over the shapes decides."""
    make, candidates = TABLES[name]
    operation, table_name = name.split(".")
    module = operation if operation == "_tiles" else f"{operation}.triton_configs"
    table = getattr(importlib.import_module(f"vitdiv_kernels.ops.pairs.{module}"), table_name)
    major = torch.cuda.get_device_capability()[0] if device == "cuda" else 9
    key = dtype.itemsize, major
    present = table.get(key, table[dtype.itemsize, 8])
    rows = [type(present)(**candidate, source=source(device)) for candidate in candidates]
    random.Random(0).shuffle(rows)
    times, deadline = {}, time.monotonic() + seconds
    try:
        for row in [present, *rows[:limit]]:
            if time.monotonic() > deadline:
                break
            table[key] = row
            try:
                calls = [make(shape, dtype, device) for shape in shapes]
                times[row] = math.exp(
                    sum(math.log(milliseconds(call, device)) for call in calls) / len(calls)
                )
            except Exception as error:  # of many kinds: shared memory, registers, the compiler's own
                print(f"  {tuple(row)}: {type(error).__name__}")
                continue
            print(f"  {tuple(row)}: {times[row]:.4f} ms")
    finally:
        table[key] = present
    best = min(times, key=times.get)
    return key, best, times[best] / times[present]


def source(device: str) -> str:
    """What the table says of a measured row."""
    return f"measured on {torch.cuda.get_device_name()}" if device == "cuda" else "interpreter"


def rewritten(text: str, table: str, key: tuple, row) -> str:
    """The text of triton_configs.py with this row in the table, in place of the key's or at its end."""
    head, start, rest = text.partition(f"\n{table} = {{\n")
    if not start:
        raise ValueError(f"{table} is not a table of triton_configs.py")
    body, end, tail = rest.partition("\n}\n")
    values = ", ".join(f'"{value}"' if isinstance(value, str) else repr(value) for value in row)
    line = f"    {key!r}: {type(row).__name__}({values}),"
    lines = body.split("\n")
    same = [i for i, old in enumerate(lines) if old.startswith(f"    {key!r}:")]
    if same:
        lines[same[0]] = line
    else:
        lines.append(line)
    return head + start + "\n".join(lines) + end + tail


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 256x196x384")
    return tuple(map(int, text.split("x")))


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: Triton's interpreter, to test this script",
    )
    add("--shapes", type=_shape, nargs="+", help="default: ViT shapes of the operation")
    add("--seconds", type=float, default=120, help="begin no candidate after so many; default: 120")
    add("--limit", type=int, help="try so many candidates only")
    add("--write", type=Path, help="the triton_configs.py to write the row into")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    shapes = args.shapes or SHAPES[args.table.split(".")[0]]
    key, best, ratio = tune(args.table, shapes, DTYPES[args.dtype], args.device, args.seconds, args.limit)
    print(f"{args.table} {key}: {tuple(best)}, {ratio:.2f} of the present row's time")
    if args.write:
        table = args.table.split(".")[1]
        args.write.write_text(rewritten(args.write.read_text(), table, key, best))


if __name__ == "__main__":
    sys.exit(main())
