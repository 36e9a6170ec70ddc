"""Which parameters decay: as timm's `param_groups_weight_decay` has it, which the papers' loops use."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from vitdiv_kernels.train.optimizer import parameter_groups
from vitdiv_kernels.vit import CONFIGS, ViT

SHAPES = ["deepvit_16b", "deepvit_s", "deit_tiny", "deit_tiny_distilled", "cait_xxs24_224", "gong_small"]
OF_TIMM = ["vit_tiny_patch16_224", "xcit_nano_12_p16_224", "beit_base_patch16_224", "cait_xxs24_224"]


def decayed(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    found = {weight: set() for weight in (0.05, 0.0)}
    for group in groups:
        found[group["weight_decay"]] |= {names[id(p)] for p in group["params"]}
    assert set.union(*found.values()) == set(names.values())
    return found[0.05]


@pytest.mark.parametrize("name", [*SHAPES, *OF_TIMM])
def test_groups_are_those_of_timm(name, torchvision):
    timm = pytest.importorskip("timm")
    optim = pytest.importorskip("timm.optim")
    with torch.device("meta"):
        if name in CONFIGS:
            config = CONFIGS[name]
            model = ViT(replace(config, depth=2, reattention=[1] if config.reattention else []))
        else:
            model = timm.create_model(name)
    theirs = optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    expected = decayed(model, theirs)
    assert expected
    assert decayed(model, parameter_groups(model, 0.05)) == expected


def test_patterns_and_biases_of_any_shape_do_not_decay():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Conv2d(1, 1, 3)
            self.linear = nn.Linear(2, 2)
            self.linear.bias = nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self):
            return {"pos_embed.*"}

    model = Odd()
    assert decayed(model, parameter_groups(model, 0.05)) == {"linear.weight"}
