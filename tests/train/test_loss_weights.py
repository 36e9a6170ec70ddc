"""What --losses takes: names and weights, and the terms that they become."""

import pytest

from vitdiv_kernels.attach.presets import PRESETS
from vitdiv_kernels.attach.terms import Term
from vitdiv_kernels.train.loss_weights import DIVERSITY, objective_terms, parse_losses


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("none", {}),
        ("diversity", DIVERSITY),
        ("cosine=2, heads", {"cosine": 2.0, "heads": 0.01}),
        ("koleo = 0.1,gong2021", {"koleo": 0.1, "gong2021": 1.0}),
        ("gong2021_released=2", {"gong2021_released": 2.0}),
    ],
)
def test_names_with_and_without_weights(text, weights):
    assert parse_losses(text) == weights


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cosines=1", "unknown loss 'cosines'"),
        ("koleo=0.1,diversity", "unknown loss 'diversity': give none or diversity alone, or"),
        ("cosine=1,koleo,cosine=2", "the loss 'cosine' is given twice"),
        ("heads=x", "the weight of the loss 'heads' must be a number, got 'x'"),
    ],
)
def test_what_is_none_gets_a_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_losses(text)


def test_short_names_are_losses_with_options():
    assert objective_terms(DIVERSITY) == {
        "cosine": Term("pairwise_cosine", 0.5),
        "contrast": Term("patch_contrast", 0.5),
        "heads": Term("attention_diversity", 0.01, options={"include_self": False}),
    }


def test_a_preset_becomes_its_losses():
    terms = objective_terms({"diverse_vit_deit_small": 2.0, "koleo": 0.1})
    preset = "diverse_vit_deit_small."
    assert {name.removeprefix(preset): term.weight for name, term in terms.items()} == {
        "cosine": 1.0, "contrast": 1.0, "heads": 2e-4, "weights": 1e-3, "mixing": 2.0, "koleo": 0.1,
    }  # fmt: skip
    assert terms[f"{preset}mixing"].options == {"smoothing": 0.1}
    assert terms["koleo"].options == {}
    assert terms[f"{preset}cosine"].options == PRESETS["diverse_vit_deit_small"]["cosine"].options
