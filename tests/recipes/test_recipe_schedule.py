"""The learning rate of each step: timm's schedule by epochs, and the formulas."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from vitdiv_kernels import recipes
from vitdiv_kernels.recipes import Schedule, with_timm


def at(recipe, images=64):
    schedule = Schedule(recipe, images)
    return [schedule.learning_rate(step) for step in range(schedule.steps)]


@pytest.mark.parametrize("name", ["deit_small", "diverse_vit_deit_small", "deepvit_32b", "gong2021"])
def test_epochs_have_the_learning_rates_of_timm(torchvision, name):
    """DeepViT's loop sets it before the epoch, DeiT's and those like it after."""
    pytest.importorskip("timm")
    recipe = replace(recipes.load(name), batch=16)
    schedule = Schedule(recipe, 40)
    assert schedule.per_epoch == 2
    assert schedule.steps == 2 * (300 + recipe.cooldown_epochs)
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=recipe.learning_rate)
    theirs, rates = with_timm.schedule(recipe, optimizer), []
    for epoch in range(300 + recipe.cooldown_epochs):
        if recipe.lr_delay == 0:
            theirs.step(epoch)
        rates += 2 * [optimizer.param_groups[0]["lr"]]
        if recipe.lr_delay:
            theirs.step(epoch)
    assert recipe.lr_delay == (name != "deepvit_32b")
    assert at(recipe, 40) == pytest.approx(rates, rel=1e-9)


def test_steps_warm_up_and_fall_to_a_hundredth():
    recipe = recipes.override(recipes.load("plain"), ["steps=100", "lr=1"])
    rates = at(recipe)
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    expected = [0.01 + 0.99 * (1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)]
    assert rates[10:] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "steps", "rising"),
    [
        (["steps=20", "warmup_epochs=2", "cooldown_epochs=3"], 26, 4),
        (["epochs=10", "warmup=0.25"], 20, 5),
        (["steps=20", "warmup=0"], 20, 1),
    ],
)
def test_all_others_have_one_for_each_step(settings, steps, rising):
    recipe = recipes.override(recipes.load("deit_small"), [*settings, "batch=32", "lr=0.16"])
    rates, top = at(recipe), 0.01
    assert len(rates) == steps
    assert rates[:rising] == pytest.approx([1e-6 + (top - 1e-6) * (i + 1) / rising for i in range(rising)])
    for i in range(rising, 20):
        height = (1 + math.cos(math.pi * (i - rising) / (20 - rising))) / 2
        assert rates[i] == pytest.approx(1e-5 + (top - 1e-5) * height)
    assert rates[20:] == [1e-5] * (steps - 20)


def test_fewer_images_than_a_batch_are_one_step():
    schedule = Schedule(replace(recipes.load("deit_small"), batch=100, epochs=3), 40)
    assert (schedule.per_epoch, schedule.steps) == (1, 3)
