"""The emulation in tests/cuda/emulation: right by the PTX manual, and blind to none of the planted faults."""

import re
import subprocess

import emulated_counts
import emulated_operators
import emulation_build
import pytest
import torch
from emulation_build import EMULATION, ROOT

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


def output_of(source):
    """The lines that a program of the emulation's prints, split at tabs."""
    program = emulation_build.build(EMULATION / source, shared=False)
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [line.split("\t") for line in run.stdout.splitlines()]


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


def arguments_of_operators(emulator):
    """By name: all tensors that it takes, of one image or item, and all gradients asked for."""
    q, k, v, dout = torch.randn(4, 1, 3, 8, 24).half()
    x, y, z = q[:, 0], k[:, 0, :5], v[:, 0]  # of 8 and 5 all words of `saved` are in use
    coupling, mixes, vectors = torch.randn(1, 6, 6), *torch.randn(2, 4, 3, 3)
    layers = q, k, 0.3, v, dout, 0.2
    maps = q, k, v, 0.3, mixes[0], vectors[0, 0], mixes[1], vectors[0, 1], True, *vectors[1, :2], 1e-5
    rows, both, saved = torch.randn(1, 8), (True, True), emulator.pairwise_cosine_fwd(x, y, "abs")[1]
    return {
        "attention_gram_fwd": layers,
        "attention_gram_bwd": (coupling, *layers, [True] * 4),
        "pairwise_cosine_fwd": (x, y, "abs"),
        "pairwise_cosine_bwd": (rows[0, :1], x, y, saved, "abs", False, 1e-8, *both),
        "pairwise_logsumexp_fwd": (x, y, 5.0),
        "pairwise_logsumexp_bwd": (rows, rows + 1, x, y, rows[:0], 5.0, 1e-8, *both),
        "pairwise_nearest": (x, y),
        "two_gram_fwd": (x, z, "square"),
        "two_gram_bwd": (rows[0, :1], x, z, rows[:0], "square", 0.0, True, 1e-8, *both),
        "reattention_fwd": (*maps, *both),
        "reattention_bwd": (dout, coupling[:, :3, :3].contiguous(), *maps, [True] * 6),
        "head_dots": (q, k),
    }


@pytest.mark.parametrize("name", emulated_operators.with_kernels())
def test_kernels_may_touch_the_tensors_of_their_operator_and_no_more(emulator, name):
    """Without the last two bytes of any of them there is a fault: memory/<op>.h gives none too many."""
    arguments = arguments_of_operators(emulator)[name]
    outputs = emulator.call(name, *arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = [x for x in (*arguments, *outputs) if torch.is_tensor(x) and x.numel()]
    for n in range(len(tensors)):
        emulator.configure(withheld=n)
        with pytest.raises(RuntimeError, match="device memory index out of range"):
            emulator.call(name, *arguments)


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
