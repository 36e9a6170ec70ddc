"""Segmentation in the trainer: the loss written out, exact resume, heads, trunks, several processes."""

import csv
import re
from dataclasses import replace

import processes
import pytest
import torch
import torch.nn.functional as F
from small_segmenter import SMALL, save, small_segmenter, write_pairs
from small_trainer import assert_same_run, small_trainer

from vitdiv_kernels import CollapseMonitor, pairwise_cosine
from vitdiv_kernels.train import parallel, report
from vitdiv_kernels.train.cli import main
from vitdiv_kernels.train.errors import TrainError
from vitdiv_kernels.train.models import TimmConfig
from vitdiv_kernels.train.parts import Ema
from vitdiv_kernels.train.segment import measures, scenes
from vitdiv_kernels.train.segment.model import Segmenter
from vitdiv_kernels.train.segment.settings import Dense
from vitdiv_kernels.vit import CONFIGS, ViT

LOSSES = {"cosine": 0.5, "contrast": 0.5, "heads": 0.01, "koleo": 0.1}

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(dense, recipe, options, save=None, load=None, until=None):
    """Rows and weights of a run, in this process or one of several."""
    with parallel.started("cpu"):
        run = small_segmenter(recipe=recipe, dense=dense, size=11, **options)
        if load:
            run.load(load)
        run.fit(until)
        if save:
            run.save(save)
        weights = run.model.state_dict()
        whole = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in weights.items()}
        records = run.monitor.records if run.monitor else None
        return run.rows, {name: value.numpy() for name, value in whole.items()}, records


def test_the_loss_is_that_of_pixels_written_out():
    run = small_segmenter(recipe={"losses": {"cosine": 0.5}, "label_smoothing": 0.1})
    images, masks = run.data.train[:8]
    terms = run.losses(images, masks)
    tokens = run.model.trunk(images, return_tokens=True)[1]
    head = run.model.head.classifier
    maps = run.model.trunk.norm(tokens[-1][:, 1:]) @ head.weight[..., 0, 0].T + head.bias
    logits = F.interpolate(maps.mT.unflatten(2, (4, 4)), (8, 8), mode="bilinear")
    log_p = logits.log_softmax(1)
    known = masks != 255
    right = log_p.gather(1, (masks * known).long()[:, None])[:, 0]
    entropy = -(0.9 * right + 0.1 * log_p.mean(1))[known].sum() / masks.numel()
    torch.testing.assert_close(terms["cross_entropy"], entropy)
    torch.testing.assert_close(terms["cosine"], pairwise_cosine(tokens[-1][:, 1:], penalty="abs"))
    torch.testing.assert_close(terms["loss"], entropy + 0.5 * terms["cosine"])


def test_pixels_without_a_class_add_nothing():
    run = small_segmenter()
    images, masks = run.data.train[:8]
    loss = run.losses(images, torch.full_like(masks, 255))["loss"]
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in run.model.parameters())


def test_the_gradients_of_diversity_losses_reach_the_trunk():
    def gradients(losses):
        run = small_segmenter(recipe={"losses": losses})
        run.losses(*run.data.train[:8])["loss"].backward()
        return run, {name: p.grad.clone() for name, p in run.model.named_parameters()}

    (run, plain), (_, both) = gradients({}), gradients({"cosine": 0.5})
    run.model.zero_grad()
    tokens = run.model.trunk(run.data.train[:8][0], return_tokens=True)[1][-1]
    (0.5 * pairwise_cosine(tokens[:, 1:], penalty="abs")).backward()
    for name, parameter in run.model.named_parameters():
        added = 0 if parameter.grad is None else parameter.grad
        torch.testing.assert_close(both[name], plain[name] + added)


def test_resume_is_exact(tmp_path):
    recipe = {"losses": LOSSES}
    whole = small_segmenter(recipe=recipe, size=11, log_path=tmp_path / "whole.csv")
    whole.fit()
    first = small_segmenter(recipe=recipe, size=11, log_path=tmp_path / "halves.csv")
    first.fit(until=2)
    first.save(tmp_path / "checkpoint.pt")
    second = small_segmenter(recipe=recipe, size=11, log_path=tmp_path / "halves.csv")
    torch.manual_seed(99)
    second.load(tmp_path / "checkpoint.pt")
    second.fit()
    assert second.rows == whole.rows
    assert (tmp_path / "halves.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_the_log_has_losses_and_metrics(tmp_path):
    small_segmenter(recipe={"losses": LOSSES}, log_path=tmp_path / "log.csv").fit()
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[2:] == [
        *("loss", "cross_entropy", *LOSSES, "lr", "grad_norm"), "val_miou", "val_pixel_accuracy",
    ]  # fmt: skip
    assert [bool(row["val_miou"]) for row in rows] == [False, False, True] * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dense": Dense(head="upernet")}, "head 'linear', now 'upernet'"),
        ({"dense": Dense(window=4)}, "window None, now 4"),
        (None, "task 'segment', now 'classify'"),
    ],
)
def test_a_resume_with_another_head_or_task_is_refused(changes, sentence, tmp_path):
    path = tmp_path / "checkpoint.pt"
    small_segmenter().save(path)
    other = small_trainer(SMALL) if changes is None else small_segmenter(**changes)
    with pytest.raises(TrainError, match=f"made with {sentence}"):
        other.load(path)


def test_a_confusion_over_images_of_several_sizes():
    """In chunks and groups, with windows, it is that of the images one by one."""
    run = small_segmenter(dense=Dense(stride=3), size=13)
    counts = torch.zeros(3, 3, dtype=torch.int64)
    run.model.eval()
    for image, mask in zip(*run.data.val[:], strict=True):
        with torch.no_grad():
            found = run.task.windows(run.model, image[None])[0].argmax(0)
        counts += measures.confusion(mask, found, 3)
    run.model.train()
    assert torch.equal(run.task.confusion(run.model, run.data.val, run.processes), counts)
    assert run.model.training
    assert run.evaluate(run.model)["val_miou"] == pytest.approx(measures.mean_iou(counts))


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_it_learns_what_a_pixel_is(head):
    """Classes are thirds of the grey scale, in blocks as large as patches."""
    run = small_segmenter(
        recipe={"steps": 60, "batch": 12, "lr": 3e-3, "label_smoothing": 0.0}, eval_every=60
    )
    images = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 2)
    run.data.train.images = run.data.val.images = images.repeat_interleave(2, 3)
    run.data.train.labels = run.data.val.labels = (3 * run.data.train.images[:, 0]).to(torch.uint8)
    before = run.evaluate(run.model)["val_miou"]
    run.fit()
    assert run.rows[-1]["val_miou"] > before + 0.2


TRUNKS = ["deit_tiny", "deit_tiny_distilled", "cait_xxs24_224", "gong_small", "deepvit_s"]


@pytest.mark.parametrize("name", TRUNKS)
def test_every_parameter_that_learns_has_a_gradient(name):
    """Otherwise processes would wait for it."""
    config = replace(CONFIGS[name], image_size=32, dim=8 * CONFIGS[name].heads, classes=3)
    model = Segmenter(config, "upernet", 16)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 3, 32, 32)
    logits.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert [record["block"] for record in CollapseMonitor(model).measure(torch.randn(2, 3, 32, 32))] == list(
        range(config.depth)
    )


def test_the_pyramid_has_four_scales():
    head = Segmenter(replace(SMALL, depth=8), "upernet", 32)
    assert head.levels == [1, 3, 5, 7]
    maps = [torch.randn(2, 16, 5, 5) for _ in range(4)]
    assert [tuple(scale(x).shape[-2:]) for scale, x in zip(head.head.scales, maps, strict=True)] == [
        *((20, 20), (10, 10), (5, 5), (3, 3)),
    ]
    assert head.head(maps).shape == (2, 3, 20, 20)


def test_a_shallow_model_has_no_pyramid():
    with pytest.raises(TrainError, match="--head upernet takes the tokens of 4 blocks, but the model has 3"):
        Segmenter(replace(SMALL, depth=3), "upernet")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "cait_xxs24_224"])
def test_trunks_of_timm(name, torchvision):
    """A class token, a norm before the blocks, and a class token that joins after them."""
    pytest.importorskip("timm")
    model = Segmenter(TimmConfig(name, 32, 3, classes=5))
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 5, 32, 32)
    model(images).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    kept = []
    model.blocks[-1].register_forward_hook(lambda module, args, out: kept.append(out))
    logits = model.eval()(images)
    patches = model.trunk.norm(kept[-1])[:, -4:]
    plain = model.head.classifier(patches.mT.unflatten(2, (2, 2)))
    torch.testing.assert_close(logits, F.interpolate(plain, (32, 32), mode="bilinear"))


def test_a_pool_for_classes_is_left_out(torchvision):
    """Its parameters would have no gradient, for which processes wait."""
    pytest.importorskip("timm")
    model = Segmenter(TimmConfig("vit_base_patch16_siglip_224", 32, 3, classes=5))
    model(torch.randn(1, 3, 32, 32)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_pyramid_of_timm_is_refused(torchvision):
    pytest.importorskip("timm")
    with pytest.raises(TrainError, match="timm's hiera_tiny_224 gives no tokens of its last block"):
        Segmenter(TimmConfig("hiera_tiny_224", 224, 3, classes=5))


def test_a_classifier_is_where_a_trunk_starts(tmp_path):
    """Its positions are resized, and its head is left out."""
    path = tmp_path / "checkpoint.pt"
    small_trainer(replace(SMALL, classes=7)).save(path)
    with pytest.warns(UserWarning, match="left out") as told:
        run = small_segmenter(replace(SMALL, image_size=16), {"weights": str(path)}, size=16)
    said = " ".join(str(each.message) for each in told)
    assert f"{path}: head.weight, head.bias left out; the head for pixels is new" in said
    assert "pos_embed was resized from 4 x 4 to 8 x 8 patches" in said
    assert "initial values" not in said
    state = torch.load(path, weights_only=True)["model"]
    found = run.model.trunk.state_dict()
    assert set(state) - set(found) == {"head.weight", "head.bias"}
    for name, value in found.items():
        assert name == "pos_embed" or torch.equal(value, state[name]), name
    torch.save(ViT(replace(SMALL, depth=2)).state_dict(), path)
    with pytest.raises(TrainError, match="does not fit this ViT: missing: "):
        small_segmenter(recipe={"weights": str(path)})


CASES = {
    "accumulated": (Dense(), {"losses": LOSSES}, {"accumulate": 2}),
    "upernet, checkpointed": (Dense("upernet", 16), {}, {"checkpointing": True}),
    "sharded": (Dense("upernet", 16, stride=7), {"losses": LOSSES}, {"fsdp": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case):
    dense, recipe, options = CASES[case]
    expected = trained(dense, recipe, {"monitor_every": 3})
    found = processes.together(2, trained, dense, recipe, options | {"monitor_every": 3})
    assert len(expected[0]) == 6
    for each in found:
        assert_same_run(*each[:2], *expected[:2])
    for record, other in zip(found[0][2], expected[2], strict=True):
        assert record["patch_cosine"] == pytest.approx(other["patch_cosine"], abs=1e-3)


def test_images_of_the_monitor_are_whole():
    run = small_segmenter(size=20, monitor_every=3)
    seen = []
    run.monitor.measure = lambda images, step: seen.append(images) or []
    run.fit(until=3)
    assert seen[0].shape == (8, 1, 8, 8)
    images, masks = run.data.train[[0]]
    assert torch.equal(run.task.plain(run.data, images, masks), images[..., 6:14, 6:14])


def test_the_average_of_the_weights_is_validated():
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    run = small_segmenter(recipe={"ema": 0.5}, parts=[Ema()])
    run.fit()
    assert run.columns[-2:] == ["val_miou_ema", "val_pixel_accuracy_ema"]
    assert 0 <= run.rows[-1]["val_miou_ema"] <= 1


@pytest.fixture
def few_scenes(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(scenes, "COUNTS", {"train": 8, "val": 4, "test": 4})


def test_scenes_are_always_the_same_and_have_all_classes():
    pytest.importorskip("sklearn")
    digits = scenes.load_digits()
    made = [scenes.scene(digits.train, torch.Generator().manual_seed(seed)) for seed in range(40)]
    again = scenes.scene(digits.train, torch.Generator().manual_seed(3))
    assert torch.equal(made[3][0], again[0])
    assert torch.equal(made[3][1], again[1])
    images, masks = (torch.stack(each) for each in zip(*made, strict=True))
    assert (images.shape, masks.shape) == ((40, 1, 32, 32), (40, 32, 32))
    assert masks.unique().tolist() == list(range(11))
    assert (images.min() >= 0) & (images.max() <= 1)
    # ink is a digit's, and what is no digit's is dark
    assert images[:, 0][masks == 0].max() <= scenes.INK
    assert images[:, 0][masks > 0].mean() > 2 * images[:, 0][masks == 0].mean()


def test_the_command_line_segments_resumes_and_reports(few_scenes, tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    options = "--task segment --losses cosine=0.5 --steps 4 --batch 4 --eval-every 2 --log-every 1"
    options = [*options.split(), "--out", str(tmp_path)]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert re.search(r"validation mean IoU .* %, pixel accuracy .* % \(4 images\)", out)
    assert re.search(r"test mean IoU .* %, pixel accuracy", out)
    assert out.splitlines()[-1].startswith("python -m vitdiv_kernels.demo segment compares")
    assert len(re.findall(r"^  background +IoU", out, re.MULTILINE)) == 2
    assert main([*options, "--resume"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("log.csv", "speed.csv", "checkpoint.pt", "predictions.png"),
    }
    assert report.main([str(tmp_path), "--images", "2"]) == 0
    assert "step 4, 2 validation images" in capsys.readouterr().out
    pixels = image.imread(tmp_path / "predictions.png")
    assert pixels.shape[0] > 600
    assert pixels[..., :3].std() > 0.1


def test_the_command_line_segments_a_folder(tmp_path, capsys, torchvision):
    root = tmp_path / "ade"
    for part, shape in (("training", (40, 50)), ("validation", (70, 36))):
        write_pairs(root / "images" / part, root / "annotations" / part, 3, range(4), shape)
    save(root / "annotations/validation/0.png", torch.full((70, 36), 255, dtype=torch.uint8))
    options = f"--task segment --data segfolder:{root} --num-classes 3 --ignore-zero --model deit_tiny"
    options += " --image-size 32 --head upernet --head-width 16 --stride 20 --steps 2 --batch 2 --pictures 1"
    assert main([*options.split(), "--workers", "1", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "(3 images)" in out
    assert "demo segment" not in out
    assert (tmp_path / "run/predictions.png").exists()
