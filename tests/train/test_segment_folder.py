"""Folders of images and annotations, with their mistakes."""

import re

import pytest
import torch
from small_segmenter import save, write_pairs

from vitdiv_kernels.train.cli import main
from vitdiv_kernels.train.errors import DataError
from vitdiv_kernels.train.segment.augment import Ragged
from vitdiv_kernels.train.segment.folder import load_segfolder
from vitdiv_kernels.train.segment.labels import CITYSCAPES, cityscapes, counted
from vitdiv_kernels.train.segment.settings import Dense

pytest.importorskip("PIL")


def load(root, seed=0, channels=3, **options):
    return load_segfolder(root, 8, channels, seed, Dense(**options))


@pytest.fixture
def ade(tmp_path):
    """Labels 0 to 2, in ADE20K's layout."""
    root = tmp_path / "ade"
    for part, count in (("training", 5), ("validation", 2)):
        write_pairs(root / "images" / part, root / "annotations" / part, count)
    return root


def test_ade20k_is_read(ade):
    data = load(ade, num_classes=3)
    assert (len(data.train), len(data.val), data.test) == (5, 2, None)
    images, masks = data.train.__getitems__([0, 4])
    assert isinstance(images, Ragged)
    assert images[0].shape == (3, 10, 12)
    assert (images[0].min() >= -1) & (images[0].max() <= 1)
    assert masks[0][0, :6].tolist() == [0, 1, 2, 0, 1, 2]
    assert load(ade, num_classes=3, channels=1).train[0][0].shape == (1, 10, 12)


def test_zero_is_ignored_where_it_is_no_class(ade):
    data = load(ade, num_classes=2, ignore_zero=True)
    assert data.val[0][1][0, :4].tolist() == [255, 0, 1, 255]
    assert list(data.classes) == ["0", "1"]


def test_the_number_of_classes_is_read_from_the_annotations(ade):
    assert len(load(ade).classes) == 3
    assert len(load(ade, ignore_zero=True).classes) == 2


def test_names_of_classes_are_read_from_a_file(ade):
    (ade / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.2\twall\n2\t0.1\tbuilding, edifice\n")
    assert list(load(ade, ignore_zero=True).classes) == ["wall", "building"]
    (ade / "classes.txt").write_text("sky\nsea\nsand\n")
    assert list(load(ade).classes) == ["sky", "sea", "sand"]
    with pytest.raises(DataError, match="has 3 classes, but --num-classes is 4"):
        load(ade, num_classes=4)
    (ade / "classes.txt").write_text("x\n" * 255)
    with pytest.raises(DataError, match="has 255 classes: annotations of 8 bits have at most 254"):
        load(ade)


def test_one_folder_is_split_by_the_seed(tmp_path):
    write_pairs(tmp_path / "images", tmp_path / "annotations", 20, suffix=".png")
    data = load(tmp_path, num_classes=3)
    parts = (data.train, data.val, data.test)
    assert [len(part) for part in parts] == [16, 2, 2]
    assert len({pair.image for part in parts for pair in part.pairs}) == 20
    again, other = load(tmp_path, num_classes=3), load(tmp_path, seed=1, num_classes=3)
    assert again.fingerprint() == data.fingerprint()
    assert other.val.pairs != data.val.pairs


def test_cityscapes_is_found_by_its_names(tmp_path):
    for part in ("train", "val"):
        image = tmp_path / "leftImg8bit" / part / "ulm" / "ulm_000000_000019_leftImg8bit.png"
        mask = tmp_path / "gtFine" / part / "ulm" / "ulm_000000_000019_gtFine_labelIds.png"
        save(image, torch.zeros(4, 6, 3, dtype=torch.uint8))
        save(mask, torch.tensor([[0, 7, 8, 11, 33, 4]], dtype=torch.uint8).expand(4, 6).contiguous())
    with pytest.warns(
        UserWarning, match=r"of 19 classes 15 have no pixel to train on: wall, fence, .*, \.\.\.$"
    ):
        data = load(tmp_path)
    assert data.val[0][1][0].tolist() == [255, 0, 1, 2, 18, 255]
    assert list(data.classes)[:2] == ["road", "sidewalk"]
    with pytest.raises(DataError, match="leave --num-classes and --ignore-zero out"):
        load(tmp_path, num_classes=19)
    mask.unlink()
    with pytest.raises(DataError, match=r"ulm_.*_leftImg8bit.png has no annotation: expected .*_labelIds"):
        load(tmp_path)


def test_the_19_classes_of_cityscapes():
    table = cityscapes().table()
    # trainIds of label ids, as the scripts of Cityscapes list them
    pairs = "7:0 8:1 11:2 12:3 13:4 17:5 19:6 20:7 21:8 22:9 23:10 24:11 25:12 26:13 27:14 28:15 31:16"
    pairs += " 32:17 33:18"
    expected = {int(a): int(b) for a, b in (pair.split(":") for pair in pairs.split())}
    assert {i: c for i, c in enumerate(table.tolist()) if 0 <= c < 255} == expected
    assert [i for i in range(34) if table[i] == 255] == [i for i in range(34) if i not in expected]
    assert (table[34:255] == -1).all()
    assert len(CITYSCAPES) == 19


def test_numbers_beside_the_classes_are_out_of_range():
    assert counted("abc", False).table().tolist() == [0, 1, 2, *[-1] * 252, 255]
    assert counted("abc", True).table().tolist() == [255, 0, 1, 2, *[-1] * 251, 255]


def lay(root, name, image, mask):
    """Puts a pair in place of the first to train on: an image of PIL, and numbers."""
    save(root / "annotations/training/0.png", mask)
    (root / "images/training/0.jpg").unlink()
    image.save(root / "images/training" / name)


@pytest.mark.parametrize(("turn", "method"), [(3, "ROTATE_180"), (6, "ROTATE_270"), (5, "TRANSPOSE")])
def test_an_image_is_turned_as_its_exif_says(ade, turn, method):
    """Its annotation is of what viewers show."""
    from PIL import Image

    pixels = torch.randint(0, 256, (10, 12, 3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    image.getexif()[0x0112] = turn
    shown = torch.tensor(list(image.transpose(getattr(Image.Transpose, method)).tobytes()))
    size = (10, 12) if turn == 3 else (12, 10)
    mask = torch.zeros(size, dtype=torch.uint8)
    lay(ade, "0.png", image, mask)
    Image.open(ade / "images/training/0.png").save(ade / "images/training/0.png", exif=image.getexif())
    found = load(ade, num_classes=3).train[0][0]
    torch.testing.assert_close((found.permute(1, 2, 0) + 1) * 127.5, shown.view(*size, 3).float())
    if turn != 3:
        save(ade / "annotations/training/0.png", mask.mT.contiguous())
        with pytest.raises(DataError, match=r"12 x 10 pixels: expected 10 x 12, .* turned as its EXIF says"):
            load(ade, num_classes=3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_images_of_other_modes_have_the_channels_of_the_model(ade, mode):
    from PIL import Image

    grey = torch.full((10, 12, 3), 51, dtype=torch.uint8)
    image = Image.fromarray(grey.numpy()).convert(mode)
    lay(ade, "0.png", image, torch.zeros(10, 12, dtype=torch.uint8))
    for channels in (1, 3):
        found = load(ade, num_classes=3, channels=channels).train[0][0]
        torch.testing.assert_close(found, torch.full((channels, 10, 12), -0.6), atol=0.02, rtol=0)


def test_images_of_16_bits_keep_their_upper_half(ade):
    from PIL import Image

    image = Image.fromarray(torch.full((10, 12), 51 * 256).numpy().astype("uint16"))
    lay(ade, "0.png", image, torch.zeros(10, 12, dtype=torch.uint8))
    torch.testing.assert_close(load(ade, num_classes=3).train[0][0], torch.full((3, 10, 12), -0.6))


def test_suffixes_in_capitals_and_hidden_files(ade):
    expected = load(ade, num_classes=3).train[0]
    (ade / "images/training/0.jpg").rename(ade / "images/training/0.JPG")
    (ade / "annotations/training/0.png").rename(ade / "annotations/training/0.PNG")
    (ade / "images/training/._1.jpg").write_bytes(b"of a Mac")
    data = load(ade, num_classes=3)
    assert len(data.train) == 5
    for found, wanted in zip(data.train[0], expected, strict=True):
        assert torch.equal(found, wanted)


def test_parts_may_have_other_names_in_annotations(ade):
    (ade / "annotations/training").rename(ade / "annotations/train")
    assert len(load(ade, num_classes=3).train) == 5
    (ade / "annotations/train").rename(ade / "annotations/all")
    with pytest.raises(DataError, match="has no folder training or train in images and annotations, but val"):
        load(ade)
    (ade / "annotations/validation").rename(ade / "annotations/more")
    with pytest.raises(
        DataError, match="has no folder training or train in images and annotations, but none"
    ):
        load(ade)


@pytest.mark.parametrize("part", ["training", "validation"])
def test_annotations_without_any_class_are_refused(ade, part):
    folder = ade / "annotations" / part
    for path in folder.iterdir():
        save(path, torch.tensor([[255, 0]], dtype=torch.uint8).repeat(10, 6))
    with pytest.raises(DataError, match=rf"no pixel has a class in the \d annotations such as {folder}/"):
        load(ade, num_classes=2, ignore_zero=True)


def test_classes_without_a_pixel_to_train_on_are_told(ade):
    """Such as the 255 of masks that are black and white."""
    for path in ade.glob("annotations/*/*"):
        save(path, torch.tensor([[255, 0]], dtype=torch.uint8).repeat(10, 6))
    with pytest.warns(UserWarning, match="of 2 classes 1 have no pixel to train on: 1$"):
        load(ade, num_classes=2)
    with pytest.raises(
        DataError, match=r"are 0 \(255 is ignored\): expected at least two classes, from 0 on"
    ):
        load(ade)


def damage(root, what):
    image = root / "images/training/3.jpg"
    mask = root / "annotations/training/3.png"
    if what == "missing":
        mask.unlink()
    elif what == "size":
        save(mask, torch.zeros(10, 13, dtype=torch.uint8))
    elif what == "colours":
        save(mask, torch.zeros(10, 12, 3, dtype=torch.uint8))
    elif what == "text":
        mask.write_text("no picture")
    elif what == "broken image":
        image.write_bytes(b"")
    elif what == "empty":
        for path in image.parent.iterdir():
            path.unlink()
    elif what == "no validation":
        (root / "images/validation").rename(root / "images/others")
    elif what == "no annotations":
        (root / "annotations").rename(root / "labels")
    return image, mask


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("missing", "the image {image} has no annotation: expected the file {mask}"),
        ("size", "the annotation {mask} has 13 x 10 pixels: expected 12 x 10, as its image {image} has"),
        ("colours", "the annotation {mask} is of mode RGB (Pillow's name): expected 8 bits and one channel"),
        ("text", "the annotation file {mask} can't be read"),
        ("broken image", "the image file {image} can't be read"),
        ("empty", "the folder {image.parent} has no image (looked for * with .jpg, .jpeg, .png)"),
        ("no validation", "{root} has no folder validation or val in images and annotations, but train"),
        ("no annotations", "{root} has no folder annotations: expected images and annotations"),
    ],
)
def test_what_is_wrong_is_named_before_the_first_step(ade, what, sentence, tmp_path, capsys):
    image, mask = damage(ade, what)
    assert train(ade, tmp_path / "run") == 2
    assert sentence.format(image=image, mask=mask, root=ade) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def train(root, out, options="--num-classes 3"):
    options = (
        f"--task segment --data segfolder:{root} --out {out} --model deit_tiny --image-size 32 {options}"
    )
    return main([*options.split(), *["--task", "segment", "--steps", "1", "--batch", "5", "--pictures", "0"]])


@pytest.mark.parametrize("place", ["training/3.png", "validation/1.png"])
def test_a_label_out_of_range_is_named_before_the_first_step(ade, place, tmp_path, capsys):
    mask = ade / "annotations" / place
    numbers = torch.zeros(10, 12, dtype=torch.uint8)
    numbers[4, 5:7] = 77
    save(mask, numbers)
    assert train(ade, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert f"the annotation {mask} has the label 77 (2 pixels, the first at row 4, column 5)" in error
    assert "expected 0 to 2, or 255 to ignore a pixel" in error
    assert not (tmp_path / "run").exists()


def test_a_palette_holds_numbers_of_classes(ade):
    from PIL import Image

    path = ade / "annotations/training/0.png"
    picture = Image.new("P", (12, 10), 2)
    picture.putpalette([0, 0, 0, 9, 9, 9, 200, 0, 0])
    picture.save(path)
    assert (load(ade, num_classes=3).train[0][1] == 2).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data", "segfolder:/no/such/folder"], "/no/such/folder does not exist"),
        (["--data", "digits"], "unknown data 'digits' to segment: give scenes or segfolder:PATH"),
        (["--model", "deit_tiny"], "the scenes are 1x32x32 images but the model takes 3x224x224"),
        (
            ["--losses", "gong2021"],
            "the loss gong2021.mixing (patch_mixing) labels the patches of whole",
        ),
        (["--losses", "patch_mixing"], "the loss patch_mixing (patch_mixing) labels the patches"),
        (["--cutmix", "1"], "mixup, cutmix and two_image_mixing must be off for --task segment"),
        (["--head-width", "8"], "--head-width is of --head upernet"),
        (["--ignore-zero"], "--num-classes and --ignore-zero are for a segfolder"),
        (["--set", "augmentation=timm"], "augmentation must be 'light' for --task segment"),
        (["--stride", "40"], "--stride must be at most the window (32), or pixels are left out, got 40"),
    ],
)
def test_bad_arguments_get_a_sentence(options, sentence, tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert main(["--task", "segment", "--out", str(tmp_path / "run"), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--head upernet", "--head must be left out: they are of --task segment"),
        ("--window 4 --stride 2", "--window, --stride must be left out"),
        (
            "--recipe scenes",
            "unknown data 'scenes': give digits or imagefolder:PATH (scenes and segfolder:PATH",
        ),
        ("--pictures 2", "--pictures shows what --task segment predicts"),
    ],
)
def test_options_of_another_task_are_refused(options, sentence, tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert main(["--out", str(tmp_path / "run"), *options.split()]) == 2
    assert re.search(re.escape(sentence), capsys.readouterr().err)
