"""The demo, end to end with few steps, and the parts of it that judge."""

import json
import multiprocessing
import runpy
import sys

import processes
import pytest
import torch
from places import ROOT

from vitdiv_kernels import _dispatch, use_backend
from vitdiv_kernels.demo import cost
from vitdiv_kernels.demo import digits as demo
from vitdiv_kernels.demo import segment as demo_segment
from vitdiv_kernels.nn import ReAttention
from vitdiv_kernels.train.errors import TrainError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_demo_ends_with_table_figure_and_cost(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    image = pytest.importorskip("matplotlib.image")
    started = processes.context()  # six processes, each of which would import all for seconds
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: started)
    assert demo.main(["--steps", "2", "--out", str(tmp_path), "--cost-batch", "1", "--cost-rounds", "1"]) == 0
    out = capsys.readouterr().out
    for title in ("test accuracy", "|patch cosine|", "effective rank", "head cosine"):
        assert title in out
    for name in demo.TITLES.values():
        assert out.count(f"\n{name}") == 1
    assert "95 % interval" in out
    assert "does not show" in " ".join(out.split())
    assert "published form (Conv2d mix)" in out

    pixels = image.imread(tmp_path / "demo.png")
    assert min(pixels.shape[:2]) > 600
    assert pixels[..., :3].std() > 0.1

    results = json.loads((tmp_path / "results.json").read_text())
    for model in results["models"].values():
        assert [record["block"] for record in model["records"]] == list(range(24))
        assert (len(model["matrix"]), len(model["matrix"][0])) == (16, 16)
        assert model["rows"][-1]["val_accuracy"] > 0
    native = _dispatch.missing("native", "cpu") is None
    assert set(results["cost"]) == {"published", "reference", "native"} - (set() if native else {"native"})
    assert all(row["ms"] > 0 and row["megabytes"] > 0 for row in results["cost"].values())
    assert {p.name for p in tmp_path.iterdir()} == {"demo.png", "results.json", *demo.TITLES}

    draw = runpy.run_path(str(ROOT / "docs/images/collapse.py"))["draw"]  # README's picture
    draw(results, tmp_path / "collapse.png")
    assert image.imread(tmp_path / "collapse.png")[..., :3].std() > 0.1


def test_the_demo_without_scikit_learn(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert demo.main(["--steps", "1"]) == 2
    assert "scikit-learn" in capsys.readouterr().err


def test_wilson_interval_is_the_published_one():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148.
    assert demo.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert demo.wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)


def result(abs_cosine, accuracy):
    return {"records": [{"patch_abs_cosine": abs_cosine}], "test_accuracy": accuracy, "matrix": [[1.0]]}


@pytest.mark.parametrize(
    ("plain", "sentence"), [(0.7, "patches become alike in the plain ViT"), (0.3, "are not the most alike")]
)
def test_the_notes_claim_what_the_run_shows(plain, sentence):
    results = {"plain": result(plain, 0.95), "losses": result(0.4, 0.96), "reattention": result(0.5, 0.98)}
    assert sentence in " ".join(demo.notes(results, 360).split())


def test_what_another_study_found_is_said_to_be_from_there():
    results = {"plain": result(0.7, 0.95), "losses": result(0.4, 0.96), "reattention": result(0.5, 0.98)}
    own, other = " ".join(demo.notes(results, 360).split()).split("Not from this run: ")
    assert "frozen" not in own
    for words in ("an earlier study with other settings (lr 1.5e-3, three seeds", "on its test split"):
        assert words in other


def test_the_backend_that_runs_is_named():
    with use_backend("auto"):
        by_table = _dispatch.auto_choice("reattention", "cpu")
        assert demo.backend_line() == "backend {}: {}".format(*by_table)
    with use_backend("reference"):
        assert demo.backend_line().startswith("backend reference: ")
    with use_backend("triton"), pytest.raises(TrainError, match="triton"):
        demo.backend_line()


def test_published_and_reference_steps_are_the_same_training():
    """From the same weights, so that the times compare like with like."""
    torch.manual_seed(0)
    published = cost.PublishedReAttention(24, 3)
    ours = ReAttention(24, 3, qkv_bias=True)
    ours.load_state_dict(published.state_dict())
    x = torch.randn(2, 17, 24)
    torch.testing.assert_close(ours(x), published(x))


def test_the_demo_segments_scenes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    image = pytest.importorskip("matplotlib.image")
    assert demo_segment.main(["--steps", "2", "--out", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in (*demo_segment.TITLES.values(), "mean IoU", "pixel accuracy", "95 % interval"):
        assert name in out
    assert "It is one run of each model" in out
    assert image.imread(tmp_path / "segment.png")[..., :3].std() > 0.1
    results = json.loads((tmp_path / "results.json").read_text())["models"]
    for model in results.values():
        assert torch.tensor(model["confusion"]).sum() == 400 * 32 * 32
        assert torch.tensor(model["predictions"]).shape == (3, 32, 32)
    assert {p.name for p in tmp_path.iterdir()} == {"segment.png", "results.json", "plain", "losses"}


def test_the_interval_of_a_difference_has_the_difference():
    """Of scenes that are all alike there is one difference; of others it lies around it."""
    right, wrong = torch.tensor([[6, 0], [0, 4]]), torch.tensor([[5, 1], [0, 4]])
    alike = [matrix.expand(50, 2, 2) for matrix in (wrong, right)]
    expected = 100 * (1 - (5 / 6 + 4 / 5) / 2)
    assert demo_segment.difference(*alike) == pytest.approx((expected, expected))
    mixed = torch.cat([wrong.expand(25, 2, 2), right.expand(25, 2, 2)])
    low, high = demo_segment.difference(mixed, right.expand(50, 2, 2))
    assert 0 < low < 100 * (1 - (5.5 / 6 + 4 / 4.5) / 2) < high < expected
