"""What all tests share: a seed, memory poisoned with NaN, and the backends that one test body runs over."""

import contextlib
import fcntl
import functools
import importlib.util
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    # deterministic cuBLAS, which use_deterministic_algorithms asks for
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Triton reads it when it is imported and when a kernel is defined; torch alone does not import Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import emulated_cuda  # noqa: E402
import emulated_operators  # noqa: E402
import emulation_build  # noqa: E402

from vitdiv_kernels import _dispatch, _native  # noqa: E402

BACKENDS = {
    "reference": ("reference", "cpu"),
    "native-cpu": ("native", "cpu"),
    "native-cuda": ("native", "cuda"),
    "emulated-cuda": ("native", "cpu"),
    "triton-interpreter": ("triton", "cpu"),
    "triton-gpu": ("triton", "cuda"),
}
# Each of their cases takes seconds.
SAMPLED = ("triton-interpreter", "triton-gpu", "emulated-cuda")
INTERPRETED = _dispatch._INTERPRETED
# Only the tests of the backend "triton-interpreter" see it, all others what a user sees.
_dispatch._INTERPRETED = False
# Backends that all their tests would skip, with the reason.
ABSENT = {}
if INTERPRETED:
    ABSENT["triton-gpu"] = "TRITON_INTERPRET=1 is set"
else:
    ABSENT["triton-interpreter"] = "TRITON_INTERPRET=1 is not set"
if not HAS_GPU:
    ABSENT["triton-gpu"] = ABSENT["native-cuda"] = "torch sees no CUDA device here"
if emulation_build.compiler() is None:
    ABSENT["emulated-cuda"] = "there is no C++ compiler"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so that an output element that nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def settings_stay():
    """A test that leaves one of torch's settings changed would change what later tests see."""

    def settings():
        flushes = bool(torch.tensor(torch.finfo(torch.float32).tiny) / 2 == 0)
        return {
            "denormals flushed": flushes,
            "default dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
            "gradients": torch.is_grad_enabled(),
        }

    before = settings()
    yield
    assert settings() == before


def need(backend, device="cpu", operation=None):
    """Skip, with the reason, what needs a backend that is not here; fail it in CI, which has to have it."""
    why_not = _dispatch.missing(backend, device, operation=operation)
    if why_not is not None:
        in_ci = os.environ.get("CI") and device != "cuda"
        (pytest.fail if in_ci else pytest.skip)(f"{backend} on {device}: {why_not}")


def pytest_report_header(config):
    return [f"without backend {name}: {why_not}" for name, why_not in ABSENT.items()]


def operation_of(node):
    """The operation that a file of tests is for, if it is for one."""
    name = node.path.stem.removeprefix("test_")
    return name if name in _dispatch.OPERATIONS else None


@pytest.fixture(params=[name for name in BACKENDS if name not in ABSENT])
def backend(request, monkeypatch):
    """The `backend` argument of one test body that runs on every backend, on tensors of its device."""
    name, device = BACKENDS[request.param]
    if request.param == "triton-interpreter":
        monkeypatch.setattr(_dispatch, "_INTERPRETED", INTERPRETED)
    need(name, device, operation_of(request.node))
    if request.param == "triton-interpreter":
        import interpreter_checks  # imports Triton

        interpreter_checks.install()
    if request.param == "emulated-cuda":
        emulated_operators.need(operation_of(request.node))
        one_emulator().configure()
        emulated_operators.take_the_place_of_native(monkeypatch)
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield name


@functools.cache
def one_emulator():
    return emulated_cuda.Emulator()


@pytest.fixture
def emulator():
    """The emulated CUDA kernels, in the usual order of threads and for the usual GPU."""
    if emulation_build.compiler() is None:
        pytest.skip("no C++ compiler")
    one_emulator().configure()
    return one_emulator()


def pytest_addoption(parser):
    parser.addoption(
        "--every-case",
        action="store_true",
        help="interpret, emulate and compile all cases of the GPU kernels, not a sample: half an hour",
    )


def pytest_collection_modifyitems(config, items):
    """Of the cases that are interpreted or emulated, slowly, or compiled for the GPU, keep such that each
    value of each parameter is in one; emulated, only those of the files of tests that are for one
    operation."""
    dropped = {item for item in items if "emulated-cuda" in item.name and operation_of(item) is None}
    tests = defaultdict(list)
    for item in items:
        sampled = next((name for name in SAMPLED if name in item.name), None)
        if item not in dropped and sampled is not None:
            tests[item.path, item.originalname, sampled].append(item)
    if not config.getoption("--every-case"):
        dropped |= {item for cases in tests.values() for item in set(cases) - set(covering(cases))}
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


def covering(cases):
    """Few of a test's cases, in their order, that have each value of each parameter among them."""
    values = {case: {(name, str(value)) for name, value in case.callspec.params.items()} for case in cases}
    missing = set().union(*values.values())
    chosen = set()
    while missing:
        case = max(cases, key=lambda case: len(values[case] & missing))
        missing -= values[case]
        chosen.add(case)
    return [case for case in cases if case in chosen]


@pytest.fixture
def interpreted(request):
    """Whether the kernels are interpreted or emulated, where a test of many sizes takes fewer."""
    return "triton-interpreter" in request.node.name or "emulated-cuda" in request.node.name


@pytest.fixture
def emulated(request):
    """Whether CUDA kernels are emulated; tests/test_cuda_<op>.py have the sizes that take seconds."""
    return "emulated-cuda" in request.node.name


@pytest.fixture
def library():
    """The compiled extension."""
    need("native")
    return _native.library()


@contextlib.contextmanager
def much_memory(device, folder):
    """Of a GPU it is for one process at a time of those that share the folder, and given back.

    Not by xdist_group: only --dist=loadgroup heeds that.
    """
    if device != "cuda":
        yield
        return
    with (folder / "much_memory").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def far_apart(request, tmp_path, tmp_path_factory):
    """Lays out [2, ...] so that its halves lie more than 2^31 elements apart; in a sparse file on the CPU."""
    device = BACKENDS[request.node.callspec.params["backend"]][1]
    with much_memory(device, tmp_path_factory.getbasetemp().parent):  # the folder of all xdist's workers
        yield functools.partial(lay_far_apart, tmp_path)


def lay_far_apart(folder, x):
    distance = 2**31 + 2**12
    size = distance + x[0].numel()
    if x.is_cuda:
        storage = torch.empty(size, dtype=x.dtype, device=x.device)
    else:
        path = folder / f"sparse{len(list(folder.iterdir()))}"
        path.touch()
        os.truncate(path, size * x.element_size())
        storage = torch.from_file(str(path), shared=True, size=size, dtype=x.dtype)
    return storage.as_strided(x.shape, (distance, *x[0].contiguous().stride())).copy_(x)


@pytest.fixture(params=[1, 2])
def threads(request, interpreted):
    if interpreted and request.param > 1:
        pytest.skip("the interpreter has one thread")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """Small tensors gain nothing from a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The operators that torchvision gives fake kernels to when it is imported.
TORCHVISION_OPERATORS = [
    "_deform_conv2d_backward",
    "_ps_roi_align_backward",
    "_ps_roi_pool_backward",
    "_roi_align_backward",
    "_roi_pool_backward",
    "deform_conv2d",
    "nms",
    "ps_roi_align",
    "ps_roi_pool",
    "qnms",
    "qroi_align",
    "roi_align",
    "roi_pool",
]


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, its operators declared without kernels where its compiled part is for another torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        pytest.skip("torchvision is not installed")
    library = None
    try:
        torch.ops.load_library(next(Path(spec.origin).parent.glob("_C*")))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "DEF")
        for name in TORCHVISION_OPERATORS:
            library.define(f"{name}(Tensor x) -> Tensor")
    yield pytest.importorskip("torchvision")
    del library
