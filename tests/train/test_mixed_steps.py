"""Mixed images in the trainer: pixels, shares and labels agree, runs repeat, the presets train whole."""

import csv
import math
from dataclasses import replace

import pytest
import torch
from small_trainer import small_recipe, small_trainer
from torch.nn.functional import log_softmax

from vitdiv_kernels import DiversityObjective, recipes
from vitdiv_kernels.attach.presets import PRESETS
from vitdiv_kernels.train.cli import main
from vitdiv_kernels.train.data import unchanged
from vitdiv_kernels.vit import ViTConfig

CONFIG = ViTConfig(
    image_size=12, channels=2, patch=3, dim=16, depth=3, heads=2, mlp_ratio=2.0, classes=4, drop_path=0.2
)
MIXING = {"patch_mixing": 1.0}


pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(augment=None, config=CONFIG, **recipe):
    return small_trainer(config, recipe, augment=augment)


def cross_entropy(logits, targets, smoothing):
    targets = (1 - smoothing) * targets + smoothing / targets.shape[-1]
    return -(targets * log_softmax(logits, -1)).sum(-1).mean()


def test_a_step_takes_labels_by_the_pixels_that_it_mixed(monkeypatch):
    """Whatever was mixed is read off the pixels that enter the model; the labels must be theirs."""
    run = trainer(unchanged, losses=MIXING, label_smoothing=0.2)
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


@pytest.mark.parametrize("keys", [{"cutmix": 1.0}, {"mixup": 0.8}, {"mixup": 0.8, "cutmix": 1.0}])
def test_gradients_are_those_of_the_mixed_loss(keys):
    run = trainer(unchanged, config=replace(CONFIG, drop_path=0.0), clip=0, **keys)
    images, labels = run.data.train.images[:8], run.data.train.labels[:8]
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(0)))
    draws = torch.Generator().manual_seed(seed)
    batch = recipes.mix(run.recipe, images, labels, classes=4, grid=(1, 1), generator=draws)
    assert not torch.equal(batch.images, images)
    cross_entropy(run.model(batch.images), batch.targets, 0.0).backward()
    expected = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    run.train_step(images, labels)
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


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
            group["lr"] = run.schedule.learning_rate(step)
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
    images, batch = run.task.mixed(images, labels, run.augment_rng)
    terms = run.losses(images, labels, batch)
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
        ({"losses": {"gong2021": 0.5}, "mixup": 0.4}, 1.0),
    ],
)
def test_cutmix_is_on_where_patch_mixing_is_unless_told(recipe, expected):
    run = trainer(**recipe)
    assert run.recipe.cutmix_alpha == expected
    entered = []
    run.data = replace(run.data, augment=unchanged)
    run.model.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    images, labels = run.data.train[:8]
    for _ in range(12):
        run.train_step(images, labels)
    assert any(not torch.equal(each, images) for each in entered) == (expected > 0)


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
def test_an_alpha_that_is_none_gets_a_sentence(alpha):
    with pytest.raises(ValueError, match=f"cutmix must be a number from 0 to 1000 or null, got {alpha}"):
        small_recipe(cutmix=alpha)


def test_the_recipe_s_seed_draws_what_is_mixed():
    def entered(seed):
        run, seen = trainer(unchanged, cutmix=1.0, mixup=0.8, seed=seed), []
        run.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for _ in range(6):
            run.train_step(*run.data.train[:8])
        return torch.stack(seen)

    first = entered(0)
    assert len({each[0].sum().item() for each in first}) == 6
    assert torch.equal(entered(0), first)
    assert not torch.equal(entered(1), first)


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
