"""CutMix in the trainer: pixels, shares and labels agree, runs repeat, the presets train whole."""

import csv
import math
from dataclasses import replace

import pytest
import torch
from small_trainer import small_trainer
from torch.nn.functional import log_softmax

from vitdiv_kernels import DiversityObjective
from vitdiv_kernels.attach.presets import PRESETS
from vitdiv_kernels.train import cutmix
from vitdiv_kernels.train.cli import main
from vitdiv_kernels.train.errors import TrainError
from vitdiv_kernels.train.recipe import learning_rate
from vitdiv_kernels.vit import ViTConfig

CONFIG = ViTConfig(
    image_size=12, channels=2, patch=3, dim=16, depth=3, heads=2, mlp_ratio=2.0, classes=4, drop_path=0.2
)
MIXING = {"patch_mixing": 1.0}


pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(augment=None, config=CONFIG, **recipe):
    return small_trainer(config, recipe, augment=augment)


def draw(count, alpha, size=(24, 48), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [cutmix.draw_box(*size, alpha, generator) for _ in range(count)]


def test_boxes_have_the_image_s_proportions_and_lie_in_it():
    boxes = draw(1000, 1000.0)  # the areas are near a half
    assert all(0 <= top <= bottom <= 24 and 0 <= left <= right <= 48 for top, bottom, left, right in boxes)
    whole = [box for box in boxes if box[0] > 0 and box[1] < 24 and box[2] > 0 and box[3] < 48]
    assert {bottom - top for top, bottom, _, _ in whole} == {16, 17}
    assert {right - left for _, _, left, right in whole} >= {33, 34}
    assert all(abs(2 * (box[1] - box[0]) - (box[3] - box[2])) <= 1 for box in whole)
    assert {box[0] for box in boxes} == set(range(24 - 8))
    assert {box[3] for box in boxes} >= set(range(20, 48))


@pytest.mark.parametrize("alpha", [1.0, 20.0])
def test_areas_are_those_of_the_beta_distribution(alpha):
    """The mean area over a grid of lambdas, weighted by their density, and over all centres."""
    lambdas = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    density = (lambdas * (1 - lambdas)) ** (alpha - 1)
    sides = []
    for pixels in (24, 48):
        side = ((1 - lambdas).sqrt() * pixels).long().unsqueeze(1)
        first = torch.arange(pixels) - side // 2
        sides.append(((first + side).clamp_max(pixels) - first.clamp_min(0)).double() / pixels)
    areas = [1 - cutmix.share_left(box, 24, 48) for box in draw(3000, alpha)]
    for power in (1, 2):
        each = (sides[0] ** power).mean(1) * (sides[1] ** power).mean(1)
        expected = float((density * each).sum() / density.sum())
        found = torch.tensor(areas, dtype=torch.float64) ** power
        assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(len(found))


def test_a_seed_is_a_sequence_of_boxes():
    assert draw(20, 1.0) == draw(20, 1.0)
    assert len(set(draw(20, 1.0))) > 10
    assert draw(20, 1.0) != draw(20, 1.0, seed=1)


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (2, 7, 3, 4), (0, 8, 0, 12), (5, 8, 0, 12), (1, 2, 10, 12)])
def test_pixels_in_the_box_are_of_the_other_image(box):
    images = torch.rand(5, 2, 8, 12)
    before = images.clone()
    mixed = cutmix.mix(images, box)
    assert torch.equal(images, before)
    outside = 0
    for y in range(8):
        for x in range(12):
            within = box[0] <= y < box[1] and box[2] <= x < box[3]
            outside += not within
            assert torch.equal(mixed[:, :, y, x], (images.flip(0) if within else images)[:, :, y, x])
    assert cutmix.share_left(box, 8, 12) == pytest.approx(outside / 96)


def cross_entropy(logits, targets, smoothing):
    targets = (1 - smoothing) * targets + smoothing / targets.shape[-1]
    return -(targets * log_softmax(logits, -1)).sum(-1).mean()


def test_a_step_takes_labels_by_the_pixels_that_it_mixed(monkeypatch):
    """Whatever was mixed is read off the pixels that enter the model; the labels must be theirs."""
    run = trainer(lambda images, _: images, losses=MIXING, label_smoothing=0.2)
    seen, mixings = [], []

    forward, call = run.model.forward, DiversityObjective.__call__

    def keep_logits(images):
        logits, tokens = forward(images, return_tokens=True)
        patches = run.model.head(run.model.norm(tokens[-1]))[:, 1:]
        seen.append((images, logits.detach(), patches.detach()))
        return logits

    def keep_mixing(self, *, mixing=None, **others):
        mixings.append(mixing)
        return call(self, mixing=mixing, **others)

    run.model.forward = keep_logits
    monkeypatch.setattr(DiversityObjective, "__call__", keep_mixing)
    cut = 0
    for step in range(5):
        images = run.data.train.images[8 * step : 8 * step + 8]
        labels = run.data.train.labels[8 * step : 8 * step + 8]
        terms = run.train_step(images, labels)
        entered, logits, patch_logits = seen[-1]
        mine, others = entered == images, entered == images.flip(0)
        assert (mine ^ others).all()
        assert (mine == mine[0, 0]).all()  # one box for the batch

        counts = torch.zeros(4, 4)
        for y in range(12):
            for x in range(12):
                counts[y // 3, x // 3] += mine[0, 0, y, x]
        shares = counts.flatten() / 9
        cut += bool(((shares > 0) & (shares < 1)).any())
        given = mixings[-1]
        assert torch.equal(given[0], labels)
        assert torch.equal(given[1], labels.flip(0))
        torch.testing.assert_close(given[2], shares)

        first, second = torch.eye(4)[labels], torch.eye(4)[labels.flip(0)]
        share = mine[0, 0].float().mean()
        expected = cross_entropy(logits, share * first + (1 - share) * second, 0.2)
        torch.testing.assert_close(terms["cross_entropy"], expected)
        targets = shares.view(16, 1) * first.unsqueeze(1) + (1 - shares).view(16, 1) * second.unsqueeze(1)
        torch.testing.assert_close(terms["patch_mixing"], cross_entropy(patch_logits, targets, 0.2))
        torch.testing.assert_close(terms["loss"], terms["cross_entropy"] + terms["patch_mixing"])
    assert cut >= 3


def test_gradients_are_those_of_the_mixed_loss():
    run = trainer(config=replace(CONFIG, drop_path=0.0), cutmix=1.0)
    images, labels, box = run.data.train.images[:8], run.data.train.labels[:8], (1, 7, 2, 12)
    run.losses(images, labels, box)["loss"].backward()
    found = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    run.model.zero_grad()
    share = 1 - 60 / 144
    targets = share * torch.eye(4)[labels] + (1 - share) * torch.eye(4)[labels.flip(0)]
    cross_entropy(run.model(images), targets, 0.1).backward()
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)


def test_without_cutmix_the_step_is_what_it_was():
    """Bit by bit: augmentation, losses, clipping and update written out, with the same random numbers."""
    run, plain = (trainer(cutmix=0.0, losses={"koleo": 0.1}) for _ in range(2))
    rng = torch.Generator().manual_seed(0)
    objective = DiversityObjective({"koleo": 0.1}).attach(plain.model)
    for step in range(3):
        images, labels = (part[8 * step : 8 * step + 8] for part in run.data.train[:])
        state = torch.get_rng_state()  # of drop path
        terms = run.train_step(images, labels)
        torch.set_rng_state(state)
        for group in plain.optimizer.param_groups:
            group["lr"] = learning_rate(run.recipe, step)
        logits = plain.model(plain.data.augment(images, rng))
        entropy = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        loss = entropy + objective()[0]
        plain.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters, 1.0)
        plain.optimizer.step()
        assert torch.equal(terms["loss"], loss)
    for (name, a), b in zip(run.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(run.augment_rng.get_state(), rng.get_state())


def test_patch_mixing_without_cutmix_is_the_image_s_label_for_every_patch():
    run = trainer(losses=MIXING, cutmix=0.0)
    images, labels = run.data.train[:8]
    state = torch.get_rng_state()
    found = run.losses(images, labels)["patch_mixing"]
    torch.set_rng_state(state)
    tokens = run.model(images, return_tokens=True)[1]
    logits = run.model.head(run.model.norm(tokens[-1]))[:, 1:]
    torch.testing.assert_close(found, cross_entropy(logits, torch.eye(4)[labels].unsqueeze(1), 0.1))


def test_the_class_token_weighs_as_much_as_a_patch():
    """As released by Chen et al.: the cross-entropies of all N + 1 tokens have the same weight."""
    name = "diverse_vit_deit_small"
    run = trainer(losses={name: 1.0})
    run.model.eval()
    images, labels = run.data.train.images[:8], run.data.train.labels[:8]
    terms = run.losses(images, labels, (2, 8, 1, 9))
    patches = (CONFIG.image_size // CONFIG.patch) ** 2
    weights = {f"{name}.{part}": term.weight for part, term in PRESETS[name].items()}
    weights |= {f"{name}.mixing": patches / (patches + 1), "cross_entropy": 1 / (patches + 1)}
    expected = sum(weight * terms[part] for part, weight in weights.items())
    torch.testing.assert_close(terms["loss"], expected)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({}, 0.0),
        ({"losses": {"cosine": 1.0, "deepvit_cos_reg": 1.0}}, 0.0),
        ({"losses": MIXING}, 1.0),
        ({"losses": {"gong2021": 0.5}}, 1.0),
        ({"losses": {"gong2021": 0.5}, "cutmix": 0.0}, 0.0),
        ({"losses": MIXING, "cutmix": 0.3}, 0.3),
        ({"cutmix": 0.3}, 0.3),
    ],
)
def test_cutmix_is_on_where_patch_mixing_is_unless_told(recipe, expected):
    run = trainer(**recipe)
    assert run.recipe.cutmix == expected
    entered = []
    run.data = replace(run.data, augment=lambda images, _: images)
    run.model.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    images, labels = run.data.train[:8]
    for _ in range(12):
        run.train_step(images, labels)
    assert any(not torch.equal(each, images) for each in entered) == (expected > 0)


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
def test_an_alpha_that_is_none_gets_a_sentence(alpha):
    with pytest.raises(TrainError, match=f"cutmix must be a number from 0 to 1000, got {alpha}"):
        trainer(cutmix=alpha)


def test_the_recipe_s_seed_draws_the_boxes():
    def boxes(seed, monkeypatch):
        drawn, draw = [], cutmix.draw_box
        with monkeypatch.context() as patched:
            patched.setattr(cutmix, "draw_box", lambda *args: drawn.append(draw(*args)) or drawn[-1])
            trainer(cutmix=1.0, seed=seed).fit()
        return drawn

    with pytest.MonkeyPatch.context() as monkeypatch:
        first = boxes(0, monkeypatch)
        assert len(set(first)) > 6
        assert boxes(0, monkeypatch) == first
        assert boxes(1, monkeypatch) != first


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("preset", ["gong2021", "diverse_vit_deit_small"])
def test_presets_train_whole_on_the_digits(preset, amp, tmp_path):
    pytest.importorskip("sklearn")
    options = ["--losses", preset, "--steps", "4", "--batch", "8", "--log-every", "1", "--out", str(tmp_path)]
    assert main(options + ["--amp"] * amp) == 0
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        parts = {name: float(row[f"{preset}.{name}"]) for name in PRESETS[preset]}
        assert all(map(math.isfinite, parts.values()))
        weights = {name: term.weight for name, term in PRESETS[preset].items()}
        task = 1.0
        if preset == "diverse_vit_deit_small":  # of 16 patches and the class token each weighs the same
            task, weights["mixing"] = 1 / 17, 16 / 17
        total = task * float(row["cross_entropy"]) + sum(weights[name] * parts[name] for name in parts)
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["recipe"]["cutmix"] == 1.0
