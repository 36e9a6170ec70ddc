"""What every launch of a Triton kernel takes from torch's settings."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from vitdiv_kernels.ops import _launch as _triton


@pytest.fixture
def matmul():
    """torch.backends.cuda.matmul, as it was before the test."""
    matmul, older = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    newer = getattr(matmul, "fp32_precision", None)
    if newer is None:
        pytest.skip("this torch has only the older setting")
    for_all = torch.backends.fp32_precision
    yield matmul
    torch.backends.fp32_precision = for_all
    torch.set_float32_matmul_precision(older)
    matmul.fp32_precision = newer


def test_tf32_where_torch_may_take_it(matmul):
    """By any of torch's settings, of which some make the older getter raise."""

    def precision():
        return _triton.input_precision(torch.float32)

    for setting, expected in [("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")]:
        torch.set_float32_matmul_precision(setting)
        assert precision() == expected
    for setting, expected in [("ieee", "tf32x3"), ("tf32", "tf32"), ("none", "tf32x3")]:
        matmul.fp32_precision = setting
        assert precision() == expected
    torch.backends.fp32_precision = "tf32"
    assert precision() == "tf32"
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert _triton.input_precision(dtype) == "ieee"


def test_tf32_by_the_older_setting_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    for setting, expected in [("highest", "tf32x3"), ("high", "tf32")]:
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        assert _triton.input_precision(torch.float32) == expected


@pytest.mark.parametrize("maxnreg", [None, 240])
def test_multiply_and_add_are_fused(maxnreg):
    """Also by releases of Triton that do so only if told to."""
    options = {}

    class Kernel:
        arg_names = ("x",)

        def __getitem__(self, grid):
            return lambda x, **named: options.update(named)

    _triton.launch(Kernel(), (1,), torch.zeros(1), num_warps=1, num_stages=1, maxnreg=maxnreg)
    assert options.pop("maxnreg", None) == maxnreg
    assert options == {"enable_fp_fusion": True, "num_warps": 1, "num_stages": 1}


def test_a_launch_with_other_arguments_is_refused():
    class Kernel:
        __name__ = "scale_rows"
        arg_names = "x", "rows", "factor", "BLOCK"

        def __getitem__(self, grid):
            raise AssertionError("launched")

    x = torch.zeros(1)
    options = dict(num_warps=1, num_stages=1)
    for arguments, constexprs in [((x, 1), {}), ((x, 1, 2, 3, 4), {}), ((x, 1, 2, 3), {"BLOCK": 16})]:
        with pytest.raises(TypeError, match=r"scale_rows must be launched with . arguments, x, rows, factor"):
            _triton.launch(Kernel(), (1,), *arguments, **options, **constexprs)
    with pytest.raises(TypeError, match="3 arguments, x, rows, factor, got 3 and unknown SIZE"):
        _triton.launch(Kernel(), (1,), x, 1, 2, **options, BLOCK=16, SIZE=2)
