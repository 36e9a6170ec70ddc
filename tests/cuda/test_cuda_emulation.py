"""The emulation in tests/cuda/emulation: right by the PTX manual, and blind to none of the planted faults."""

import functools
import re
import runpy
import types

import emulated_counts
import emulation_build
import pytest
import torch
from emulation_build import EMULATION, ROOT, output_of

SANITIZE = runpy.run_path(str(ROOT / "benchmarks/sanitize.py"))
DEFINITIONS = [
    *["mma.m16n8k16 f16", "mma.m16n8k16 bf16", "mma.m16n8k8 tf32", "mma.m8n8k4 f64"],
    *[
        "ldmatrix.x2",
        "ldmatrix.x4",
        "ldmatrix.x2.trans",
        "ldmatrix.x4.trans",
        "shuffles",
        "cp.async",
        "numbers",
        "pairs of float16",
    ],
    *[f"tensor cores {t}" for t in ("f16", "bf16", "tf32")],
    *[f"a long sum{how}" for how in (", rounded", " in tensor cores", " by multiply_add")],
    "approximations",
    *[f"tile product {t}{how}" for t in ("f16", "bf16", "f32", "f64") for how in ("", ", transposed")],
]
FAULTS = {
    "no_block_barrier": "race in shared memory|read before it was written",
    "no_barrier_before_reuse": "race in shared memory",
    "no_copy_wait": "touched before its copy was waited for|read before it was written",
    "no_barrier_after_copy_wait": "race in shared memory|read before it was written|touched before its copy",
    "shared_index_off_by_one": "shared index out of range: 64 of 64|race in shared memory",
    "device_index_off_by_one": "device memory index out of range|by another block",
    "shared_uninitialised": "shared memory read before it was written",
    "device_uninitialised": "device memory read before it was written",
    "misaligned_shared": "misaligned shared access of 8 bytes",
    "misaligned_device": "misaligned access of 8 bytes of device memory",
    "diverged_shuffle": "lanes of one warp meet at different places",
    "different_collectives": "lanes of one warp meet in different collectives",
    "diverged_barrier": "threads meet at different barriers",
    "early_exit": "deadlock: some threads wait in a barrier that others never reach",
    "no_warp_barrier": "race in shared memory|read before it was written",
    "arena_overrun": "more shared memory carved than launched with",
    "copy_never_waited_for": "copy never waited for",
    "input_written": "an input is written",
    "blocks_share_an_output": "race in device memory: written, by another block",
}

pytestmark = pytest.mark.skipif(emulation_build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def definitions():
    return dict(output_of("definitions.cpp"))


@pytest.fixture(scope="module")
def faults():
    found = {}
    for name, _, said in output_of("faults.cpp"):
        found.setdefault(name, []).append(said)
    return found


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_layer_is_as_the_ptx_manual_says(definitions, name):
    assert definitions[name] == "ok"


def test_all_is_tested(definitions, faults):
    assert set(definitions) == set(DEFINITIONS)
    assert set(faults) == {"none", *FAULTS}


def test_a_kernel_without_faults_passes(faults):
    assert set(faults["none"]) == {""}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_named_in_every_schedule(faults, fault):
    lines = (EMULATION / "faults.cpp").read_text().splitlines()
    planted = {n for n, line in enumerate(lines, 1) if re.search(rf"// at:.* {fault}( |$)", line)}
    assert planted
    for said in faults[fault]:
        assert re.match(r".*/faults\.cpp:\d+: ", said), said
        # of a race both places are named, in the order in which they ran
        assert {int(n) for n in re.findall(r"/faults\.cpp:(\d+)", said)} & planted, said
        assert re.search(FAULTS[fault], said), said
        assert re.search(r"\(block \d+, thread \d+\)$", said) or "deadlock" in said, said


def check_ends(emulator, name, *arguments):
    """Without the last two bytes of any tensor of a call there is a fault. Gives what the call gives."""
    arguments = [x.clone() if torch.is_tensor(x) else x for x in arguments]  # each in a place of its own
    outputs = emulator.call(name, *arguments)
    all_outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = [x for x in (*arguments, *all_outputs) if torch.is_tensor(x) and x.numel()]

    def is_at_fault(n):
        with emulator.configure(withheld=n):
            try:
                emulator.call(name, *arguments)
            except RuntimeError as fault:
                return "device memory index out of range" in str(fault)
        return False

    # of squares the backward does not read all that is saved
    unread = name == "pairwise_cosine_bwd" and arguments[4] == "square"
    assert sum(map(is_at_fault, range(len(tensors)))) == len(tensors) - unread, name
    return outputs


@pytest.mark.parametrize("operation", SANITIZE["RUN"], ids=lambda operation: operation.__name__)
def test_kernels_may_touch_the_tensors_of_their_operators_and_no_more(emulator, operation):
    """memory/<op>.h has none too long. Of these sizes kernels use all of what they save."""
    inputs = SANITIZE["Inputs"]("native", "cpu", torch.float16)
    checks = {name: functools.partial(check_ends, emulator, name) for name in emulator.operators}
    inputs.operators = types.SimpleNamespace(**checks)
    operation(inputs, (1, 3, 16, 16, 32))


@pytest.mark.parametrize("operation", emulated_counts.OPERATIONS)
def test_the_docs_have_these_counts(operation):
    """Their first column: that of the smallest size."""
    page = (ROOT / f"docs/kernels/{operation}.md").read_text()
    column = emulated_counts.SETS.get(operation, emulated_counts.HEADS)[0]
    said = dict(re.findall(r"^\| ([^|(]+?)(?: \([^|]*)? \| ([\d.]+)", page, re.M))
    counted = emulated_counts.table(operation, [column])
    assert len(said.keys() & counted) >= (6 if operation == "two_gram" else 8)
    for name in said.keys() & counted:
        assert said[name] == emulated_counts.rounded(counted[name][0]), name
