"""Runs that are killed or find a full disk: what they leave goes on as if nothing had been."""

import csv
import os
import random
import signal
import time

import processes
import pytest
import torch
from small_trainer import small_trainer

from vitdiv_kernels.train import checkpoint
from vitdiv_kernels.train.errors import TrainError
from vitdiv_kernels.vit import ViTConfig

SMALL = ViTConfig(8, 1, patch=4, dim=8, depth=2, heads=2, mlp_ratio=1.0, classes=3, reattention=(1,))
STEPS, SAVE_EVERY = 250, 7

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder, **options):
    options = dict(log_path=folder / "log.csv", save_path=folder / "checkpoint.pt") | options
    return small_trainer(
        SMALL, {"steps": STEPS, "batch": 4}, save_every=SAVE_EVERY, eval_every=400, **options
    )


def go_on(folder, until=None):
    torch.set_num_threads(1)
    run = trainer(folder)
    if (folder / "checkpoint.pt").exists():
        run.load(folder / "checkpoint.pt")
    run.fit(until)
    run.save(folder / "checkpoint.pt")


def last_logged(folder):
    """The step of the last whole line."""
    if not (folder / "log.csv").exists():
        return 0
    with open(folder / "log.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["grad_norm"]]
    return int(rows[-1]["step"]) if rows else 0


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_killed_at_random_moments_a_run_loses_few_steps_and_ends_the_same(tmp_path, request):
    number = 20 if request.config.getoption("--every-case") else 6
    moments, reached, lost = random.Random(0), [0], []
    for _ in range(number):
        process = processes.context().Process(target=go_on, args=(tmp_path,))
        process.start()
        # before its first step, or after some more that it logs, at any moment of a step or a checkpoint
        until, deadline = min(STEPS, reached[-1] + moments.randrange(40)), time.monotonic() + 60
        logged = last_logged(tmp_path)
        while last_logged(tmp_path) in (logged, *range(until)) and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        logged = last_logged(tmp_path)
        path = tmp_path / "checkpoint.pt"
        saved = checkpoint.read(path)["step"] if path.exists() else 0
        assert saved >= reached[-1]
        lost.append(logged - saved)
        reached.append(saved)
        if saved == STEPS:
            break
    assert max(lost) <= SAVE_EVERY
    assert len(set(reached)) > 2  # it was killed while it trained
    go_on(tmp_path)
    whole = trainer(tmp_path / "whole")
    whole.fit()
    ended = checkpoint.read(tmp_path / "checkpoint.pt")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(ended["model"][name], value), name
    assert (tmp_path / "log.csv").read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_ends_with_a_sentence_and_keeps_the_last_checkpoint(tmp_path):
    run = trainer(tmp_path)
    run.fit(until=SAVE_EVERY)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    part = tmp_path / "checkpoint.pt.part"
    part.symlink_to("/dev/full")
    with pytest.raises(TrainError) as raised:
        run.fit()
    assert str(raised.value) == (
        f"{tmp_path / 'checkpoint.pt'} can't be written: No space left on device; the checkpoint of step "
        f"{SAVE_EVERY} stays"
    )
    assert run.step == 2 * SAVE_EVERY
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not part.is_symlink()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_on_a_full_disk_ends_with_a_sentence(tmp_path):
    run = trainer(tmp_path)
    run.fit(until=1)
    (tmp_path / "log.csv").unlink()
    (tmp_path / "log.csv.part").symlink_to("/dev/full")
    with pytest.raises(TrainError, match=r"log.csv can't be written: No space left on device"):
        run.fit()


def test_nothing_of_an_earlier_run_is_touched_before_the_first_step(tmp_path):
    run = trainer(tmp_path, monitor_every=2)
    run.fit(until=9)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 3
    again = trainer(tmp_path, monitor_every=2)
    again.load(tmp_path / "checkpoint.pt")

    def broken(images, labels):
        raise TrainError("an image can't be read")

    again.train_step = broken
    with pytest.raises(TrainError, match="can't be read"):
        again.fit()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
