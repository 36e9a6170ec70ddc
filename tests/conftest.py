"""What all tests share: a seed, memory poisoned with NaN, and the backends that one test body runs over."""

import os

import pytest
import torch

from vitdiv_kernels import _dispatch

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


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The `backend` argument. A backend that is not here is skipped with its reason; in CI it fails."""
    name, device = BACKENDS[request.param]
    why_not = _dispatch.missing(name, "reattention", device)
    if why_not is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{request.param}: {why_not}")
    return name


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
