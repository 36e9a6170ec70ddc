"""What all tests share: a seed, memory poisoned with NaN, and the backends that one test body runs over."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from vitdiv_kernels import _dispatch, _native

BACKENDS = {"reference": ("reference", "cpu"), "native-cpu": ("native", "cpu")}


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


def need(backend, device="cpu"):
    """Skip, with the reason, what needs a backend that is not here; fail it in CI, which has to have it."""
    why_not = _dispatch.missing(backend, "reattention", device)
    if why_not is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{backend} on {device}: {why_not}")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The `backend` argument of one test body that runs on every backend."""
    need(*BACKENDS[request.param])
    return BACKENDS[request.param][0]


@pytest.fixture
def library():
    """The compiled extension."""
    need("native")
    return _native.library()


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
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
