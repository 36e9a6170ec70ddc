"""The trainer trains by each recipe: a step is that of the recipe's parts by hand, runs repeat exactly."""

import copy
import csv
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitdiv_kernels import DiversityObjective, recipes
from vitdiv_kernels.recipes import with_timm
from vitdiv_kernels.train import cli
from vitdiv_kernels.train.augmentation import seed_of
from vitdiv_kernels.train.data import StepBatches
from vitdiv_kernels.train.parallel import Processes
from vitdiv_kernels.vit import CONFIGS, ViTConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ViTConfig(image_size=16, patch=4, dim=16, depth=2, heads=2, mlp_ratio=2.0)
MODELS = {
    "deit_small": TINY,
    "diverse_vit_deit_small": TINY,
    "deepvit_32b": replace(TINY, depth=13, reattention=range(13)),
    "gong2021": replace(TINY, attention="talking_heads", talking_bias=False, patch_head=True),
}
IN_SMALL = ["image_size=16", "batch=8", "model=tiny"]


@pytest.fixture
def folder(tmp_path, torchvision):
    """Three classes of images: 24 to train on, 9 to validate."""
    pytest.importorskip("timm")
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for name in "abc":
            place = tmp_path / "images" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "images"


def options(name, folder, out, *settings):
    settings = [part for setting in (*IN_SMALL, *settings) for part in ("--set", setting)]
    return ["--recipe", name, "--data", f"imagefolder:{folder}", "--out", str(out), *settings]


def made(arguments):
    """The trainer of these arguments, as the command makes it."""
    return cli.build(cli.make_parser().parse_args(arguments), Processes())


def drawn_by_hand(recipe, data, step):
    """The batch of a step: timm's transform of each image, with random numbers of its place."""
    from PIL import Image

    order = list(range(len(data.train)))
    if recipe.repeats > 1:
        sampler = with_timm.sampler(recipe, order, num_replicas=1, rank=0, selected_round=0)
        sampler.set_epoch(step // 3)
        indices = list(sampler)[8 * (step % 3) :][:8]
    else:
        indices = next(iter(StepBatches(len(order), 8, 0, step, step + 1)))
    transform, images = with_timm.transform(recipe), []
    for place, index in enumerate(indices):
        seed = seed_of(0, step, place)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        images.append(transform(Image.open(data.train.samples[index][0]).convert("RGB")))
    return torch.stack(images), torch.tensor([data.train.samples[index][1] for index in indices])


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_the_recipe_by_hand(name, folder, tmp_path, monkeypatch):
    """Transform, mixing, labels, losses, gradients and learning rate of three steps."""
    monkeypatch.setitem(CONFIGS, "tiny", MODELS[name])
    run = made(options(name, folder, tmp_path / "run", "amp=null", "epochs=3", "warmup_epochs=1"))
    recipe = run.recipe
    assert recipe.losses == recipes.load(name).losses
    assert run.model.config.drop_path == recipes.load(name).drop_path
    assert run.optimizer.defaults["eps"] == recipe.eps
    rates = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=recipe.learning_rate)
    schedule = with_timm.schedule(recipe, rates)
    draws = torch.Generator().manual_seed(0)
    for step in range(3):
        state = torch.get_rng_state()
        before, seen = copy.deepcopy(run.model), {}

        def keep(step, terms, seen=seen):
            seen |= terms | {"gradients": [p.grad.clone() for p in run.model.parameters()]}

        run.fit(until=step + 1, on_step=keep)

        images, labels = drawn_by_hand(recipe, run.data, step)
        torch.set_rng_state(state)  # of stochastic depth, dropout and start vectors
        own = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=draws)))
        batch = recipes.mix(recipe, images, labels, classes=3, grid=(4, 4), generator=own)
        model = before.train()
        terms = recipe.terms()
        with DiversityObjective(terms).attach(model) if terms else monkeypatch.context() as objective:
            task = F.cross_entropy(model(batch.images), batch.targets)
            total = task
            if terms:
                total, _ = objective(task=task, mixing=batch.mixing, regions=batch.regions)
        assert float(seen["loss"]) == pytest.approx(total.item(), rel=1e-5)
        found = torch.cat([g.flatten() for g in seen["gradients"]])
        theirs = torch.autograd.grad(total, list(model.parameters()))
        expected = torch.cat([g.flatten() for g in theirs])
        assert F.cosine_similarity(found.double(), expected.double(), dim=0) > 0.9999
        assert found.norm() == pytest.approx(expected.norm().item(), rel=1e-3)
        assert seen["lr"] == pytest.approx(rates.param_groups[0]["lr"])
        if (step + 1) % 3 == 0:
            schedule.step(step // 3)


@pytest.mark.parametrize("name", MODELS)
def test_the_command_trains_by_each_recipe(name, folder, tmp_path, monkeypatch):
    """With its moving average and its autocast, to the end."""
    monkeypatch.setitem(CONFIGS, "tiny", MODELS[name])
    arguments = options(name, folder, tmp_path / "run", "cooldown_epochs=0")
    assert cli.main([*arguments, "--epochs", "1", "--log-every", "1"]) == 0
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert {"val_accuracy", "val_accuracy_ema", *recipes.load(name).losses} <= set(rows[0])
    assert all(0 < float(row["loss"]) < 100 for row in rows)


def test_digits_trains_as_its_losses_on_the_command_line(tmp_path):
    pytest.importorskip("sklearn")
    more = ["--steps", "3", "--batch", "4", "--log-every", "1"]
    for out, which in (("one", ["--recipe", "digits"]), ("two", ["--losses", "diversity"])):
        assert cli.main([*which, *more, "--out", str(tmp_path / out)]) == 0
    assert (tmp_path / "one/log.csv").read_bytes() == (tmp_path / "two/log.csv").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_timm_s_augmentation_goes_on_exactly(workers, folder, tmp_path, monkeypatch):
    """Mixup, CutMix, moving average, repeated images, random transforms, dropped branches."""
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    settings = ["amp=null", "steps=6", "warmup_epochs=1", "ema=0.9"]

    def run(out):
        arguments = options("deit_small", folder, out, *settings)
        return made([*arguments, "--log-every", "1", "--eval-every", "3", "--workers", str(workers)])

    whole = run(tmp_path / "a")  # which seeds torch
    whole.fit()
    first = run(tmp_path / "b")
    first.fit(until=4)
    first.save(tmp_path / "checkpoint.pt")
    second = run(tmp_path / "c")
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    second.load(tmp_path / "checkpoint.pt")
    second.fit()
    assert second.rows == whole.rows
    assert len({row["loss"] for row in whole.rows}) == 6
    for part in (lambda r: r.model, lambda r: r.parts[0].average.module):
        for (name, a), b in zip(
            part(whole).state_dict().items(), part(second).state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


def test_reading_leaves_random_numbers_as_they_are(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    data = made(options("deit_small", folder, tmp_path / "run")).data.train
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again, other = (data[5, seed][0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(data[5][0], data[5][0])  # as in a test


def test_repeated_images_come_several_times(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    run = made(options("deit_small", folder, tmp_path / "run"))
    epochs = [run.order(epoch) for epoch in range(2)]
    for order in epochs:
        assert len(order) == 24
        assert {order.count(i) for i in order} == {3}
    assert set(epochs[0]) != set(epochs[1])


def parsed(*arguments):
    return cli.recipe_options.chosen(cli.make_parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"lr": 1e-3, "steps": 1200, "losses": {}, "data": "digits", "image_size": None}),
        (["--recipe", "deit_small"], {"lr": 5e-4, "epochs": 300, "steps": None, "data": None}),
        (["--recipe", "deit_small", "--lr", "2", "--set", "lr=1"], {"lr": 1}),
        (["--recipe", "deit_small", "--set", "lr=1", "--lr", "2"], {"lr": 2}),
        (["--steps", "7", "--recipe", "deit_small"], {"steps": 7, "epochs": None, "warmup_epochs": 5}),
        (["--recipe", "deit_small", "--warmup", "0.1"], {"warmup": 0.1, "warmup_epochs": None}),
        (["--epochs", "2"], {"steps": None, "epochs": 2, "warmup": 0.1}),
        (["--amp"], {"amp": "bf16"}),
        (["--amp", "fp16"], {"amp": "fp16"}),
        (["--sync-bn", "--reattention", "3,8-10"], {"sync_bn": True, "reattention": (3, 8, 9, 10)}),
        (["--reattention", "all", "--init", "7"], {"reattention": "all", "weights": "7"}),
        (["--mixup", "0.8", "--recipe", "deit_small", "--set", "hflip=0"], {"mixup": 0.8, "hflip": 0}),
        (["--lr", ".01", "--batch", "+4"], {"lr": 0.01, "batch": 4}),
        (["--set", "betas=[0.8,0.9]", "--set", "hflip=0.1", "--set", "augmentation=timm"], {"hflip": 0.1}),
        (["--losses", "gong2021"], {"cutmix": None, "cutmix_alpha": 1, "mixes_two_images": False}),
        (["--losses", "gong2021", "--cutmix", "0"], {"cutmix_alpha": 0}),
        (["--losses", "gong2021_released"], {"cutmix_alpha": 0, "mixes_two_images": True}),
    ],
)
def test_options_change_the_recipe_in_their_order(arguments, expected):
    recipe = parsed(*arguments)
    assert {name: getattr(recipe, name) for name in expected} == expected


def test_keys_of_losses_change_after_the_losses():
    changed = parsed("--losses", "gong2021=2,koleo", "--set", "losses.gong2021.cosine.weight=0.1")
    weights = {name: term.weight for name, term in changed.terms().items()}
    assert weights == {"gong2021.cosine": 0.1, "gong2021.contrast": 2, "gong2021.mixing": 2, "koleo": 1}
    assert changed.terms()["gong2021.mixing"].options == {"smoothing": 0.1}
    assert "koleo" not in parsed("--losses", "koleo,cosine", "--set", "losses.koleo=null").losses


def test_the_recipe_is_printed_and_read_again(tmp_path, capsys):
    assert cli.main(["--recipe", "gong2021", "--set", "lr=1e-4", "--print-recipe"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["lr"] == 1e-4
    (tmp_path / "mine.json").write_text(text)
    assert parsed("--recipe", str(tmp_path / "mine.json")) == parsed(
        "--recipe", "gong2021", "--set", "lr=1e-4"
    )


NUMBER = "must be a number of at least 0, got"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "--steps 0: steps must be a whole number of at least 1 or null, got 0"),
        (["--set", "steps=0"], "--set steps=0: steps must be a whole number of at least 1 or null, got 0"),
        (["--lr", "-1"], f"--lr -1: lr {NUMBER} -1"),
        (
            ["--set", "hflip=0.5"],
            "--set hflip=0.5: hflip has no effect with augmentation light: add --set augmentation=timm",
        ),
        (["--lr", "inf"], f"--lr inf: lr {NUMBER} 'inf'"),
        (["--set", "lr=inf"], f"--set lr=inf: lr {NUMBER} 'inf'"),
        (["--lr", "1e999"], f"--lr 1e999: lr {NUMBER} inf"),
        (["--losses", "entropy=1"], "--losses entropy=1: unknown loss 'entropy'"),
        (
            ["--losses", "cosine=1,cosine=2"],
            "--losses cosine=1,cosine=2: the loss 'cosine' is given twice: give it one weight",
        ),
        (["--losses", "koleo=inf"], "--losses koleo=inf: the weight of koleo must be finite, got inf"),
        (["--cutmix", "yes"], "--cutmix yes: cutmix must be a number from 0 to 1000 or null, got 'yes'"),
        (["--reattention", "a-b"], "--reattention a-b: reattention must be a list of whole numbers or 'all'"),
        (["--amp", "fp8"], "--amp fp8: amp must be 'fp16' or 'bf16' or null, got 'fp8'"),
        (
            ["--set", "betas=[0.9,1]"],
            "--set betas=[0.9,1]: betas must be two numbers of at least 0",
        ),
        (["--set", "learning=1"], "--set learning=1 has the unknown key 'learning'"),
        (["--set", "lr"], "--set lr: must be key=value"),
        (["--recipe", "deit"], "there is no recipe 'deit': give one of deepvit_32b, deit_small"),
        (["--recipe", "none/here.json"], "none/here.json can't be read: No such file or directory"),
        (["--recipe", "deit_small"], "the recipe deit_small has no data: give --data imagefolder:PATH"),
        (["--set", "model=foo"], "--set model=foo: unknown model 'foo': give timm:NAME, or one of digits24"),
        (["--model", "foo"], "--model foo: unknown model 'foo': give timm:NAME, or one of digits24"),
        (["--recipe", "MINE"], "the recipe MINE: unknown model 'bar'"),
        (["--recipe", "MINE", "--model", "digits24"], "MINE: lr must be"),
        (["--losses", "gong2021_released"], "region_mixing needs model.norm and model.patch_head"),
        (["--losses", "deepvit_32b", "--model", "deit_tiny"], "the digits are 1x8x8"),
    ],
)
def test_what_does_not_fit_gets_a_sentence_before_the_first_step(arguments, sentence, tmp_path, capsys):
    pytest.importorskip("sklearn")
    mine = tmp_path / "mine.json"
    text = json.dumps(recipes.load("plain").as_dict() | {"model": "bar"})
    mine.write_text(re.sub('"lr": 0.001', '"lr": "x"', text) if "digits24" in arguments else text)
    arguments = [str(mine) if argument == "MINE" else argument for argument in arguments]
    assert cli.main(["--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence.replace("MINE", str(mine)) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("gong2021", ["losses.contrast=null"], "region_mixing needs model.norm and model.patch_head"),
        ("deepvit_32b", [], "cos_reg takes block 2, but the model has 2 blocks"),
        ("deit_small", ["mean=[0.5]", "std=[0.5]"], "mean and std must be for the 3 channels of the model"),
        ("deit_small", ["auto_augment=fast"], "timm can't make the augmentation of the recipe"),
        ("deit_small", ["batch=64"], "the batch (64) is larger than the training set (24 images)"),
        (
            "deit_small",
            ["image_size=18"],
            "error: --set image_size=18: image_size must be a multiple of patch (4), got 18",
        ),
        (
            "deit_small",
            ["model=large", "image_size=16384"],
            "the model can't be made for images of size 16384 (",
        ),
        (
            "gong2021",
            ["model=timm:vit_tiny_patch16_224"],
            "error: the recipe gong2021: head_drop must be 0 or null for a model of timm, got 0.2",
        ),
        (
            "deit_small",
            ["model=timm:vit_tiny_patch16_224", "image_size=8"],
            "image_size must be at least the patch (16) of timm's vit_tiny_patch16_224, got 8",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_model_or_data_gets_a_sentence(
    name, settings, sentence, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    # more memory than there is: 512 TB of position embeddings
    monkeypatch.setitem(CONFIGS, "large", replace(TINY, patch=1, dim=2**19))
    assert cli.main(options(name, folder, tmp_path / "run", *settings)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_largest_seed_trains(seed, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    for name in ("deit_small", "gong2021"):  # with repeated images, and without
        settings = [f"seed={seed}", "steps=1", "warmup=0", "ema=0"]
        monkeypatch.setitem(CONFIGS, "tiny", MODELS[name])
        assert cli.main(options(name, folder, tmp_path / f"{name}-{seed}", *settings)) == 0


def test_one_of_several_processes_prints_the_recipe(monkeypatch, capsys):
    for rank, printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["--recipe", "gong2021", "--print-recipe"]) == 0
        assert bool(capsys.readouterr().out) is printed


@pytest.mark.parametrize("settings", [["ema=0", "repeats=1"], ["ema=0"]])
def test_timm_that_is_absent_is_named(settings, folder, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    for module in [module for module in sys.modules if module.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(options("deit_small", folder, tmp_path / "run", *settings)) == 2
    assert re.search(r"the recipe's augmentation .*needs timm.*\[timm\]", capsys.readouterr().err)
