"""Several processes train as one does: same losses, weights and log; a sentence where they differ."""

import contextlib
import csv
import functools
import io
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import processes
import pytest
import torch
from small_trainer import assert_same_run, small_trainer

from vitdiv_kernels.train import checkpoint, parallel
from vitdiv_kernels.train.augmentation import Transforms
from vitdiv_kernels.train.cli import main
from vitdiv_kernels.train.data import ImageFiles, Shares, StepBatches, unchanged
from vitdiv_kernels.train.loss_weights import DIVERSITY
from vitdiv_kernels.vit import ViTConfig

SMALL = ViTConfig(8, 1, patch=2, overlap=1, dim=16, depth=4, heads=2, mlp_ratio=2.0, classes=3, pos_std=0.2)
MIXED = replace(SMALL, reattention=(2, 3))
STEPS = 6

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(config, recipe, options, load=None, save=None, until=None):
    """Rows and weights of a run, in this process or one of several."""
    if options.get("compile"):  # what is compiled ends with this process; making code of it takes a minute
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    with parallel.started("cpu"):
        run = small_trainer(config, {"steps": STEPS} | recipe, eval_every=3, **options)
        if load:
            run.load(load)
        run.fit(until)
        if save:
            run.save(save)
        whole = run.model.state_dict()
        weights = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in whole.items()}
        records = run.monitor.records if run.monitor else None
        return run.rows, {name: value.numpy() for name, value in weights.items()}, records


def assert_same(found, expected):
    assert_same_run(*found[:2], *expected[:2])


GONG = replace(SMALL, patch_head=True)
CASES = {
    "mixup and CutMix": (SMALL, {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.2}, {"accumulate": 2}),
    "CutMix, accumulated": (SMALL, {"losses": {"gong2021": 1.0}}, {"accumulate": 2}),
    "batch norm of maps": (
        MIXED, {"losses": DIVERSITY | {"cos_reg": 0.1}, "sync_bn": True}, {"checkpointing": True}
    ),
    "a head without part in the logits": (replace(SMALL, patch_head=True), {}, {"accumulate": 2}),
    "sharded, compiled": (replace(SMALL, depth=2), {"losses": DIVERSITY}, {"fsdp": True, "compile": True}),
    "sharded": (SMALL, {"losses": DIVERSITY}, {"fsdp": True, "accumulate": 2}),
    "sharded, batch norm": (
        MIXED, {"losses": {"cos_reg": 0.5}, "sync_bn": True}, {"fsdp": True, "checkpointing": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case):
    config, recipe, options = CASES[case]
    expected = trained(config, recipe, {"monitor_every": 3})
    found = processes.together(2, trained, config, recipe, options | {"monitor_every": 3})
    assert len(expected[0]) == STEPS
    for each in found:
        assert_same(each, expected)
    for record, other in zip(found[0][2], expected[2], strict=True):
        for name, value in other.items():
            assert record[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    assert (found[1][2] is None) == ("fsdp" not in options)


def random_pixels(image):
    """A transform that draws from Python, NumPy and torch, as those of timm do."""
    pixels = torch.tensor(np.array(image), dtype=torch.float32)[None] / 255
    return pixels * random.random() + float(np.random.rand()) + torch.rand(1, 8, 8)


def trained_on_files(folder):
    """Rows of a run on images that are augmented one by one."""
    with parallel.started("cpu"):
        run = small_trainer(SMALL, {"steps": 4, "mixup": 0.8, "cutmix": 1.0}, eval_every=4)
        own = Transforms(random_pixels, lambda image: torch.tensor(np.array(image))[None] / 255)
        samples = [(str(path), i % 3) for i, path in enumerate(sorted(folder.iterdir()))]
        files = ImageFiles(samples, 8, 1, own)
        run.data = replace(run.data, train=files, val=files, augment=unchanged)
        run.fit()
        return run.rows, run.model.state_dict()


def test_random_transforms_are_those_of_one_process(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i in range(20):
        image.new("L", (8, 8), 10 * i).save(tmp_path / f"{i:02}.png")
    expected = trained_on_files(tmp_path)
    assert len({row["loss"] for row in expected[0]}) == 4
    for found in processes.together(2, trained_on_files, tmp_path):
        assert_same(found, expected)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"fsdp": True}], ids=str)
def test_two_image_mixing_takes_pairs_of_each_part(options):
    """Two processes are one that does each step in as many parts; the head of patches learns, too."""
    recipe = {"losses": {"gong2021_released": 1.0}, "cutmix": 1.0}
    parts = 2 * options.get("accumulate", 1)
    expected = trained(GONG, recipe, {"accumulate": parts})
    start = small_trainer(GONG, recipe).model.patch_head.weight
    assert abs(expected[1]["patch_head.weight"] - start.detach().numpy()).max() > 1e-4
    for found in processes.together(2, trained, GONG, recipe, options):
        assert_same(found, expected)


def interrupted(config, recipe, options, folder):
    first = trained(config, recipe, options, save=folder / "checkpoint.pt", until=3)
    return first[0]


@pytest.mark.parametrize("options", [{}, {"fsdp": True}], ids=["whole", "sharded"])
def test_a_run_goes_on_with_another_number_of_processes(options, tmp_path):
    recipe = {"losses": DIVERSITY, "cutmix": 1.0}
    expected = trained(SMALL, recipe, {})
    processes.together(2, interrupted, SMALL, recipe, options, tmp_path)
    assert_same(trained(SMALL, recipe, {}, load=tmp_path / "checkpoint.pt"), expected)

    trained(SMALL, recipe, {}, save=tmp_path / "alone.pt", until=3)
    for found in processes.together(2, trained, SMALL, recipe, options, tmp_path / "alone.pt"):
        assert_same(found, expected)


def test_two_processes_go_on_exactly(tmp_path):
    """With random numbers of each process: those of stochastic depth."""
    config = replace(SMALL, drop_path=0.5)
    expected = processes.together(2, trained, config, {}, {})
    processes.together(2, interrupted, config, {}, {}, tmp_path)
    found = processes.together(2, trained, config, {}, {}, tmp_path / "checkpoint.pt")
    for (rows, weights, _), (other_rows, other_weights, _) in zip(found, expected, strict=True):
        assert rows == other_rows
        assert all((weights[name] == value).all() for name, value in other_weights.items())


def command(options, of_rank=()):
    """Exit code, standard output and error of the command in one of the processes."""
    out, error = io.StringIO(), io.StringIO()
    mine = dict(of_rank).get(int(os.environ["RANK"]), [])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main([*options, *mine])
    return code, out.getvalue(), error.getvalue()


OPTIONS = ["--steps", "4", "--batch", "4", "--log-every", "1", "--reattention", "none", "--eval-every", "2"]


def test_the_first_process_alone_writes_and_tells(tmp_path):
    pytest.importorskip("sklearn")
    options = [*OPTIONS, "--monitor-every", "2", "--out", str(tmp_path)]
    (code, out, _), other = processes.together(2, command, options)
    assert code == 0
    assert "test accuracy" in out
    assert other[:2] == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {
        "log.csv", "speed.csv", "collapse.csv", "checkpoint.pt",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "of_rank", "sentence"),
    [
        ([], {1: ["--lr", "0.5"]}, "process 1 was started with lr 0.5, but process 0 with 0.001"),
        ([], {1: ["--reattention", "3"]}, "process 1 was started with reattention"),
        ([], {1: ["--save-every", "3"]}, "process 1 was started with save_every 3, but process 0 with 500"),
        (["--batch", "5"], {}, "--batch 5 can't be shared by 2 processes"),
        (["--batch", "6", "--cutmix", "1"], {}, "--batch 6 leaves 3 images for each of 2 processes"),
        ([], {1: ["--device", "abacus"]}, "process 1: the device 'abacus' can't be used"),
    ],
)
def test_processes_that_do_not_fit_say_so_and_touch_nothing(options, of_rank, sentence, tmp_path):
    pytest.importorskip("sklearn")
    options = [*OPTIONS, "--out", str(tmp_path / "run"), *options]
    first, second = processes.together(2, command, options, tuple(of_rank.items()))
    assert (first[0], second[0]) == (2, 2)
    assert sentence in first[2]
    assert second[2] == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_wrong_arguments_are_told_once(rank, times, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        main(["--workers", "many"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("--workers: must be a whole number at least 0, got 'many'") == times
    assert main(["--lr", "fast"]) == 2  # a key of the recipe
    assert capsys.readouterr().err.count("--lr fast: lr must be a number of at least 0, got 'fast'") == times


def folder_of_images(root, odd):
    from PIL import Image

    for name in ("a", "b"):
        for part in ("train", "val"):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (8, 8), 10 * i).save(root / part / name / f"{odd if i == 3 else ''}{i}.png")
    return f"imagefolder:{root}"


def test_processes_with_other_data_say_so(tmp_path):
    pytest.importorskip("PIL")
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        pytest.skip("torchvision does not load in a process of its own: it is not here, or for another torch")
    folders = [folder_of_images(tmp_path / name, odd) for name, odd in (("one", ""), ("two", "x"))]
    of_rank = {rank: ["--data", folder] for rank, folder in enumerate(folders)}
    options = [*OPTIONS, "--out", str(tmp_path / "run")]
    first, second = processes.together(2, command, options, tuple(of_rank.items()))
    assert (first[0], second[0]) == (2, 2)
    assert "process 1 was started with train images '8 (" in first[2]


def torchrun(*options):
    arguments = ["--standalone", "--nproc-per-node=2", "-m", "vitdiv_kernels.train", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_torchrun_trains_and_a_signal_saves(tmp_path):
    pytest.importorskip("sklearn")
    options = ["--batch", "4", "--log-every", "5", "--steps", "100000", "--reattention", "none", "--out"]
    run = torchrun(*options, str(tmp_path))
    try:
        log, deadline = tmp_path / "log.csv", time.monotonic() + processes.SECONDS
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        out = run.communicate(timeout=processes.SECONDS)[0]
    finally:
        run.kill()
    assert out.count("stopped after step") == 1
    with open(log, newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert checkpoint.read(tmp_path / "checkpoint.pt")["step"] == int(last["step"])


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc")
def test_a_killed_process_ends_all_and_the_run_goes_on(tmp_path):
    pytest.importorskip("sklearn")
    options = ["--batch", "4", "--log-every", "1", "--save-every", "2", "--reattention", "none"]
    options += ["--out", str(tmp_path), "--steps", "100"]
    run, path = torchrun(*options), tmp_path / "checkpoint.pt"
    try:
        deadline = time.monotonic() + processes.SECONDS
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with open(f"/proc/{run.pid}/task/{run.pid}/children") as file:
            workers = [int(pid) for pid in file.read().split()]
        os.kill(workers[-1], signal.SIGKILL)
        run.communicate(timeout=processes.SECONDS)
        assert run.returncode != 0
        assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
        assert checkpoint.read(path)["step"] < 100
    finally:
        run.kill()
    assert main([*options, "--resume"]) == 0
    with open(tmp_path / "log.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 101))


def test_shares_are_a_partition_that_keeps_pairs():
    steps = StepBatches(24, 12, seed=0, start=0, stop=2)
    for size in (1, 2, 3, 4):
        shares = [list(Shares(steps, rank, size)) for rank in range(size)]
        for step, batch in enumerate(steps):
            assert sorted(i for each in shares for i in each[step]) == sorted(batch)
    for number in (1, 2, 3):
        for index in range(number):
            part = parallel.share(12, index, number)
            assert part[::-1] == [11 - place for place in part]
