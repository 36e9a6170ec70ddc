"""CollapseMonitor: each measure against its plain formula, no trace in training, cost counted, CSV."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import need
from small_vit import hooks_of, images, small_vit, softmax_maps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vitdiv_kernels import CollapseMonitor, use_backend
from vitdiv_kernels.attach import monitor
from vitdiv_kernels.nn import ReAttention
from vitdiv_kernels.vit import CONFIGS, ViT


def a_model(reattention=(1, 2), **changes):
    return small_vit(reattention=reattention, **changes)


def off_diagonal(matrices):
    return matrices[..., ~torch.eye(matrices.shape[-1], dtype=torch.bool)]


@torch.no_grad()
def test_every_measure_is_its_formula():
    model, x = a_model().eval(), images()
    records = CollapseMonitor(model).measure(x, step=7)
    tokens = model(x, return_tokens=True)[1]
    assert [(r["step"], r["block"]) for r in records] == [(7, 0), (7, 1), (7, 2)]
    mixed = []
    for i, record in enumerate(records):
        patches = tokens[i + 1][:, 1:]
        unit = F.normalize(patches, dim=-1)
        cosines = off_diagonal(unit @ unit.mT)
        maps = softmax_maps(model, tokens, i)
        heads = F.normalize(maps.flatten(2), dim=-1)
        share = torch.linalg.svdvals(unit) ** 2 / 16
        away = (patches - patches.mean(1, keepdim=True)).flatten(1).norm(dim=1) / patches.flatten(1).norm(
            dim=1
        )
        expected = {
            "patch_cosine": cosines.mean(),
            "patch_abs_cosine": cosines.abs().mean(),
            "head_cosine": off_diagonal(heads @ heads.mT).mean(),
            "attention_entropy": -(maps * maps.log()).sum(-1).mean(),
            "effective_rank": (-(share * share.log()).sum(-1)).exp().mean(),
            "residual": away.mean(),
        }
        for name, value in expected.items():
            assert record[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
        for level in (0.05, 0.5, 0.95):
            quantile = cosines.flatten().quantile(level).item()
            assert record[f"patch_cosine_q{round(100 * level):02d}"] == pytest.approx(quantile, abs=1e-2)
        attn = model.blocks[i].attn
        if isinstance(attn, ReAttention):
            maps = attn.var_norm(attn.reatten_matrix(maps))
        mixed.append(F.normalize(maps.flatten(2), dim=-1))
    for p, record in enumerate(records):
        row = [(mixed[p] * other).sum(-1).mean().item() for other in mixed]
        assert record["attention_cosine"] == pytest.approx(row, abs=1e-5)


def test_layers_are_compared_before_the_mix_on_request():
    model, x = a_model().eval(), images()
    row = CollapseMonitor(model, mixed=False).measure(x)[0]["attention_cosine"]
    with torch.no_grad():
        tokens = model(x, return_tokens=True)[1]
        maps = [F.normalize(softmax_maps(model, tokens, i).flatten(2), dim=-1) for i in range(3)]
        assert row == pytest.approx([(maps[0] * other).sum(-1).mean().item() for other in maps], abs=1e-5)


@pytest.mark.parametrize("n", [2, 64, 65, 150])
def test_quantiles_are_those_of_all_pairs(n):
    x = torch.randn(3, n, 4) + 0.5
    unit = F.normalize(x, dim=-1)
    i, j = torch.triu_indices(n, n, 1)
    cosines = (unit @ unit.mT)[:, i, j].flatten().sort().values
    levels = (0.0, 0.1, 0.5, 0.9, 1.0)
    for level, found in zip(levels, monitor.cosine_quantiles(x, levels), strict=True):
        # between the neighbours of the rank, give or take a bin
        low, high = (cosines[min(max(r, 0), len(cosines) - 1)] for r in (
            math.floor(level * len(cosines)) - 1, math.ceil(level * len(cosines))
        ))  # fmt: skip
        assert low - 5e-4 <= found <= high + 5e-4


def test_quantiles_are_interpolated_within_a_bin():
    x = torch.randn(3, 150, 64)
    unit = F.normalize(x, dim=-1)
    i, j = torch.triu_indices(150, 150, 1)
    levels = torch.linspace(0.1, 0.9, 9)
    exact = (unit @ unit.mT)[:, i, j].flatten().quantile(levels)
    found = torch.tensor(monitor.cosine_quantiles(x, levels.tolist()))
    assert abs((found - exact).mean()) < 0.2 * 2 / monitor.BINS


def test_quantiles_of_equal_vectors_are_one():
    assert monitor.cosine_quantiles(torch.ones(2, 9, 3)) == pytest.approx([1, 1, 1], abs=5e-4)


def test_extremes():
    equal = torch.ones(2, 9, 3) * torch.tensor([1.0, 2.0, 3.0])
    assert monitor.residual(equal).item() == pytest.approx(0, abs=1e-6)
    assert monitor.residual(torch.zeros(2, 9, 3)).item() == 0
    assert monitor.effective_rank(torch.zeros(2, 9, 3)).item() == 0
    assert monitor.effective_rank(torch.stack([0 * equal[0], equal[0]])).item() == pytest.approx(0.5)
    away = equal - equal.flip(1) + torch.randn(2, 9, 3)
    assert monitor.residual(away - away.mean(1, keepdim=True)).item() == pytest.approx(1)
    assert monitor.effective_rank(equal).item() == pytest.approx(1, abs=1e-3)
    q = torch.zeros(1, 2, 70, 4)
    assert monitor.attention_entropy(q, q).item() == pytest.approx(math.log(70), rel=1e-6)
    assert monitor.attention_entropy(q[:, :, :3], q).item() == pytest.approx(math.log(70), rel=1e-6)
    sharp = 1e3 * torch.eye(70)[None, None]
    assert monitor.attention_entropy(sharp, sharp).item() == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_a_model_of_zeros_is_measured():
    model = a_model(())
    for parameter in model.parameters():
        parameter.zero_()
    for record in CollapseMonitor(model).measure(images()):
        expected = dict.fromkeys(monitor.MEASURES, 0.0)
        expected |= {"head_cosine": 1.0, "attention_entropy": math.log(17)}
        assert {name: record[name] for name in expected} == pytest.approx(expected, abs=5e-4)
        assert record["attention_cosine"] == pytest.approx([1.0] * 3)


@torch.no_grad()
def test_register_tokens_are_dropped():
    model, x = a_model(()).eval(), images()
    tokens = model(x, return_tokens=True)[1]
    expected = monitor.residual(tokens[1][:, 5:]).item()
    assert CollapseMonitor(model, num_prefix_tokens=5).measure(x)[0]["residual"] == pytest.approx(expected)


def test_at_most_so_many_images_are_measured():
    model, x = a_model(), images(5)
    assert CollapseMonitor(model, images=2).measure(x) == CollapseMonitor(model).measure(x[:2])


def test_layers_of_many_images_are_means_over_all_of_them():
    """Which are compared some at a time: of 17 tokens 56."""
    model, x = a_model(), images(60)
    whole, first, rest = (CollapseMonitor(model, images=60).measure(part) for part in (x, x[:20], x[20:]))
    for record, one, other in zip(whole, first, rest, strict=True):
        pairs = zip(one["attention_cosine"], other["attention_cosine"], strict=True)
        assert record["attention_cosine"] == pytest.approx([(a + 2 * b) / 3 for a, b in pairs], abs=1e-6)


def test_a_model_that_diverged_is_measured():
    x = images()
    x[0, 0, 0, 0] = math.inf
    watch = CollapseMonitor(a_model())
    last = watch.measure(x)[-1]
    assert all(math.isnan(last[name]) for name in monitor.MEASURES)


def test_training_goes_on_as_without_it():
    x, states = images(), []
    for watched in (False, True):
        torch.manual_seed(1)
        model = a_model(drop_path=0.3).train()
        model.blocks[1].attn.var_norm.eval()  # a frozen norm stays frozen
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        watch = CollapseMonitor(model, every=2) if watched else None
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if watched:
                watch.step(x)
                assert hooks_of(model) == 0
        assert model.training
        assert not model.blocks[1].attn.var_norm.training
        assert model.blocks[2].attn.var_norm.training
        states.append(model.state_dict())
    assert [r["step"] for r in watch.records] == [2, 2, 2, 4, 4, 4]
    for (name, a), b in zip(states[0].items(), states[1].values(), strict=True):
        assert torch.equal(a, b), name


def test_a_failing_forward_leaves_no_hooks_and_the_mode():
    model = a_model().train()
    with pytest.raises(RuntimeError):
        CollapseMonitor(model).measure(torch.randn(2, 3, 8, 8))
    assert hooks_of(model) == 0
    assert model.training


def test_a_compiled_model_is_measured_without_compiling():
    model, x = a_model().eval(), images()
    expected = CollapseMonitor(model).measure(x)
    assert CollapseMonitor(torch.compile(model)).measure(x) == expected


def test_autocast_has_no_influence_on_a_measure():
    x, q = torch.randn(2, 9, 8), torch.randn(2, 3, 9, 8)
    for measure, inputs in (
        (monitor.cosine_quantiles, (x,)), (monitor.effective_rank, (x,)), (monitor.residual, (x,)),
        (monitor.attention_entropy, (q, q)),
    ):  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            got = measure(*inputs)
        assert got == measure(*inputs)


def test_autocast_has_no_influence():
    model, x = a_model().eval(), images()
    expected = CollapseMonitor(model).measure(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert CollapseMonitor(model).measure(x) == expected


class Watch(TorchDispatchMode):
    """Counts operators, and finds the tensors whose last two axes are N x N."""

    def __init__(self, tokens=0):
        super().__init__()
        self.operators, self.square, self.tokens = 0, [], tokens

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and min((0, 0, *tensor.shape)[-2:]) >= self.tokens:
                self.square.append((str(func), tuple(tensor.shape)))
        return out


def test_steps_between_samples_run_no_operator():
    watch = CollapseMonitor(a_model(), every=50)
    x = images()
    with Watch() as seen:
        for _ in range(49):
            assert watch.step(x) is None
    assert seen.operators == 0
    assert len(watch.step(x)) == 3
    # a number of its own
    assert watch.step(x, step=51) is None
    assert [record["step"] for record in watch.step(x, step=150)] == [150] * 3


def test_no_matrix_of_all_tokens_is_made():
    need("native")
    # 401 tokens of 24 features: no axis but that of tokens is as long as 400
    model = a_model(image_size=40, dim=24)
    with use_backend("native"), Watch(tokens=400) as seen:
        CollapseMonitor(model, images=2).measure(torch.randn(2, 1, 40, 40))
    assert seen.square == []


def test_a_sample_costs_less_than_three_percent_of_the_steps_between():
    """Counted, per image: multiplications of matrices, and singular values by Golub and Van Loan's count."""

    def svd(shape, *_, **__):
        *_, m, n = shape
        m, n = max(m, n), min(m, n)
        return math.prod(shape[:-2]) * (4 * m * n**2 - 4 * n**3 // 3)

    model = ViT(replace(CONFIGS["deit_tiny"], depth=4))
    x = torch.randn(1, 3, 224, 224)
    mapping = {torch.ops.aten._linalg_svd: svd}
    with use_backend("reference"):
        with FlopCounterMode(display=False, custom_mapping=mapping) as step:
            model(x).sum().backward()
        with FlopCounterMode(display=False, custom_mapping=mapping) as sample:
            CollapseMonitor(model, images=1).measure(x)
    every, batch, measured = 50, 16, 8
    share = measured * sample.get_total_flops() / (every * batch * step.get_total_flops())
    assert 0 < share < 0.03


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "collapse.csv"
    watch = CollapseMonitor(a_model(), every=1, images=2, csv=path)
    for _ in range(2):
        watch.step(images())
    assert monitor.read_records(path) == watch.records
    monitor.write_records(path, watch.records[:3])
    assert monitor.read_records(path) == watch.records[:3]
    deep = [record | {"attention_cosine": [i / 10 for i in range(12)]} for record in watch.records]
    monitor.write_records(path, deep)
    assert monitor.read_records(path) == deep
    for _ in range(2):
        monitor.write_records(path, [])
        assert not path.exists()
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="is no file of CollapseMonitor: it has no attention_entropy, block"):
        monitor.read_records(path)
    monitor.write_records(path, watch.records)
    path.write_text(path.read_text()[:-200])  # killed while it wrote
    lines = len(path.read_text().splitlines())
    with pytest.raises(ValueError, match=f"line {lines} of .* is no record of CollapseMonitor, or half of"):
        monitor.read_records(path)


def unknown():
    model = a_model()
    model.blocks[1].attn.locality = nn.Linear(16, 2)
    return model


def layer_norm():
    model = a_model()
    model.blocks[1].attn = ReAttention(16, 2, norm="layer")
    return model


@pytest.mark.parametrize(
    ("error", "sentence", "call"),
    [
        (ValueError, "every must be an integer of at least 1, got 0",
         lambda: CollapseMonitor(a_model(), every=0)),
        (ValueError, "images must be an integer of at least 1",
         lambda: CollapseMonitor(a_model(), images=1.5)),
        (TypeError, "model must have its blocks in model.blocks", lambda: CollapseMonitor(nn.Linear(2, 2))),
        (TypeError, "mixes, rotates or biases between", lambda: CollapseMonitor(unknown())),
        (TypeError, "images must be a torch.Tensor, got list",
         lambda: CollapseMonitor(a_model()).measure([1])),
        (ValueError, r"images must have shape \[B, C, S, S\], B > 0, got \[1, 8, 8\]",
         lambda: CollapseMonitor(a_model()).measure(torch.ones(1, 8, 8))),
        (ValueError, "patches need two at least, but the model has 2 tokens, the first 1 of which",
         lambda: CollapseMonitor(a_model(patch=8)).measure(images())),
        (TypeError, "norm 'layer' are no fixed mix", lambda: CollapseMonitor(layer_norm()).measure(images())),
        (ValueError, "x must have shape", lambda: monitor.cosine_quantiles(torch.ones(3))),
        (ValueError, "q must have shape", lambda: monitor.attention_entropy(torch.ones(3), torch.ones(3))),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(error, sentence, call):
    with pytest.raises(error, match=sentence):
        call()
