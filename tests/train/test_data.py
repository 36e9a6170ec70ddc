"""What the trainer reads: the digits, and folders of images with their mistakes."""

import sys

import pytest
import torch

from vitdiv_kernels.train.cli import main
from vitdiv_kernels.train.data import Augment, load
from vitdiv_kernels.train.errors import DataError


@pytest.fixture
def folder(tmp_path, torchvision):
    """Two classes of ten small images."""
    write_images(tmp_path / "images")
    return tmp_path / "images"


def write_images(root, classes=("cat", "dog"), count=10):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 256, (9, 12, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")


def train(folder, out, options):
    """The command line, of a model for small images."""
    options = f"--data imagefolder:{folder} --out {out}/out --model deit_tiny --image-size 32 {options}"
    return main(options.split())


def test_digits_are_split_once_and_for_all():
    pytest.importorskip("sklearn")
    data = load("digits", 8, 1)
    parts = (data.train, data.val, data.test)
    assert [len(part) for part in parts] == [1149, 288, 360]
    assert [part.labels.bincount().min().item() for part in parts] == [111, 28, 35]
    images = torch.cat([part.images for part in parts])
    assert images.shape[1:] == (1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    again = load("digits", 8, 1)
    assert torch.equal(again.test.images, data.test.images)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(
        DataError, match=r"scikit-learn, which is absent: pip install 'vitdiv-kernels\[demo\]'"
    ):
        load("digits", 8, 1)


def test_augmentation_is_drawn_from_its_generator_alone():
    images, augment = torch.rand(5, 3, 8, 8), Augment(rotation=10, zoom=(0.8, 1.2), shift=0.1, mirror=True)
    state = torch.get_rng_state()
    a, b = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, augment(images, torch.Generator().manual_seed(4)))
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(Augment()(images, torch.Generator()), images)


def test_a_mirror_image_is_one():
    images = torch.rand(64, 1, 4, 4)
    out = Augment(mirror=True)(images, torch.Generator().manual_seed(0))
    same = (out - images).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (out - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    assert (same ^ mirrored).all()
    assert 16 < same.sum() < 48


def test_a_folder_is_split_by_the_seed(folder):
    data = load(f"imagefolder:{folder}", 8, 3)
    assert [len(part) for part in (data.train, data.val, data.test)] == [16, 2, 2]
    assert list(data.classes) == ["cat", "dog"]
    paths = [path for part in (data.train, data.val, data.test) for path, _ in part.samples]
    assert len(set(paths)) == 20
    assert load(f"imagefolder:{folder}", 8, 3).test.samples == data.test.samples
    images, labels = data.train.__getitems__([0, 15])
    assert images.shape == (2, 3, 8, 8)
    assert labels.tolist() == [0, 1]
    assert load(f"imagefolder:{folder}", 8, 1).train[0][0].shape == (1, 8, 8)


def test_given_splits_are_taken(tmp_path, torchvision):
    for name, count in (("train", 10), ("val", 3), ("test", 2)):
        write_images(tmp_path / name, count=count)
    data = load(f"imagefolder:{tmp_path}", 8, 3)
    assert [len(part) for part in (data.train, data.val, data.test)] == [20, 6, 4]


def test_a_missing_validation_split_is_held_out_and_a_missing_test_split_is_none(tmp_path, torchvision):
    write_images(tmp_path / "train")
    data = load(f"imagefolder:{tmp_path}", 8, 3)
    assert (len(data.train), len(data.val), data.test) == (18, 2, None)


def test_splits_with_different_classes_are_refused(tmp_path, torchvision):
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", ("cat", "fox"))
    with pytest.raises(DataError, match=r"train and val must have the same classes, but differ in dog, fox"):
        load(f"imagefolder:{tmp_path}", 8, 3)


@pytest.mark.parametrize(("name", "sentence"), [("nowhere", "does not exist"), ("file", "is not a folder")])
def test_what_is_no_folder_is_named(name, sentence, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"{tmp_path / name} {sentence}"):
        load(f"imagefolder:{tmp_path / name}", 8, 3)


def test_an_empty_class_is_named(folder):
    (folder / "fox").mkdir()
    with pytest.raises(DataError, match=r"the class folder .*fox has no image"):
        load(f"imagefolder:{folder}", 8, 3)


def test_one_class_is_not_enough(tmp_path, torchvision):
    write_images(tmp_path, ("cat",))
    with pytest.raises(DataError, match="one sub-folder for each class, at least two, but has 1"):
        load(f"imagefolder:{tmp_path}", 8, 3)


def test_a_class_too_small_to_split_is_named(tmp_path, torchvision):
    write_images(tmp_path, count=1)
    with pytest.raises(DataError, match=r"the class of .*cat.* has too few images to split"):
        load(f"imagefolder:{tmp_path}", 8, 3)


@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "cut short"])
def test_a_broken_image_is_named(folder, content, tmp_path, capsys):
    broken = folder / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100] if content is None else content)
    assert train(folder, tmp_path, "--batch 4 --epochs 1 --eval-every 1") == 2
    assert f"error: the image file {broken} can't be read" in capsys.readouterr().err


def test_an_image_of_16_bits_is_refused(folder, tmp_path, capsys):
    """Pillow would cut its values off at 255."""
    from PIL import Image

    deep = folder / "cat" / "0.png"
    Image.new("I;16", (8, 8), 1000).save(deep)
    assert train(folder, tmp_path, "--batch 4 --epochs 1 --eval-every 1") == 2
    assert (
        f"{deep} can't be read (its mode is I;16, but a channel must have 8 bits)" in capsys.readouterr().err
    )


@pytest.mark.parametrize("workers", ["0", "1", "2"])
def test_a_broken_image_is_one_sentence_from_any_process(workers, tmp_path, torchvision, capsys):
    for name in ("train", "val"):
        write_images(tmp_path / name, count=4)
    broken = tmp_path / "train" / "cat" / "0.png"
    broken.write_bytes(b"no picture")
    assert train(tmp_path, tmp_path, f"--batch 4 --epochs 1 --workers {workers}") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: the image file {broken} can't be read (")
    assert errors[0].endswith("): repair or remove it")


def test_torchvision_that_is_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match=r"pip install 'vitdiv-kernels\[imagefolder\]'"):
        load(f"imagefolder:{tmp_path}", 8, 3)


def test_training_on_a_folder(folder, tmp_path, capsys):
    assert train(folder, tmp_path, "--batch 8 --reattention 11 --losses diversity --epochs 1") == 0
    assert "test accuracy" in capsys.readouterr().out


def test_losses_on_a_single_patch_are_refused(folder, tmp_path, capsys):
    assert train(folder, tmp_path, "--image-size 16 --losses cosine --batch 4") == 2
    assert "diversity losses need at least two patches, but the model has one" in capsys.readouterr().err
