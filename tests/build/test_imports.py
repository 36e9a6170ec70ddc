"""`import vitdiv_kernels` in fresh processes: quick, lean, and possible without the compiled extension."""

import json
import re
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch
from places import ROOT

import vitdiv_kernels
from vitdiv_kernels import _native

HIDE_THE_EXTENSION = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "vitdiv_kernels._C":
            raise ImportError("hidden by a test")
sys.meta_path.insert(0, Hide())
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_a_cold_import_is_quick_and_lean():
    code = """
import sys, time
start = time.perf_counter(); import torch
middle = time.perf_counter(); before = set(sys.modules); import vitdiv_kernels
print(middle - start, time.perf_counter() - middle, *(set(sys.modules) - before))
"""
    run = python(code)
    assert run.returncode == 0, run.stderr
    of_torch, of_this, *modules = run.stdout.split()
    assert float(of_this) < 0.5 * float(of_torch) + 0.2
    packages = {name.partition(".")[0] for name in modules}
    assert not packages & {
        "triton",
        "matplotlib",
        "sklearn",
        "scipy",
        "torchvision",
        "timm",
        "tqdm",
        "pandas",
    }
    assert "torch._dynamo" not in modules
    assert "torch._inductor" not in modules


def test_every_operation_runs_without_the_extension():
    code = (
        HIDE_THE_EXTENSION
        + """
import torch, vitdiv_kernels as v
q, k, x = torch.randn(3, 2, 4, 5, 8)
print(v.pairwise_cosine(x).isfinite().item(), v.attention_diversity(q, k).isfinite().item())
print(v.reattention(q, k, x, torch.eye(4)).shape == q.shape)
try:
    v.pairwise_cosine(x, backend="native")
except RuntimeError as error:
    print("refused:", error)
"""
    )
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[:3] == ["True"] * 3
    assert "refused:" in run.stdout
    assert "vitdiv_kernels runs on its slower reference backend" in run.stderr


def test_info_gives_the_reason_for_the_missing_extension():
    run = python(HIDE_THE_EXTENSION + "import vitdiv_kernels.info as i; print(i.report())")
    assert run.returncode == 0, run.stderr
    assert re.search(
        r"native, CPU +absent: the (compiled kernels could not be loaded|kernels are not compiled)",
        run.stdout,
    )


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (None, ["not compiled", "pip install ."]),
        ({"torch": None, "reason": "no C++ compiler was found"}, ["no C++ compiler was found"]),
        (
            {"torch": "1.13.1+cu117"},
            ["torch 1.13", "torch " + ".".join(torch.__version__.split(".")[:2]), "reinstall"],
        ),
    ],
)
def test_an_unusable_extension_is_explained_in_one_sentence(tmp_path, facts, words):
    facts_file = tmp_path / "_build.json"
    if facts is not None:
        facts_file.write_text(json.dumps(facts))
    reason = _native._why_unusable(facts_file)
    assert all(word in reason for word in words)
    assert "\n" not in reason


def test_a_patch_release_of_torch_is_not_refused(tmp_path):
    facts_file = tmp_path / "_build.json"
    major, minor = torch.__version__.split(".")[:2]
    facts_file.write_text(json.dumps({"torch": f"{major}.{minor}.99"}))
    assert _native._why_unusable(facts_file) is None


def test_kernels_for_another_python_are_named(tmp_path):
    facts_file = tmp_path / "_build.json"
    facts_file.write_text(json.dumps({"torch": torch.__version__}))
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    reason = _native._why_unusable(facts_file)
    assert (
        "compiled for another Python, as _C.cpython-39-x86_64-linux-gnu.so, and this one loads _C." in reason
    )
    assert "pip install --no-build-isolation --no-deps ." in reason
    (tmp_path / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    assert _native._why_unusable(facts_file) is None


def test_the_version_is_that_of_the_metadata():
    (declared,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert vitdiv_kernels.__version__ == declared


def test_what_torch_imports_later_is_told_of_the_operators():
    """Modules that would be slow to import for it; they are left as they were."""
    code = (
        "import inspect, sys, torch, vitdiv_kernels;"
        "assert 'torch.utils.flop_counter' not in sys.modules;"
        "assert 'torch.distributed.tensor' not in sys.modules;"
        "import torch.utils.flop_counter as flops, torch.distributed.tensor as tensor;"
        "op = torch.ops.vitdiv.reattention_fwd;"
        "assert op in flops.flop_registry;"
        "assert 'flop_registry' in inspect.getsource(flops);"
        "rules = tensor.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs;"
        "assert op.default in rules"
    )
    run = python(code)
    assert run.returncode == 0, run.stderr
