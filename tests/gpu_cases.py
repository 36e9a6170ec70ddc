"""Chooses the cases of the tests that run on a GPU, and writes them into gpu_cases.json:

    python tests/gpu_cases.py

A GPU compiles each kernel that a test launches, in seconds, and a kernel is compiled anew for each type,
constant and alignment of its arguments. So the cases are chosen by what they compile: together at most
KERNELS kernels, in which nearly each type, constant and alignment of each argument occurs, and as many tests
as then have room. The interpreter runs the other cases, too.

Run it after a change of tests or kernels that test_gpu_cases.py complains about: it takes two minutes. Tests
that gpu_cases.json does not know are sampled as those of the interpreter are.
"""

import functools
import json
import re
import sys
from pathlib import Path

PATH = Path(__file__).with_suffix(".json")
KERNELS, ROOM = 200, 10  # room for tests to change a little without a new choice
# Stands for test_gpu.py, which cannot be recorded and calls the same.
ALWAYS = "test_compile.py::test_fullgraph"
# Tests of results, and of what the hardware decides: the rounding of 16 bits, NaN in a maximum, approximate
# functions, the order of sums, addresses of more than 31 bits.
OF_HARDWARE = (
    "values_and_gradients", "low_precision", "dtypes", "float16", "nan", "lost_row", "extreme", "one_hot",
    "nearly_uniform", "any_length", "test_determinism.py", "2_to_31",
)  # fmt: skip
# Worth of the first case of such a test, in each dtype, and of another test; any value of an argument has 1.
HARDWARE_TEST, A_TEST = 30, 4


def load():
    """{test: which of its cases run}, a case as the text in pytest's brackets."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def case_of(item):
    """The name of pytest's item in gpu_cases.json."""
    return f"{item.path.name}::{item.name}"


def parted(case):
    """(test, what is in its brackets)."""
    test, _, parameters = case.partition("[")
    return test, parameters.removesuffix("]")


def test_of(case):
    """(what must be in one case, its worth, ..)"""
    test, parameters = parted(case)
    if any(word in test for word in OF_HARDWARE):
        return test, HARDWARE_TEST, re.findall(r"\bb?float16\b", parameters)[:1] == ["float16"]
    return test, A_TEST


@functools.cache
def values_of(launch):
    """(kernel, argument or option, value) of all that the compiled kernel depends on."""
    module, kernel, specialization = launch
    found = json.loads(specialization)
    names = list(found["signature"])
    constants = zip(found["constant_keys"], found["constant_vals"], strict=True)
    attributes = zip(found["attrs_keys"], found["attrs_vals"], strict=True)
    values = list(found["signature"].items())
    values += [(names[i], value) for (i,), value in constants]
    values += [(names[i] + " is", value) for (i,), value in attributes]
    values += [(name, found["options"][name]) for name in ("num_warps", "maxnreg")]
    return frozenset((module, kernel, name, str(value)) for name, value in values)


def choose(launches, most):
    """Cases of {case: its launches} that together launch at most so many kernels: those first that bring most
    new values for each new kernel."""
    values = {
        case: frozenset().union(*map(values_of, kernels)) | {test_of(case)}
        for case, kernels in launches.items()
    }

    def worth(case):
        return sum(value[1] if len(value) < 4 else 1 for value in values[case] - seen)

    chosen = {case for case in launches if parted(case)[0] == ALWAYS}
    while True:
        kernels = set().union(*(launches[case] for case in chosen))
        chosen |= {case for case, launched in launches.items() if launched <= kernels}
        seen = set().union(*(values[case] for case in chosen))
        rates = {}
        for case, launched in launches.items():
            new = len(launched - kernels)
            if new and len(kernels) + new <= most:
                rates[case] = worth(case) / new
        if not any(rates.values()):
            return sorted(chosen)
        chosen.add(max(rates, key=rates.get))


def main():
    sys.path[:0] = [str(PATH.parents[1] / name) for name in (".", "benchmarks", "tests/support")]
    import launch_recorder

    launches = launch_recorder.record(90, "--candidates")
    chosen = choose(launches, KERNELS - ROOM)
    table = {parted(case)[0]: [] for case in sorted(launches)}
    for case in chosen:
        table[parted(case)[0]].append(parted(case)[1])
    PATH.write_text(json.dumps(table, indent=1) + "\n")
    every, some = (set().union(*(launches[case] for case in cases)) for cases in (launches, chosen))
    counts = [len(set().union(*map(values_of, kernels))) for kernels in (some, every)]
    print(f"{len(chosen)} of {len(launches)} cases, {sum(map(bool, table.values()))} of {len(table)} tests")
    print(f"{len(some)} of {len(every)} kernels, with {counts[0]} of {counts[1]} values of their arguments")


if __name__ == "__main__":
    main()
