"""Exports that run without this package: ONNX by both exporters, TorchScript by torch.jit.trace."""

import copy
import warnings

import pytest
import torch

import vitdiv_kernels as vd
from vitdiv_kernels.nn import ReAttention, TalkingHeadsAttention

SHAPES = [
    (2, 3, 32, 32),
    (1, 3, 32, 32),
    (3, 3, 64, 24),
]  # of images: what was exported, other batches and sizes


class Model(torch.nn.Module):
    """Images of any size to patches, and a block of each attention with mixed heads."""

    def __init__(self, **options):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 16, 8, 8)
        self.blocks = torch.nn.Sequential(
            ReAttention(16, 4, norm="batch", norm_gain=1.0, **options),
            ReAttention(16, 4, norm="layer", norm_gain=1.0, transform_scale=True, **options),
            TalkingHeadsAttention(16, 4, **options),
        )

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return x


def trained_model(**options):
    """In evaluation, with statistics of its own."""
    model = Model().train()
    model(torch.randn(4, 3, 32, 32))
    evaluated = Model(**options).eval()
    evaluated.load_state_dict(model.state_dict())
    return evaluated


@pytest.fixture
def onnxruntime():
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    return pytest.importorskip("onnxruntime")


def export(model, path, dynamo):
    images = torch.randn(SHAPES[0])
    if dynamo:
        size = torch.export.Dim
        shapes = {"images": {0: size("batch"), 2: 8 * size("rows"), 3: 8 * size("columns")}}
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated; traced sizes
        axes = {"images": {0: "batch", 2: "height", 3: "width"}}
        torch.onnx.export(model, (images,), path, dynamo=False, input_names=["images"], dynamic_axes=axes)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_gives_the_models_values_for_any_batch_and_size(onnxruntime, dynamo, tmp_path):
    model, path = trained_model(), str(tmp_path / "model.onnx")
    export(model, path, dynamo)
    exact = copy.deepcopy(model).double()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        images = torch.randn(shape)
        (out,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = exact(images.double())
        torch.testing.assert_close(torch.from_numpy(out).double(), expected, rtol=1e-4, atol=1e-5)


def test_an_explicit_backend_is_refused_by_the_onnx_exporter(onnxruntime, tmp_path):
    with pytest.raises(Exception, match=r'"native" cannot run reattention.*take backend="reference" only'):
        export(trained_model(backend="native"), str(tmp_path / "model.onnx"), dynamo=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_model_can_be_saved_and_takes_any_batch_and_size(tmp_path):
    model, path = trained_model(), str(tmp_path / "model.pt")
    torch.jit.trace(model, (torch.randn(SHAPES[0]),)).save(path)
    loaded = torch.jit.load(path)
    assert "vitdiv::" not in str(loaded.inlined_graph)
    for shape in SHAPES:
        images = torch.randn(shape)
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_an_explicit_backend_is_refused_by_torch_jit_trace(backend):
    with pytest.raises(
        ValueError, match=f'"{backend}" cannot run reattention: exports to ONNX and torch.jit.'
    ):
        torch.jit.trace(trained_model(backend=backend), (torch.randn(SHAPES[0]),))
    x = torch.randn(2, 5, 8)
    with vd.use_backend(backend), pytest.raises(ValueError, match=r"\(set by use_backend\).*torch.jit.trace"):
        torch.jit.trace(vd.pairwise_cosine, (x,))
