"""Objective and monitor of a model sharded by fully_shard and FullyShardedDataParallel: values and gradients
are those of the model in one piece."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import nn

from vitdiv_kernels import CollapseMonitor, DiversityObjective, Term
from vitdiv_kernels.attach.presets import PRESETS
from vitdiv_kernels.vit import ViT, ViTConfig

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

CONFIG = ViTConfig(image_size=8, channels=1, patch=2, dim=18, depth=3, heads=3, mlp_ratio=1.0, classes=5)
# Shards of 27 of 54 rows: one that divides by three was taken for a whole weight.
WEIGHTS = {"weight_mhs": 1.0, "weight_soft_orthogonality": 0.1}
CONFIGS = {
    "weights": WEIGHTS,
    "gong2021": "gong2021",
    "gong2021_released": "gong2021_released",
    "diverse_vit_deit_small": {
        **PRESETS["diverse_vit_deit_small"],
        "weights": Term("weight_condition_orthogonality", options={"start": torch.ones(2, 18)}),
    },
    "deepvit_cos_reg": "deepvit_cos_reg",
    "neighbourhood_contrast": {"neighbourhood_contrast": 1.0, "koleo": 0.1},
    "normed queries": {"attention_diversity": Term("attention_diversity", layers="all")},
}
# What is sharded on its own; the model always is.
UNITS = {"blocks": ("blocks",), "blocks and head": ("blocks", "head", "norm"), "model": ()}


MASKS = torch.stack([torch.eye(4), 1 - torch.eye(4)])


def a_model():
    torch.manual_seed(0)
    model = ViT(replace(CONFIG, reattention=(1, 2)))
    for block in model.blocks[1:]:
        attn = block.attn
        nn.init.normal_(attn.var_norm.weight)
        attn.q_norm, attn.k_norm = nn.LayerNorm(6), nn.LayerNorm(6)
        attn.q_norm.weight = nn.Parameter(torch.rand(6) + 0.5)
        # fixed statistics: those of a batch are of each process
        attn.var_norm.eval()
    model.patch_head = nn.Linear(18, 5)
    return model


def sharded(model, units, **options):
    from torch.distributed.fsdp import fully_shard

    for name in units:
        module = getattr(model, name)
        for part in module if name == "blocks" else [module]:
            fully_shard(part, **options)
    return fully_shard(model, **options)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3])


def step(model, run, config, mine):
    """Total, and the gradients of all parameters, of the images `mine`."""
    x, labels = batch()
    mixing = labels[mine], labels.flip(0)[mine], torch.linspace(0, 1, 16)
    model.zero_grad()
    with DiversityObjective(config).attach(run) as objective:
        logits = run(x[mine])
        regions = torch.eye(5)[torch.stack([labels, labels.flip(0)], 1)[mine]], MASKS
        total, _ = objective(task=logits.square().mean(), mixing=mixing, regions=regions)
        total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


FORWARD_ONLY = {"koleo": 0.1, "patch_contrast": 1.0, "attention_diversity": 1.0, "head_mhs": 0.1}


def fsdp1(mine):
    """What FullyShardedDataParallel gives: the losses that read no weights, the others' sentences."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def wrapped(model, whole=False):
        policy = None if whole else ModuleWrapPolicy({type(model.blocks[0])})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )

    found, model = {}, a_model()
    run = wrapped(model)
    gather = FullyShardedDataParallel.summon_full_params
    total, _ = step(model, run, FORWARD_ONLY, mine)
    with gather(run, with_grads=True):
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    grads = {name: grad for name, grad in grads.items() if "patch_head" not in name}  # zeros, of no loss
    found["forward only", "fsdp1"] = (
        total,
        {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in grads.items()},
    )
    for whole in (False, True):
        found["monitor", "fsdp1", whole] = CollapseMonitor(wrapped(a_model(), whole)).measure(batch()[0])
    for name in (
        "weight_mhs",
        "patch_mixing",
        "region_mixing",
        "neighbourhood_contrast",
        "cos_reg",
        "head_mhs",
    ):
        term = Term(name, layers=(1, 2) if name in ("cos_reg", "head_mhs") else None)
        for attached in (run, model):
            with pytest.raises(TypeError, match=f"{name} reads weights outside of the forward pass"):
                DiversityObjective({name: term}).attach(attached)
    return found


def worker(world):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    share = 4 // world
    mine, found = slice(share * rank, share * (rank + 1)), {}
    for units, names in UNITS.items():
        if units == "model" and world > 1:
            continue  # whole after the forward pass, as in one process
        for reshard in (True, None) if units == "blocks" and world == 1 else (units == "blocks" or None,):
            for name, config in CONFIGS.items():
                model = sharded(a_model(), names, reshard_after_forward=reshard)
                total, grads = step(model, model, config, mine)
                found[name, units, reshard] = total, {k: g.full_tensor() for k, g in grads.items()}
        model = sharded(a_model(), names)
        found["monitor", units] = CollapseMonitor(model).measure(batch()[0])
        sharded_again = all(type(p).__name__ == "DTensor" for p in model.parameters())
        found["sharded again", units] = sharded_again
    found.update(fsdp1(mine))
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_shards_give_what_the_whole_gives(world):
    if torch.get_default_device().type == "cuda":
        pytest.skip("two processes would need two GPUs")
    parts = together(world, worker, world)
    share, expected = 4 // world, {}
    for name, config in {**CONFIGS, "forward only": FORWARD_ONLY}.items():
        model = a_model()
        each = [step(model, model, config, slice(share * r, share * (r + 1))) for r in range(world)]
        expected[name] = each
    for key in parts[0]:
        if key[0] == "sharded again":
            assert parts[0][key], key
        elif key[0] == "monitor":
            for got, right in zip(parts[0][key], CollapseMonitor(a_model()).measure(batch()[0]), strict=True):
                for measure, value in right.items():
                    assert got[measure] == pytest.approx(value, rel=1e-5, abs=1e-6), (key, measure)
        else:
            each = expected[key[0]]
            for rank in range(world):
                total, grads = parts[rank][key]
                torch.testing.assert_close(total, each[rank][0])
                assert grads.keys() == each[0][1].keys(), key
                for name, grad in grads.items():
                    mean = sum(one[1][name] for one in each) / world
                    torch.testing.assert_close(grad, mean, rtol=1e-4, atol=1e-6, msg=f"{key} {name}")
