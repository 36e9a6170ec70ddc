"""What goes along with a run, and how a step may be done: each against the plain form of it."""

import csv
import functools
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from small_trainer import assert_same_run, random_data, small_recipe, small_trainer
from torch import nn
from torch._dynamo.utils import counters

from vitdiv_kernels import vit
from vitdiv_kernels.train import models
from vitdiv_kernels.train.cli import main
from vitdiv_kernels.train.errors import TrainError
from vitdiv_kernels.train.loop import Trainer
from vitdiv_kernels.train.loss_weights import DIVERSITY
from vitdiv_kernels.train.parts import PARTS, CsvLog, Ema, Part, Speed, TensorBoard
from vitdiv_kernels.vit import ViTConfig

SMALL = ViTConfig(8, 1, patch=2, dim=16, depth=3, heads=2, mlp_ratio=2.0, classes=3, pos_std=0.2)
MIXED = replace(SMALL, reattention=(1, 2))

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(config=SMALL, recipe=None, **options):
    run = small_trainer(config, {"steps": 6, "losses": DIVERSITY} | (recipe or {}), **options)
    run.fit()
    return run


def assert_same(run, other, rel=1e-4):
    assert_same_run(run.rows, run.model.state_dict(), other.rows, other.model.state_dict(), rel)


@dataclass
class Diary(Part):
    """What it was told, and how often."""

    name: ClassVar[str] = "diary"

    def attach(self, run):
        self.told = {}

    def note(self, what):
        self.told[what] = self.told.get(what, 0) + 1

    def on_begin(self, run):
        self.note("begin")

    def on_step(self, run, terms, indices):
        assert len(indices) == run.recipe.batch
        assert float(terms["loss"]) > 0
        self.note("step")

    def on_eval(self, run, row):
        assert 0 <= row["val_accuracy"] <= 1
        self.note("eval")

    def on_log(self, run, row):
        assert run.rows[-1] is row
        self.note("log")

    def on_save(self, run, path):
        assert path.exists()
        self.note("save")

    def on_end(self, run):
        self.note("end")

    def state_dict(self):
        return {"told": dict(self.told)}

    def load_state_dict(self, run, state):
        self.told = state["told"]


def test_a_part_is_told_of_everything_and_its_state_is_kept(tmp_path):
    path = tmp_path / "checkpoint.pt"
    options = dict(log_every=2, eval_every=3, save_path=path, save_every=4, parts=[Diary()])
    run = trained(**options)
    told = {"begin": 1, "step": 6, "eval": 2, "log": 4, "save": 1, "end": 1}
    assert run.parts[0].told == told
    again = small_trainer(SMALL, {"steps": 6, "losses": DIVERSITY}, **options)
    again.load(path)
    assert again.parts[0].told == {"begin": 1, "step": 4, "eval": 1, "log": 3}
    again.fit()
    assert again.parts[0].told == {"begin": 2, "step": 6, "eval": 2, "log": 4, "end": 1}


def test_a_step_in_parts_is_the_step():
    recipe = {"losses": {"gong2021": 1.0}}
    assert_same(trained(recipe=recipe, accumulate=4), trained(recipe=recipe))


def test_a_part_of_a_step_takes_pairs():
    with pytest.raises(TrainError, match="CutMix mixes pairs: give a multiple of 16"):
        small_trainer(SMALL, {"batch": 8, "cutmix": 1.0}, accumulate=8)
    with pytest.raises(TrainError, match="--batch 8 can't be shared by 1 processes, each in --accumulate 3"):
        small_trainer(SMALL, {"batch": 8}, accumulate=3)


@pytest.mark.parametrize(
    "recipe", [{}, {"losses": {"gong2021": 1.0}, "amp": "bf16"}], ids=["float32", "bf16"]
)
def test_checkpointing_changes_nothing(recipe):
    """Statistics of batch norm, counted once, and the random numbers of stochastic depth among it."""
    config = replace(MIXED, drop_path=0.3)
    run, plain = trained(config, recipe, checkpointing=True), trained(config, recipe)
    assert_same(run, plain, rel=1e-3 if recipe else 1e-5)
    assert run.model.blocks[1].attn.var_norm.num_batches_tracked == 6


@pytest.fixture
def without_code(monkeypatch):
    """torch.compile traces forward and backward, and runs what it has traced: making code takes a minute."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"checkpointing": True}], ids=str)
def test_compiling_changes_nothing(options, without_code, torchvision, tmp_path):
    pytest.importorskip("timm")
    options |= {"parts": [Ema()]}
    recipe = {"losses": DIVERSITY, "ema": 0.9, "amp": "bf16" if "checkpointing" in options else None}
    run, plain = trained(MIXED, recipe, compile=True, **options), trained(MIXED, recipe, **options)
    assert isinstance(run.run, torch._dynamo.OptimizedModule)
    assert counters["frames"]["ok"] > 0
    assert_same(run, plain)
    average, other = (each.parts[0].average.module.state_dict() for each in (run, plain))
    assert_same_run([], average, [], other)

    run.save(tmp_path / "checkpoint.pt")
    again = small_trainer(MIXED, {"steps": 6} | recipe, **options)
    again.load(tmp_path / "checkpoint.pt")
    for name, value in run.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    for name, value in vit.load(tmp_path / "checkpoint.pt", MIXED, ema=True).state_dict().items():
        assert torch.equal(average[name], value), name


def test_the_moving_average_is_that_of_the_weights(torchvision):
    pytest.importorskip("timm")
    run = small_trainer(MIXED, {"steps": 5, "ema": 0.9}, eval_every=2, parts=[Ema()])
    expected = {name: value.clone() for name, value in run.model.state_dict().items()}

    def average(step, terms):
        for name, value in run.model.state_dict().items():
            if value.is_floating_point():
                expected[name].lerp_(value, 1 - 0.9)
            else:
                expected[name] = value.clone()

    run.fit(on_step=average)
    found = run.parts[0].average.module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    columns = [row["val_accuracy_ema"] for row in run.rows]
    assert [value != "" for value in columns] == [False, True, False, True, True]


def test_the_moving_average_goes_on_exactly(torchvision, tmp_path):
    pytest.importorskip("timm")

    def make():
        return small_trainer(MIXED, {"ema": 0.9, "losses": DIVERSITY}, checkpointing=True, parts=[Ema()])

    whole, first, second = make(), make(), make()
    whole.fit()
    first.fit(until=5)
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    second.fit()
    assert second.rows == whole.rows
    found = second.parts[0].average.module.state_dict()
    for name, value in whole.parts[0].average.module.state_dict().items():
        assert torch.equal(found[name], value), name
    saved = first.parts[0].average.module.state_dict()
    for name, value in vit.load(tmp_path / "checkpoint.pt", MIXED, ema=True).state_dict().items():
        assert torch.equal(saved[name], value), name
    plain = small_trainer(MIXED, {"losses": DIVERSITY})
    with pytest.raises(TrainError, match=r"ema 0.9, now 0.0"):
        plain.load(tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"parts": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainError, match=r"the checkpoint has no moving average of the weights"):
        second.load(tmp_path / "checkpoint.pt")


def test_scaled_losses_train_in_float16(tmp_path):
    run = small_trainer(MIXED, {"steps": 8, "amp": "fp16"})
    seen = []
    run.model.blocks[2].mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    before = run.model.head.weight.clone()
    run.fit(until=4)
    assert torch.float16 in seen
    assert not torch.equal(run.model.head.weight, before)
    plain = small_trainer(MIXED, {"steps": 8})
    plain.fit(until=1)
    # before the scale, which halves where a step overflows
    assert run.rows[0]["grad_norm"] == pytest.approx(plain.rows[0]["grad_norm"], rel=0.02)
    run.scaler.update(128.0)
    run.save(tmp_path / "checkpoint.pt")
    again = small_trainer(MIXED, {"steps": 8, "amp": "fp16"})
    again.load(tmp_path / "checkpoint.pt")
    assert again.scaler.get_scale() == 128


def test_speed_and_memory_are_measured(tmp_path):
    run = small_trainer(SMALL, {"steps": 6}, log_every=2, parts=[Speed()], folder=tmp_path)
    run.fit()
    with open(tmp_path / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 6]
    # as much as all steps together, whose seconds the trainer counts
    assert all(8 / run.seconds / 6 < float(row["images_per_second"]) < 1e6 for row in rows)
    assert all(30 < float(row["peak_memory_mb"]) < 100_000 for row in rows)


def test_tensorboard_has_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = small_trainer(SMALL, {"steps": 4}, parts=[TensorBoard(tensorboard=True)], folder=tmp_path)
    run.fit()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in run.rows])
    assert [event.step for event in events.Scalars("val_accuracy")] == [4]


@pytest.mark.parametrize(
    ("absent", "recipe", "part", "sentence"),
    [
        ("timm", {"ema": 0.9}, Ema(), r"\(ema\) needs timm, which is absent: pip .*\[timm\]"),
        (
            "tensorboard",
            {},
            TensorBoard(tensorboard=True),
            r"--tensorboard needs tensorboard, .*\[tensorboard\]",
        ),
    ],
)
def test_an_absent_package_is_named_with_its_extra(absent, recipe, part, sentence, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == absent]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(TrainError, match=sentence):
        small_trainer(SMALL, recipe, parts=[part], folder=tmp_path)


def test_names_of_parts_are_their_own():
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names) == 7


class TestTimm:
    NAME = "vit_tiny_patch16_224"

    @pytest.fixture(autouse=True)
    def _timm(self, torchvision):
        pytest.importorskip("timm")

    def test_the_listed_blocks_re_attend_with_the_same_weights(self):
        import timm

        torch.manual_seed(0)
        plain = timm.create_model(self.NAME, num_classes=3, img_size=32)
        torch.manual_seed(0)
        config = models.chosen(small_recipe(model=f"timm:{self.NAME}", reattention=[10, 11], image_size=32))
        model = models.make(replace(config, classes=3))
        assert [hasattr(block.attn, "reatten_matrix") for block in model.blocks] == [False] * 10 + [True] * 2
        for name, value in plain.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        # an identity mix without norm is plain attention
        for block in model.blocks[10:]:
            attn = block.attn
            attn.map_norm, attn.var_norm = "none", nn.Identity()
            nn.init.eye_(attn.reatten_matrix.weight.flatten(1))
            nn.init.zeros_(attn.reatten_matrix.bias)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "vit_tiny_r_s16_p8_224", NAME])
    def test_patches_are_of_the_grid(self, name):
        model = models.make(models.TimmConfig(name, 64, classes=3))
        assert models.patch_size(model) == (64 / model.patch_embed.num_patches**0.5,) * 2

    def test_patches_that_are_not_whole_have_no_labels(self):
        model = models.make(models.TimmConfig(self.NAME, 40, classes=3))
        data = random_data(model.config)
        with pytest.raises(TrainError, match=r"multiple of the patch \(16\) to label patches, got 40"):
            Trainer(model, data, small_recipe(batch=8, losses={"patch_mixing": 1.0}))

    def test_a_model_of_several_sizes_of_patches_has_no_losses(self):
        model = models.make(models.TimmConfig("hiera_tiny_224", 64, classes=3))
        with pytest.raises(TrainError, match="num_patches, which Hiera has not: train it with --losses none"):
            Trainer(model, random_data(model.config), small_recipe(batch=8, losses={"cosine": 1.0}))

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"model": "timm:vit_nowhere"}, "has no model 'vit_nowhere'"),
            ({"model": "timm:resnet18"}, "timm's resnet18 has no blocks and patch_embed|can't make resnet18"),
            ({"model": f"timm:{NAME}", "reattention": [12]}, r"blocks from 0 to 11, got \[12\]"),
            ({"model": "timm:cait_xxs24_224", "reattention": [0]}, "block 0 .* has TalkingHeadAttn"),
            ({"model": "vit_small"}, "unknown model 'vit_small': give timm:NAME, or one of digits24"),
        ],
    )
    def test_what_can_not_be_made_gets_a_sentence(self, options, sentence):
        with pytest.raises(TrainError, match=sentence):
            models.make(models.chosen(small_recipe(**options)))


class Evil:
    def __reduce__(self):
        return subprocess.getoutput, ("echo ran",)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda state: state | {"more": torch.ones(1)}, "does not fit this ViT: unexpected: more"),
        (lambda state: {n: v for n, v in state.items() if n != "norm.bias"}, "missing: norm.bias"),
        (lambda state: state | {"norm.bias": torch.ones(2)}, r"norm.bias .*\[2\].*\[16\]"),
        (lambda state: [1], "holds no state dict but a list"),
        (
            lambda state: state | {"x": Evil()},
            r"holds pickled code, \w+.getoutput, and was not loaded",
        ),
    ],
    ids=["unexpected", "missing", "shape", "list", "code"],
)
def test_weights_to_start_from_that_do_not_fit_get_a_sentence(content, sentence, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(content(small_trainer(SMALL).model.state_dict()), path)
    with pytest.raises(TrainError, match=sentence):
        small_trainer(SMALL, {"weights": str(path)})


def test_a_run_starts_from_weights(tmp_path):
    earlier = trained()
    earlier.save(tmp_path / "checkpoint.pt")
    torch.save(earlier.model.state_dict(), tmp_path / "weights.pt")
    for name in ("checkpoint.pt", "weights.pt"):
        run = small_trainer(SMALL, {"weights": str(tmp_path / name)})
        assert run.step == 0
        for key, value in earlier.model.state_dict().items():
            assert torch.equal(run.model.state_dict()[key], value)


def test_a_resume_with_other_data_is_refused(tmp_path):
    run = small_trainer(SMALL)
    run.save(tmp_path / "checkpoint.pt")
    other = small_trainer(SMALL)
    other.data.train.images[0, 0, 0, 0] += 1
    with pytest.raises(TrainError, match=r"train images '40 \(\w{12}\)', now '40 \(\w{12}\)'"):
        other.load(tmp_path / "checkpoint.pt")


EARLIER = {"steps": 12, "batch": 8, "lr": 1e-3, "warmup": 0.1, "weight_decay": 0.05, "betas": (0.9, 0.99)}
EARLIER |= {"clip": 1.0, "label_smoothing": 0.1, "cutmix": 0.0, "seed": 0}


@pytest.mark.parametrize("more", [{"amp": True}, {"amp": "bf16", "init": None, "epochs": None, "ema": 0.0}])
def test_a_checkpoint_of_an_earlier_release_goes_on(more, tmp_path):
    run = small_trainer(SMALL, {"amp": "bf16", "losses": DIVERSITY})
    run.fit(until=2)
    run.save(tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name in ("data", "other_rng", "scaler", "parts"):
        del state[name]
    state["recipe"] = EARLIER | {"losses": DIVERSITY} | more
    torch.save(state, tmp_path / "checkpoint.pt")
    again = small_trainer(SMALL, {"amp": "bf16", "losses": DIVERSITY})
    again.load(tmp_path / "checkpoint.pt")
    again.fit()
    run.fit()
    assert again.rows == run.rows
    with pytest.raises(TrainError, match="amp 'bf16', now None"):
        small_trainer(SMALL, {"losses": DIVERSITY}).load(tmp_path / "checkpoint.pt")


def test_the_command_line_takes_what_parts_and_recipe_have(tmp_path, capsys):
    pytest.importorskip("sklearn")
    options = [
        "--steps",
        "4",
        "--batch",
        "4",
        "--accumulate",
        "2",
        "--checkpointing",
        "--log-every",
        "2",
        "--reattention",
        "none",
    ]
    assert main([*options, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "images/s at the end" in out
    assert {path.name for path in tmp_path.iterdir()} == {"log.csv", "speed.csv", "checkpoint.pt"}
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main([*options, "--out", str(tmp_path), "--resume", "--lr", "0.5", "--monitor-every", "2"]) == 2
    assert "lr 0.001, now 0.5: resume with the same" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_the_log_is_written_anew_once(tmp_path):
    run = small_trainer(SMALL, {"steps": 4}, parts=[CsvLog()], folder=tmp_path)
    (tmp_path / "log.csv").write_text("of an earlier run\n")
    run.fit(until=2)
    run.fit()
    with open(tmp_path / "log.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
