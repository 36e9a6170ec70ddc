"""What all tests share: a seed, memory poisoned with NaN, and the backends that one test body runs over."""

import contextlib
import gc
import importlib.util
import os
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker for each core: threads that wait for one another busily would take it from other workers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    # deterministic cuBLAS, which use_deterministic_algorithms asks for
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Triton reads it when it is imported and when a kernel is defined; torch alone does not import Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if importlib.util.find_spec("hypothesis") is None:
    import without_hypothesis

    without_hypothesis.install()

import emulated_operators  # noqa: E402
import emulation_build  # noqa: E402
import gpu_cases  # noqa: E402
import sampling  # noqa: E402

from vitdiv_kernels import _dispatch, _native  # noqa: E402

BACKENDS = {
    "reference": ("reference", "cpu"),
    "native-cpu": ("native", "cpu"),
    "native-cuda": ("native", "cuda"),
    "emulated-cuda": ("native", "cpu"),
    "triton-interpreter": ("triton", "cpu"),
    "triton-gpu": ("triton", "cuda"),
}
GPU_CASES = gpu_cases.load()
# Each of their cases takes seconds, or, of native-cuda, time on a GPU, of which there is little.
SAMPLED = ("triton-interpreter", "triton-gpu", "emulated-cuda", "native-cuda")
INTERPRETED = _dispatch._INTERPRETED
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
if wanted := os.environ.get("VITDIV_TEST_BACKENDS"):  # to collect 1,000 tests rather than 8,000
    ABSENT |= {name: "VITDIV_TEST_BACKENDS is set" for name in BACKENDS if name not in wanted.split(",")}


def pytest_configure():
    # The plain formula in float32 sets the budgets of float32. On a GPU torch allows cuDNN's convolutions
    # TF32, which would make the budgets a hundred times as large.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # Only the tests of the backend "triton-interpreter" see it, all others what a user sees.
    _dispatch._INTERPRETED = False


def pytest_collection_finish():
    """What lives as long as the run is not looked through for cycles each time: a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


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


def tf32_allowed():
    try:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # the older settings cannot be read while the newer ones say something else
        return "set another way"


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
            "TF32 of cuDNN and cuBLAS": tf32_allowed(),
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


def backend_of(node):
    """Of BACKENDS, that of a test, if it has one."""
    callspec = getattr(node, "callspec", None)
    name = callspec and callspec.params.get("backend")
    return name if name in BACKENDS else None


@pytest.fixture(params=[name for name in BACKENDS if name not in ABSENT])
def backend(request, monkeypatch):
    """The `backend` argument of one test body that runs on every backend, on tensors of its device."""
    name, device = BACKENDS[request.param]
    if request.param == "triton-interpreter":
        monkeypatch.setattr(_dispatch, "_INTERPRETED", INTERPRETED)
    need(name, device, operation_of(request.node))
    if request.param == "triton-interpreter":
        import interpreter_arithmetic  # these import Triton
        import interpreter_checks
        import interpreter_speed

        interpreter_checks.install()
        interpreter_arithmetic.install()
        interpreter_speed.install()
        if not request.config.getoption("--every-case"):
            interpreter_speed.products_by_torch(monkeypatch)
    if request.param == "emulated-cuda":
        emulated_operators.need(operation_of(request.node))
        emulated_operators.take_the_place_of_native(monkeypatch)
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield name


@pytest.fixture
def emulator():
    """The operators over emulated CUDA kernels; what a test configures lasts as long as the test."""
    if emulation_build.compiler() is None:
        pytest.skip("no C++ compiler")
    with emulated_operators.emulator().configure():
        yield emulated_operators.emulator()


def pytest_addoption(parser):
    parser.addoption(
        "--every-case",
        action="store_true",
        help="interpret, emulate and compile all cases of the GPU kernels, not a sample: half an hour",
    )


def pytest_collection_modifyitems(config, items):
    """Of the cases that are interpreted or emulated, slowly, or compiled for the GPU, keep such that each
    value of each parameter is in one; emulated, only those of the files of tests that are for one
    operation. Of the tests that tests/gpu_cases.json knows a GPU runs the cases that it names."""
    dropped = {item for item in items if backend_of(item) == "emulated-cuda" and operation_of(item) is None}
    tests, known = defaultdict(list), {}
    for item in items:
        if item in dropped:
            continue
        name, (test, case) = backend_of(item), gpu_cases.parted(gpu_cases.case_of(item))
        if test in GPU_CASES and (name == "triton-gpu" or (name is None and not INTERPRETED)):
            known[item] = case in GPU_CASES[test]
        elif name in SAMPLED:
            tests[item.path, item.originalname, name].append(item)
    if not config.getoption("--every-case"):
        dropped |= {item for cases in tests.values() for item in set(cases) - set(covering(cases))}
        dropped |= {item for item, runs in known.items() if not runs}
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


def covering(cases):
    """Few of a test's cases, in their order, that have each value of each parameter among them."""
    return sampling.covering(
        {case: {(name, str(value)) for name, value in case.callspec.params.items()} for case in cases}
    )


@pytest.fixture
def interpreted(request):
    """Whether the kernels are interpreted or emulated, where a test of many sizes takes fewer."""
    return backend_of(request.node) in ("triton-interpreter", "emulated-cuda")


@pytest.fixture
def emulated(request):
    """Whether CUDA kernels are emulated; tests/cuda/test_cuda_<op>.py have the sizes that take seconds."""
    return backend_of(request.node) == "emulated-cuda"


@pytest.fixture
def library():
    """The compiled extension."""
    need("native")
    return _native.library()


_held = []  # the lock of this process, while it has it


@contextlib.contextmanager
def on_the_gpu_alone():
    """Of all workers one at a time: each such test takes tens of gigabytes, more than any GPU has for all of
    them, and an allocator keeps what it has."""
    if _held:
        yield
        return
    import fcntl  # not on Windows

    with open(Path(tempfile.gettempdir()) / f"vitdiv_far_apart_{os.getuid()}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _held.append(file)
        try:
            yield
        finally:
            gc.collect()
            if HAS_GPU:
                torch.cuda.empty_cache()
            _held.clear()


@pytest.fixture
def far_apart(tmp_path):
    """Lays out [n, ...] so that its items lie more than 2^31 elements apart; in a sparse file on the CPU."""

    def lay_out(x, distance=2**31 + 2**12):
        size = distance * (len(x) - 1) + x[0].numel()
        if x.is_cuda:
            alone.enter_context(on_the_gpu_alone())
            storage = torch.empty(size, dtype=x.dtype, device=x.device)
        else:
            path = tmp_path / f"sparse{len(list(tmp_path.iterdir()))}"
            path.touch()
            os.truncate(path, size * x.element_size())
            storage = torch.from_file(str(path), shared=True, size=size, dtype=x.dtype)
        return storage.as_strided(x.shape, (distance, *x[0].contiguous().stride())).copy_(x)

    with contextlib.ExitStack() as alone:
        yield lay_out


@pytest.fixture(params=[1, 2])
def threads(request, interpreted):
    if interpreted and request.param > 1:
        pytest.skip("the interpreter has one thread")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def threads_in_turn(request, interpreted):
    """Half of a test's cases have one thread, half two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if interpreted else 1 + sum(request.node.callspec.indices.values()) % 2)
    yield
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
