"""The report of a run: numbers, figure, history, and sentences; the trainer's monitor behind it."""

import sys
from dataclasses import replace

import pytest
import torch
from small_trainer import small_trainer

from vitdiv_kernels import CollapseMonitor
from vitdiv_kernels.attach.monitor import MEASURES, read_records
from vitdiv_kernels.train import report, task
from vitdiv_kernels.train.data import load
from vitdiv_kernels.train.errors import DataError, TrainError
from vitdiv_kernels.vit import CONFIGS

CONFIG = replace(CONFIGS["digits24"], depth=3, dim=16, heads=2, reattention=(2,))


pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder, **options):
    recipe = {"steps": 6, "losses": {"cosine": 0.5}}
    return small_trainer(CONFIG, recipe, log_path=folder / "log.csv", eval_every=100, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    it = trainer(folder, monitor_every=2)
    it.fit()
    it.save(folder / "checkpoint.pt")
    return folder


def test_monitoring_does_not_change_training_and_resumes_exactly(tmp_path):
    run = tmp_path / "monitored"
    trainer(run, monitor_every=2).fit()
    trainer(tmp_path / "plain").fit()
    assert (run / "log.csv").read_bytes() == (tmp_path / "plain" / "log.csv").read_bytes()
    assert not (tmp_path / "plain" / "collapse.csv").exists()

    first = trainer(tmp_path / "halves", monitor_every=2)
    first.fit(until=3)
    first.save(tmp_path / "halves" / "checkpoint.pt")
    first.fit(until=5)  # its sample was never saved: the resumed run must write it once
    second = trainer(tmp_path / "halves", monitor_every=2)
    second.load(tmp_path / "halves" / "checkpoint.pt")
    second.fit()
    assert (tmp_path / "halves" / "collapse.csv").read_bytes() == (run / "collapse.csv").read_bytes()
    assert [r["step"] for r in read_records(run / "collapse.csv")] == [2, 2, 2, 4, 4, 4, 6, 6, 6]


def test_another_csv_is_refused_on_resume(run, tmp_path):
    (tmp_path / "collapse.csv").write_text("a,b\n1,2\n")
    it = trainer(tmp_path, monitor_every=2)
    with pytest.raises(TrainError, match="is no file of CollapseMonitor"):
        it.load(run / "checkpoint.pt")


def test_the_report_prints_the_measures_and_draws_them(run, tmp_path, capsys):
    pytest.importorskip("sklearn")
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / "figure.png"
    assert report.main([str(run), "--images", "12", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    model, step, *_ = report.load_model(run / "checkpoint.pt")
    assert step == 6
    data = load("digits", 8, 1)
    records = CollapseMonitor(model, images=12).measure(data.val.images[:12], 6)
    assert report.table(records) in printed
    rows = report.table(records).splitlines()[1:]
    assert [int(row.split()[0]) for row in rows] == [1, 2, 3]
    for row, record in zip(rows, records, strict=True):
        cells = row.split()
        shown = [
            record[name]
            for name in (
                "patch_cosine", "patch_cosine_q05", "patch_cosine_q95", "patch_abs_cosine", "head_cosine",
                "attention_entropy", "effective_rank", "residual",
            )
        ]  # fmt: skip
        assert list(map(float, cells[1:9])) == pytest.approx(shown, abs=6e-4)
    assert float(rows[2].split()[-1]) == pytest.approx(records[2]["attention_cosine"][1], abs=6e-4)
    assert "of 3 blocks have maps whose mean cosine" in printed
    assert "--monitor-every" not in printed
    with_history = image.imread(out)
    assert with_history.shape[0] > 600
    assert with_history[..., :3].std() > 0.1


def test_maps_that_can_not_be_measured_are_left_out_with_the_reason(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    load = report.load_model

    def with_layer_norm(path):
        model, *rest = load(path)
        model.blocks[2].attn.var_norm = torch.nn.LayerNorm(2)
        model.blocks[2].attn.map_norm = "layer"
        return model, *rest

    monkeypatch.setattr(report, "load_model", with_layer_norm)
    assert report.main([str(run), "--images", "4", "--out", str(tmp_path / "figure.png")]) == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed
    rows = [line.split() for line in printed.splitlines() if line.lstrip()[:1].isdigit()]
    assert [[cell == "-" for cell in row] for row in rows[:3]] == [
        [False] * 5 + [True] * 2 + [False] * 2 + [True]
    ] * 3
    assert printed.count("Attention maps were not measured: the maps of ReAttention with norm 'layer'") == 1


def test_the_figure_shows_each_measure_of_each_block_and_step(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def records(step):
        return [
            {"step": step, "block": i, "attention_cosine": torch.rand(3).tolist()}
            | dict(zip(MEASURES, torch.rand(len(MEASURES)).tolist(), strict=True))
            for i in range(3)
        ]

    first, now = records(10), records(20)
    report.draw(now, now + first, "a run", tmp_path / "figure.png")
    monkeypatch.undo()
    figure = plt.gcf()
    plt.close(figure)
    axes = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    layers, heads, patches, *over_time = axes.values()
    maps = layers.images[0]
    assert maps.get_array().tolist() == [r["attention_cosine"] for r in now]
    assert tuple(maps.get_extent()) == (0.5, 3.5, 3.5, 0.5)  # block 1 at the top
    for axis, name in ((heads, "head_cosine"), (patches, "patch_cosine")):
        assert axis.lines[0].get_xdata().tolist() == [1, 2, 3]
        assert axis.lines[0].get_ydata().tolist() == pytest.approx([r[name] for r in now])
    corners = {tuple(corner) for corner in patches.collections[0].get_paths()[0].vertices.tolist()}
    assert corners == {(i + 1.0, r[f"patch_cosine_q{q}"]) for i, r in enumerate(now) for q in ("05", "95")}
    expected = [
        lambda i, r: r["attention_cosine"][i - 1] if i else float("nan"),
        lambda i, r: r["head_cosine"],
        lambda i, r: r["patch_cosine"],
    ]
    for axis, value in zip(over_time, expected, strict=True):
        image = [[value(i, step[i]) for step in (first, now)] for i in range(3)]
        found = axis.collections[0].get_array().filled(float("nan")).reshape(3, 2).tolist()
        assert found == [pytest.approx(row, nan_ok=True) for row in image]
        assert axis.yaxis_inverted()
    subjects = ["attention maps", "heads", "patches", "maps", "heads", "patches"]
    assert [title.split(":")[0] for title in axes] == subjects


def test_a_checkpoint_alone_has_no_history(run, tmp_path, capsys):
    pytest.importorskip("sklearn")
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((run / "checkpoint.pt").read_bytes())
    assert report.main([str(path), "--images", "2"]) == 0
    assert "train with --monitor-every to see this over time" in capsys.readouterr().out
    assert image.imread(tmp_path / "report.png").shape[0] < 600


def test_a_folder_is_split_as_in_training(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    state = torch.load(run / "checkpoint.pt")
    state["recipe"]["seed"] = 5
    torch.save(state, tmp_path / "checkpoint.pt")
    given = []

    def load(*args):
        given.append(args)
        raise DataError("enough")

    monkeypatch.setattr(task, "load", load)
    assert report.main([str(tmp_path), "--data", "imagefolder:here"]) == 2
    assert given[0][:4] == ("imagefolder:here", 8, 1, 5)
    assert given[0][4].seed == 5


def test_similar_blocks_are_counted_against_the_block_before():
    rows = [[1.0, 0.95, 0.1], [0.95, 1.0, 0.3], [0.1, 0.3, 1.0]]
    assert report.similar_blocks([{"attention_cosine": row} for row in rows]) == 1


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (None, [], "there is no checkpoint"),
        (b"no checkpoint", [], "is cut or damaged, or no file of torch"),
        ({"model": {}}, [], "is no checkpoint of this trainer: it has no config, recipe, step"),
        ("run", ["--data", "cifar"], "unknown data 'cifar': give digits or imagefolder:PATH"),
        ("run", ["--device", "abacus"], "the device 'abacus' can't be used"),
    ],
)
def test_bad_arguments_get_a_sentence(content, options, sentence, run, tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    path = run if content == "run" else tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        torch.save(content, path)
    assert report.main([str(path), *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_history_of_another_run_and_a_figure_that_cannot_be_written_get_a_sentence(run, tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes((run / "checkpoint.pt").read_bytes())
    lines = (run / "collapse.csv").read_text().splitlines(keepends=True)
    history = tmp_path / "collapse.csv"
    for text, sentence in (
        ("".join(lines[:3]), "does not have every block of the 3"),
        ("".join(lines)[:-90], "is no record of CollapseMonitor"),
    ):
        history.write_text(text)
        assert report.main([str(tmp_path), "--images", "2"]) == 2
        assert sentence in capsys.readouterr().err
    history.unlink()
    for out in (tmp_path / "absent" / "figure.png", tmp_path / "figure.abacus"):
        assert report.main([str(tmp_path), "--images", "2", "--out", str(out)]) == 2
        assert f"error: {out} can't be written" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(run)]) == 2
    assert "pip install 'vitdiv-kernels[demo]'" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for option in ("RUN_OR_CHECKPOINT", "--data", "--images", "--out", "--device"):
        assert option in out
