"""What the CUDA kernels do for each pair (i, j), counted in emulation, beside the clocks that it predicts.

    python tests/emulated_counts.py reattention

The tables of docs/kernels are from here. For one image, all heads; of a step the clocks of a
multiprocessor are the most that one of its parts needs: 128 bytes of shared memory and 24 of L2 each clock,
1.6 clocks for a product of tensor cores. Bytes that L1 serves are counted as of L2.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).with_name(name)) for name in ("support", "cuda")]

from emulated_operators import emulator as the_emulator
from test_cuda_reattention import Case, inputs_of
from test_cuda_reattention_bwd import run as reattention_bwd

HEADS, N, WIDTH = (3, 6, 12, 16), 197, 64
SETS = {
    "pairwise_cosine": ((196, 384), (196, 768), (576, 768), (1024, 384)),
    "two_gram": ((196, 384), (1024, 384), (1024, 768)),
}


def counted(emulator, call):
    with emulator.counting() as counts:
        call()
    return counts


def per_pair(counts, pairs):
    """What the tables say of a step."""
    mma, far = counts["mma"] / pairs, counts["global_bytes"] / pairs
    # an ldmatrix.x4 takes 4 rounds, more where rows meet in a bank; what cp.async brings is written, too
    conflicts = counts["ldmatrix_rounds"] - 4 * counts["ldmatrix"]
    shared = ((counts["shared_bytes"] + counts["copied_bytes"]) / 128 + conflicts) / pairs
    return {
        "mma": mma,
        "shared memory, rounds of 128 bytes": shared,
        "bytes from L2": far,
        "predicted clocks": max(1.6 * mma, shared, far / 24),
    }


def reattention(emulator, heads):
    for name, options in ("", {}), (", layer norm", {"layer": True}), (", pre_mix", {"pre": "mix"}):
        case = Case((1, heads, N, N, WIDTH), **options)
        inputs = inputs_of(case, torch.float16)
        cotangents = torch.randn_like(inputs["q"]), torch.randn(1, heads, heads)
        needs = ["dq", "dk", "dv", "dfolded_mix"] + ["dnorm"] * case.layer + ["dpre_mix"] * bool(case.pre)
        yield (
            f"forward{name}",
            counted(
                emulator,
                lambda inputs=inputs: emulator.reattention_fwd(
                    *inputs.values(), needs_out=True, needs_gram=False
                ),
            ),
        )
        yield (
            f"backward{name}",
            counted(
                emulator,
                lambda inputs=inputs, cotangents=cotangents, needs=needs: reattention_bwd(
                    emulator, inputs, *cotangents, needs
                ),
            ),
        )


def attention_gram(emulator, heads):
    q, k = torch.randn(2, 1, heads, N, WIDTH).half()
    coupling = torch.randn(1, heads, heads)
    yield "forward", counted(emulator, lambda: emulator.attention_gram_fwd(q, k, 0.1))
    yield "backward", counted(emulator, lambda: emulator.attention_gram_bwd(coupling, q, k, 0.1))


def pairwise_cosine(emulator, shape):
    x, saved = torch.randn(1, *shape).bfloat16(), []
    yield "forward", counted(emulator, lambda: saved.append(emulator.pairwise_cosine_fwd(x, None, "abs")[1]))
    yield (
        "backward",
        counted(emulator, lambda: emulator.pairwise_cosine_bwd(torch.ones(1), x, None, saved[0], "abs")),
    )


def two_gram(emulator, shape):
    x, y = torch.randn(2, 1, *shape).bfloat16()
    yield "forward", counted(emulator, lambda: emulator.two_gram_fwd(x, y, "square"))
    backward = dict(penalty="square", needs_dy=False)
    yield "backward", counted(emulator, lambda: emulator.two_gram_bwd(torch.ones(1), x, y, **backward))


OPERATIONS = {
    "reattention": reattention,
    "attention_gram": attention_gram,
    "pairwise_cosine": pairwise_cosine,
    "two_gram": two_gram,
}


def rounded(number):
    """Two digits, or all that stand before the point."""
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"


def table(operation, columns):
    """Rows of numbers by step and what is counted, a number for each column."""
    emulator, rows = the_emulator(), {}
    for column in columns:
        pairs = column[0] ** 2 if operation in SETS else N * N
        for step, counts in OPERATIONS[operation](emulator, column):
            for what, number in per_pair(counts, pairs).items():
                rows.setdefault(f"{step}: {what}", []).append(number)
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operation", choices=OPERATIONS)
    operation = parser.parse_args().operation
    columns = SETS.get(operation, HEADS)
    names = [f"{c[0]} x {c[1]}" if operation in SETS else f"H = {c}" for c in columns]
    print(f"| | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for name, numbers in table(operation, columns).items():
        print(f"| {name} | {' | '.join(map(rounded, numbers))} |")


if __name__ == "__main__":
    main()
