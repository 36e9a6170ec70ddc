"""The trainer: exact resume, log, checkpoints, its command line, and the same losses on every backend."""

import csv
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from small_trainer import random_data, small_trainer
from small_vit import query_key

from vitdiv_kernels import _dispatch, attention_diversity, losses, pairwise_cosine
from vitdiv_kernels.attach.presets import PRESETS
from vitdiv_kernels.attach.terms import LOSSES
from vitdiv_kernels.train.checkpoint import ADDED, PARTS
from vitdiv_kernels.train.cli import main
from vitdiv_kernels.train.data import StepBatches, Tensors
from vitdiv_kernels.train.errors import TrainError
from vitdiv_kernels.train.loop import accuracy
from vitdiv_kernels.train.loss_weights import DIVERSITY
from vitdiv_kernels.train.report import load_model
from vitdiv_kernels.vit import CONFIGS, ViT, ViTConfig

SMALL = ViTConfig(
    8, 1, patch=2, overlap=1, dim=16, depth=4, heads=2, mlp_ratio=2.0, classes=3, drop_path=0.2, pos_std=0.2,
    reattention=(2, 3),
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(config=SMALL, recipe=None, **options):
    return small_trainer(config, dict(steps=24, losses=DIVERSITY) | (recipe or {}), eval_every=12, **options)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("losses", [DIVERSITY, {"gong2021": 1.0}], ids=["diversity", "mixed by CutMix"])
def test_resume_is_exact(losses, tmp_path):
    whole = trainer(recipe={"losses": losses}, log_path=tmp_path / "whole.csv")
    whole.fit()

    first = trainer(recipe={"losses": losses}, log_path=tmp_path / "halves.csv")
    first.fit(until=11)
    first.save(tmp_path / "checkpoint.pt")
    first.fit(until=13)  # these rows were never saved: the resumed run must write them once

    second = trainer(recipe={"losses": losses}, log_path=tmp_path / "halves.csv")
    for parameter in second.model.parameters():
        torch.nn.init.zeros_(parameter)
    torch.manual_seed(99)
    second.load(tmp_path / "checkpoint.pt")
    assert second.step == 11
    second.fit()

    assert second.rows == whole.rows
    assert (tmp_path / "halves.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_the_log_has_every_step_and_its_terms(tmp_path):
    run = trainer(log_path=tmp_path / "log.csv")
    run.fit()
    rows = read(tmp_path / "log.csv")
    assert list(rows[0]) == [
        "step", "epoch", "loss", "cross_entropy", "cosine", "contrast", "heads", "lr", "grad_norm",
        "val_accuracy",
    ]  # fmt: skip
    assert [int(row["step"]) for row in rows] == list(range(1, 25))
    assert [i + 1 for i, row in enumerate(rows) if row["val_accuracy"]] == [12, 24]
    for row in rows:
        terms = sum(weight * float(row[name]) for name, weight in DIVERSITY.items())
        assert float(row["loss"]) == pytest.approx(float(row["cross_entropy"]) + terms, rel=1e-5)
        assert float(row["lr"]) == run.schedule.learning_rate(int(row["step"]) - 1)


def test_the_step_is_that_of_the_losses_written_out():
    run = trainer(replace(SMALL, drop_path=0.0))
    images, labels = run.data.train[:8]
    terms = run.losses(images, labels)
    terms["loss"].backward()
    found = {name: p.grad.clone() for name, p in run.model.named_parameters()}

    run.model.zero_grad()
    logits, tokens = run.model(images, return_tokens=True)
    first, last = tokens[1][:, 1:], tokens[-1][:, 1:]
    plain = {
        "cosine": pairwise_cosine(last, penalty="abs"),
        "contrast": losses.patch_contrast(first, last),
        "heads": attention_diversity(*query_key(run.model, tokens, 0), include_self=False),
    }
    entropy = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    plain |= {
        "cross_entropy": entropy,
        "loss": entropy + sum(w * plain[name] for name, w in DIVERSITY.items()),
    }
    plain["loss"].backward()
    assert list(terms) == list(plain)
    for name, value in plain.items():
        torch.testing.assert_close(terms[name], value)
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)


def test_any_loss_and_preset_trains_and_is_logged():
    run = trainer(recipe={"steps": 2, "losses": {"koleo": 0.1, "deepvit_cos_reg": 1.0}})
    run.fit()
    row = run.rows[-1]
    expected = row["cross_entropy"] + 0.1 * row["koleo"] + 0.1 * row["deepvit_cos_reg.cos_reg"]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_the_model_has_no_blocks_for_is_refused():
    with pytest.raises(TrainError, match="cos_reg takes block 2, but the model has 2 blocks"):
        trainer(replace(SMALL, depth=2, reattention=()), {"losses": {"cos_reg": 1.0}})


def test_a_resume_with_another_recipe_or_model_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer().save(path)
    for changes, sentence in (
        ({"recipe": {"lr": 0.1}}, "lr 0.001, now 0.1"),
        ({"recipe": {"cutmix": 0.5}}, "cutmix 0.0, now 0.5"),
        ({"config": replace(SMALL, reattention=())}, r"reattention \[2, 3\], now \[\]"),
    ):
        with pytest.raises(TrainError, match=f"made with {sentence}"):
            trainer(**changes).load(path)
    with pytest.raises(TrainError, match="there is no checkpoint"):
        trainer().load(tmp_path / "none.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainError, match="is cut or damaged, or no file of torch"):
        trainer().load(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {"head.weight": torch.ones(2)},
            "is no checkpoint of this trainer: it has no model, optimizer, step",
        ),
        ([1, 2], "holds no state dict but a list"),
        ({"model": {}}, "is no checkpoint of this trainer: it has no optimizer"),
    ],
    ids=["state dict", "list", "model alone"],
)
def test_a_file_that_is_no_checkpoint_of_ours_is_named(content, sentence, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(TrainError) as raised:
        trainer().load(path)
    assert str(raised.value).startswith(f"{path} {sentence}")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"recipe": None}, "is no checkpoint of this trainer: its recipe must be a dict, got NoneType"),
        ({"config": [1]}, "is no checkpoint of this trainer: its config must be a dict, got list"),
        ({"config": {"foo": 1}}, "holds a model that this release can't make"),
        ({"config": {"image_size": 9, "patch": 4}}, "holds a model that this release can't make"),
        ({"model": {}}, "does not fit its own configuration: Error"),
    ],
)
def test_a_checkpoint_with_parts_of_another_release_is_named(changes, sentence, tmp_path):
    """To go on, and for the report."""
    path = tmp_path / "checkpoint.pt"
    trainer().save(path)
    torch.save(torch.load(path, weights_only=True) | changes, path)
    for read in (trainer().load, load_model):
        with pytest.raises(TrainError, match=re.escape(str(path)) + " " + sentence):
            read(path)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"task": "depth"}, "holds the task 'depth': this release has classify, segment"),
        ({"task": "segment", "depth": 1}, "holds a task that this release does not have: .*'depth'"),
    ],
)
def test_the_report_of_a_task_of_another_release(task, sentence, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer().save(path)
    torch.save(torch.load(path, weights_only=True) | {"task": task}, path)
    with pytest.raises(TrainError, match=f"{path} {sentence}"):
        load_model(path)


def test_a_checkpoint_holds_what_load_asks_for(tmp_path):
    trainer().save(tmp_path / "checkpoint.pt")
    assert tuple(torch.load(tmp_path / "checkpoint.pt", weights_only=True)) == (*PARTS, *ADDED)


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path, run = tmp_path / "checkpoint.pt", trainer()
    run.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(TrainError, match="can't be written: no space left; the checkpoint of step 0 stays"):
        run.save(path)
    assert path.read_bytes() == before


def test_a_loss_that_is_not_finite_ends_training_with_a_sentence():
    run = trainer()
    with torch.no_grad():
        run.model.head.bias.fill_(float("nan"))
    with pytest.raises(TrainError, match="the loss is nan at step 1"):
        run.fit()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    run = trainer(save_path=path, save_every=2, log_every=100)

    def spoil(step, terms):
        if step == 3:
            with torch.no_grad():
                run.model.head.bias[0] = float("nan")

    with pytest.raises(TrainError, match=r"is not finite after step 4, .*; the checkpoint of step 2 stays"):
        run.fit(on_step=spoil)
    state = torch.load(path, weights_only=True)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(TrainError, match=r"the batch \(64\) is larger than the training set \(40 images\)"):
        trainer(recipe={"batch": 64})


def test_a_missing_backend_is_refused_before_training():
    with pytest.raises(TrainError, match="triton"):
        trainer(backend="triton")


def test_each_epoch_is_a_permutation_and_any_step_can_start():
    batches = list(StepBatches(10, 3, seed=1, start=0, stop=9))
    for epoch in range(3):
        assert len({i for batch in batches[3 * epoch : 3 * epoch + 3] for i in batch}) == 9
    assert batches[:3] != batches[3:6]
    assert list(StepBatches(10, 3, seed=1, start=4, stop=9)) == batches[4:]


@pytest.mark.parametrize("name", CONFIGS)
def test_three_steps_of_each_model(name):
    config = CONFIGS[name]
    if not name.startswith("digits"):
        config = replace(config, image_size=32, dim=8 * config.heads)
    run = trainer(config, {"steps": 3, "batch": 2})
    run.data = random_data(config, 4)
    run.fit()
    assert [row["step"] for row in run.rows] == [1, 2, 3]


def test_autocast_trains_in_bfloat16():
    run = trainer(recipe={"steps": 3, "amp": "bf16"})
    seen = []
    run.model.blocks[3].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run.fit()
    assert torch.bfloat16 in seen
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_fused_and_reference_operations_give_the_same_losses():
    missing = _dispatch.missing("native", "cpu")
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    curves = []
    for backend in ("reference", "native"):
        run = trainer(recipe={"steps": 30}, backend=backend)
        run.fit()
        curves.append([row["loss"] for row in run.rows])
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)


def command(*arguments):
    return [sys.executable, "-m", "vitdiv_kernels.train", *arguments]


def test_the_command_line_trains_and_resumes(tmp_path, capsys):
    pytest.importorskip("sklearn")
    options = f"--losses cosine=0.5 --reattention 22-23 --steps 4 --batch 4 --log-every 1 --out {tmp_path}"
    options = options.split()
    assert main(options) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert len(read(tmp_path / "log.csv")) == 4
    assert main(options) == 2
    assert "is there already: add --resume" in capsys.readouterr().err
    assert main([*options, "--resume"]) == 0
    assert len(read(tmp_path / "log.csv")) == 4


@pytest.mark.parametrize("name", ["train", "report", "demo"])
def test_the_old_commands_say_where_they_went(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python", "--help"])
    new = f"vitdiv_kernels.{name}"
    with pytest.raises(SystemExit, match=f"^it has moved: run python -m {new}, with the same options$"):
        runpy.run_module(f"vitdiv_kernels.vit.{name}", run_name="__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(new, run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {new} ")


def test_accuracy_counts_right_answers():
    model, images = ViT(SMALL), torch.randn(300, 1, 8, 8)
    with torch.no_grad():
        labels = model.eval()(images).argmax(-1)
    labels[:30] = (labels[:30] + 1) % 3
    assert accuracy(model.train(), Tensors(images, labels)) == pytest.approx(0.9)
    assert model.training


def test_processes_that_do_not_know_each_other_are_refused(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--out", str(tmp_path / "run")]) == 2
    assert re.match(
        r"error: .* one of 2 .* \(WORLD_SIZE\).* start them with torchrun", capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    trainer()


def test_a_run_goes_on_without_the_weights_it_started_from(tmp_path):
    start, out = tmp_path / "start.pt", tmp_path / "run"
    torch.save(ViT(CONFIGS["digits24"]).state_dict(), start)
    options = ["--steps", "2", "--batch", "4", "--init", str(start), "--out", str(out)]
    assert main(options) == 0
    start.unlink()
    assert main([*options, "--resume"]) == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data", "cifar"], "unknown data 'cifar': give digits or imagefolder:PATH"),
        (["--data", "imagefolder:/no/such/folder"], "the image folder /no/such/folder does not exist"),
        (["--model", "deit_small"], "the digits are 1x8x8 images but the model takes 3x224x224"),
        (["--reattention", "20-30"], "reattention must list blocks from 0 to 23"),
        (["--backend", "triton"], "triton"),
        (["--device", "abacus"], "the device 'abacus' can't be used"),
        (["--batch", "2000"], "the batch (2000) is larger than the training set (1149 images)"),
        (["--resume"], "there is no checkpoint"),
    ],
)
def test_bad_arguments_get_a_sentence(options, sentence, tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert main(["--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--accumulate", "0"], "must be a whole number at least 1, got '0'"),
        (["--steps", "3", "--epochs", "1"], "not allowed with argument"),
    ],
)
def test_arguments_that_do_not_parse_get_a_sentence(options, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_help_names_every_option():
    out = subprocess.run(command("--help"), capture_output=True, text=True, check=True).stdout
    options = ("data", "model", "losses", "cutmix", "amp", "resume", "seed", "device", "backend", "epochs")
    assert all(f"--{option}" in out for option in options)
    below = out[out.index("losses by short name") :]
    for names, part in zip((DIVERSITY, PRESETS, LOSSES), below.split("\n\n"), strict=True):
        assert all(re.search(rf"\b{name}\b", part) for name in names)
    assert max(map(len, below.splitlines())) <= 80


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupt_saves_and_the_run_goes_on(tmp_path):
    pytest.importorskip("sklearn")
    options = ["--batch", "2", "--log-every", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command(*options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    log, deadline = tmp_path / "log.csv", time.monotonic() + 60
    while not (log.exists() and len(read(log)) > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "stopped after step" in out
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert len(read(log)) == step
