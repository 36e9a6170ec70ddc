"""What the hooks of an objective keep, and for how long: checkpointing, partial passes, copies, deletion."""

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch
from small_vit import CONFIG, hooks_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdiv_kernels import DiversityObjective, Term, losses
from vitdiv_kernels.vit import ViT

BOTH = {"koleo": 1.0, "heads": Term("attention_diversity", layers=(0, 1)), "weight_mhs": 0.1}


class Checkpointed(ViT):
    """Blocks are checkpointed as `way` says, and skipped where `skipped` names them."""

    way, skipped = None, ()

    def forward(self, x):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for i, block in enumerate(self.blocks):
            if i in self.skipped:
                continue
            x = block(x) if self.way is None else checkpoint(block, x, use_reentrant=self.way == "reentrant")
        return self.head(self.norm(x[:, 0]))


def a_model(**changes):
    torch.manual_seed(0)
    return Checkpointed(replace(CONFIG, **changes))


def images(seed=0, count=3):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def step(model, objective, x):
    model.zero_grad()
    loss = model(x).square().mean()
    total, _ = objective()
    (loss + total).backward()
    return total.detach(), [p.grad for p in model.parameters()]


def test_checkpoints_that_are_not_reentrant_are_exact():
    model, plain = a_model(reattention=(1,)), a_model(reattention=(1,))
    model.way = "other"
    with DiversityObjective(BOTH).attach(model) as objective, DiversityObjective(BOTH).attach(plain) as other:
        torch.testing.assert_close(step(model, objective, images()), step(plain, other, images()))
        with pytest.raises(RuntimeError, match=r"blocks\[1\].attn.qkv ran in a backward pass, which count"):
            objective()
        torch.testing.assert_close(step(model, objective, images(1)), step(plain, other, images(1)))


def test_reentrant_checkpoints_give_a_sentence_and_nothing_of_the_batch_before():
    model = a_model()
    model.way = "reentrant"
    embedded = images().requires_grad_()
    with DiversityObjective({"koleo": 1.0}).attach(model) as objective:
        for _ in range(2):
            loss = model(embedded).sum()
            with pytest.raises(
                RuntimeError, match=r"blocks\[2\] ran without gradients: .*use_reentrant=False"
            ):
                objective()
            loss.backward()
        assert objective.recorder.kept == {}


def test_nothing_of_an_earlier_pass_stands_in_for_a_skipped_block():
    model = a_model()
    with DiversityObjective({"cross": Term("patch_cross_cosine", layers=(0, 2))}).attach(model) as objective:
        model(images())
        model.skipped = (0,)
        model(images(1))
        with pytest.raises(RuntimeError, match=r"no whole forward pass .*: blocks\[0\] did not run"):
            objective()


def test_the_sentence_names_blocks_and_causes():
    model = a_model()
    with DiversityObjective(BOTH).attach(model) as objective:
        with pytest.raises(RuntimeError) as error:
            objective()
        assert "no forward pass was recorded since the last call" in str(error.value)
        assert "blocks[2], blocks[0].attn.qkv, blocks[1].attn.qkv did not run" in str(error.value)
        with torch.no_grad():
            model(images())
        with pytest.raises(RuntimeError, match=r"blocks\[1\].attn.qkv ran without gradients: under torch"):
            objective()


def test_hooks_go_with_the_objective():
    model = a_model()
    objective = DiversityObjective(BOTH).attach(model)
    model(images())
    assert hooks_of(model) > 0
    del objective
    gc.collect()
    assert hooks_of(model) == 0


class Lit(nn.Module):
    """A training module as Lightning has it, whose copies and processes get model and objective together."""

    def __init__(self, first):
        super().__init__()
        if first:
            self.objective = None
        self.net = a_model()
        self.objective = DiversityObjective(BOTH).attach(self.net)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("order", ["module", "objective first", "objective"])
def test_a_copy_is_attached_to_the_copy_of_its_model(first, copied, order):
    lit = Lit(first)
    lit.net(images())  # what was kept, with its graph, is not copied
    if order == "module":
        other = copied(lit)
        objective, net = other.objective, other.net
    elif order == "objective first":
        objective, net = copied((lit.objective, lit.net))
    else:
        objective = copied(lit.objective)
        net = objective.model
    assert objective.attached
    assert objective.model is net
    assert net is not lit.net
    with pytest.raises(RuntimeError, match="no forward pass"):
        objective()
    got = step(net, objective, images(1))
    expected = lit.objective()[0]
    torch.testing.assert_close(got, step(lit.net, lit.objective, images(1)))
    assert abs(expected - got[0]) > 1e-4  # that of its own images
    objective.detach()
    assert hooks_of(net) == 0
    assert hooks_of(lit.net) > 0


def test_copies_of_the_model_alone_keep_nothing():
    model = a_model()
    config = {"koleo": 1.0, "contrast": Term("patch_contrast", 1.0, ("embeddings", -1))}
    with DiversityObjective(config).attach(model) as objective:
        model(images())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(images(1))
            assert all(hook.shelf.kept is None for hook in other.blocks[2]._forward_hooks.values())
        tokens = objective.recorder.kept["tokens", 2]
        torch.testing.assert_close(objective()[1]["koleo"], losses.koleo(tokens[:, 1:]))


def test_a_shallow_copy_is_attached_as_long_as_the_first():
    model = a_model()
    objective = DiversityObjective({"koleo": 1.0}).attach(model)
    other = copy.copy(objective)
    assert other.attached
    objective.detach()
    assert not other.attached
    with pytest.raises(RuntimeError, match="the objective is not attached"):
        other()


@pytest.mark.parametrize("strict", [False, True])
def test_export_leaves_no_trace(strict):
    model, x = a_model(), images()
    with DiversityObjective({"koleo": 1.0}).attach(model) as objective:
        exported = torch.export.export(model, (x,), strict=strict).module()
        assert objective.recorder.kept == {}
        torch.testing.assert_close(exported(x), model(x))
        assert objective()[0].isfinite()
