"""Recipe files: what they hold, what is refused and how, and how values are overridden."""

import json
import re
from dataclasses import fields, replace

import pytest

from vitdiv_kernels import recipes
from vitdiv_kernels.recipes import Recipe
from vitdiv_kernels.train.loss_weights import DIVERSITY, objective_terms
from vitdiv_kernels.vit import CONFIGS

NAMES = ["deepvit_32b", "deit_small", "digits", "diverse_vit_deit_small", "gong2021", "plain", "scenes"]
SMALL = {
    "title": "t", "source": "s", "model": "digits24", "image_size": 8, "steps": 3, "batch": 4, "lr": 0.1,
    "weight_decay": 0, "warmup": 0.1,
}  # fmt: skip


def written(folder, **changes):
    content = {key: value for key, value in (SMALL | changes).items() if value is not ...}
    path = folder / "mine.json"
    path.write_text(json.dumps(content))
    return path


def test_the_recipes_are_there():
    assert recipes.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_the_package(name):
    recipe = recipes.load(name)
    assert recipe.title
    assert recipe.source
    assert recipe.model in CONFIGS
    assert recipes.parse(json.loads(json.dumps(recipe.as_dict()))) == recipe
    assert recipes.override(recipe, []) == recipe
    if name not in ("digits", "plain", "scenes"):
        assert re.search(r"github\.com/\S+, commit [0-9a-f]{7}", recipe.source)
        assert re.search(r"arXiv \d{4}\.\d{5}", recipe.title)


def test_facts_of_the_released_code():
    """Those that one would not expect, each by hand from there."""
    gong, deepvit = recipes.load("gong2021"), recipes.load("deepvit_32b")
    diverse, deit = recipes.load("diverse_vit_deit_small"), recipes.load("deit_small")
    assert (gong.mixup, gong.cutmix, gong.repeats, gong.drop_path, gong.min_lr) == (0, 1, 1, 0.5, 1e-7)
    assert (deepvit.mixup, deepvit.cutmix, deepvit.drop_path, deepvit.cooldown_epochs) == (0.1, 0, 0.2, 10)
    assert deepvit.learning_rate == 5e-4
    assert deit.learning_rate == diverse.learning_rate == 1e-3
    assert replace(deit, batch=256).learning_rate == 2.5e-4
    assert {r.ema for r in (gong, deepvit, diverse, deit)} == {0.99996}
    # what Diverse-ViT changes of DeiT is its losses
    same = {part.name for part in fields(Recipe)} - {"title", "source", "notes", "results", "losses"}
    assert {n for n in same if getattr(deit, n) != getattr(diverse, n)} == {"color_jitter"}


def test_digits_is_what_the_trainer_does():
    recipe, plain = recipes.load("digits"), recipes.load("plain")
    same = {part.name for part in fields(Recipe)} - {"title", "source", "notes", "losses", "image_size"}
    assert {n for n in same if getattr(recipe, n) != getattr(plain, n)} == set()
    assert (plain.steps, plain.batch, plain.learning_rate, plain.warmup) == (1200, 32, 1e-3, 0.1)
    assert (plain.betas, plain.clip, plain.label_smoothing, plain.losses) == ((0.9, 0.99), 1, 0.1, {})
    assert recipe.image_size == CONFIGS[recipe.model].image_size
    terms, expected = recipe.terms(), objective_terms(DIVERSITY)
    assert {n: (t.loss, t.weight, t.layers, t.options) for n, t in terms.items()} == {
        n: (t.loss, t.weight, t.layers, t.options) for n, t in expected.items()
    }


def test_a_file_of_ones_own(tmp_path, monkeypatch):
    path = written(tmp_path, losses={"mine": {"loss": "koleo", "weight": 1}}, clip=1, betas=[0.8, 0.9])
    recipe = recipes.load(path)
    assert recipes.load(str(path)) == recipe
    assert recipe.betas == (0.8, 0.9)
    assert recipe.terms()["mine"].layers == (-1,)
    monkeypatch.chdir(tmp_path)
    assert recipes.load("mine.json") == recipe
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors begin a file
    assert recipes.load(path) == recipe


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 0.1}, "has the unknown key 'learning_rate': the keys are title, source"),
        (
            {"lr": ...},
            "lacks lr: a recipe must have title, source, model, batch, lr, weight_decay",
        ),
        ({"lr": "0.1"}, "lr must be a number of at least 0, got '0.1'"),
        ({"lr": -1}, "lr must be a number of at least 0, got -1"),
        ({"lr": True}, "lr must be a number of at least 0, got True"),
        ({"lr": None}, "lr must be a number of at least 0, got None"),
        ({"batch": 4.5}, "batch must be a whole number of at least 1, got 4.5"),
        ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"drop_path": 1}, "drop_path must be a number from 0 to 0.99 or null, got 1"),
        ({"mixup": 2000}, "mixup must be a number from 0 to 1000, got 2000"),
        ({"two_image_mixing": 1}, "two_image_mixing must be true or false or null, got 1"),
        ({"reattention": [0.5]}, "reattention must be a list of whole numbers or 'all' or 'none' or null"),
        ({"reattention": "some"}, "reattention must be a list of whole numbers or 'all' or 'none' or null"),
        ({"amp": "float16"}, "amp must be 'fp16' or 'bf16' or null, got 'float16'"),
        ({"model": None}, "model must be a text, got None"),
        ({"notes": "one"}, "notes must be a list of texts, got 'one'"),
        ({"betas": [0.9]}, r"betas must be two numbers of at least 0 and below 1, got \[0.9\]"),
        ({"betas": [0.9, 2]}, r"betas must be two numbers of at least 0 and below 1, got \[0.9, 2\]"),
        ({"betas": [0.9, 1]}, r"betas must be two numbers of at least 0 and below 1, got \[0.9, 1\]"),
        ({"betas": 0.9}, "betas must be a list of numbers, got 0.9"),
        (
            {"random_crop": [1, 0.5]},
            r"random_crop must be the smallest and the largest share.* got \[1, 0.5\]",
        ),
        ({"random_crop": ["a", 1]}, "random_crop must be a list of numbers from 0 to 1 or null"),
        ({"mean": [0.5]}, "mean and std must be given together, for as many channels"),
        ({"mean": [0.5], "std": [1, 1]}, "mean and std must be given together, for as many channels"),
        ({"std": [0.0], "mean": [0.5]}, "std must be a list of numbers of at least 1e-06 or null"),
        ({"epochs": 3}, "steps or epochs must be given, one of the two, got steps 3 and epochs 3"),
        ({"steps": None}, "steps or epochs must be given, one of the two, got steps None and epochs None"),
        ({"warmup_epochs": 3}, "warmup_epochs or warmup must be given, one of the two"),
        (
            {"two_image_mixing": True, "losses": {"a": {"loss": "patch_mixing"}}},
            "two_image_mixing must be false with the loss patch_mixing, got true",
        ),
        (
            {"two_image_mixing": False, "losses": {"a": {"loss": "region_mixing"}}},
            "two_image_mixing must be true with the loss region_mixing, got false",
        ),
        ({"losses": ["koleo"]}, r"losses must be names and their losses, got \['koleo'\]"),
        ({"losses": {"a": 0.5}}, "losses.a must have the key 'loss', one of pairwise_cosine"),
        ({"losses": {"a": {"weight": 1}}}, "losses.a must have the key 'loss', one of pairwise_cosine"),
        ({"losses": {"a": {"loss": "kolea"}}}, "losses.a: unknown loss 'kolea'"),
        ({"losses": {"a": {"loss": ["koleo"]}}}, r"losses.a.loss must be a text, got \['koleo'\]"),
        (
            {"losses": {"a": {"loss": "koleo", "wieght": 1}}},
            "losses.a has no key 'wieght': its keys are loss",
        ),
        (
            {"losses": {"a": {"loss": "koleo", "weight": "1"}}},
            "losses.a: the weight of koleo must be a number",
        ),
        ({"losses": {"a": {"loss": "koleo", "layers": ["last"]}}}, "losses.a: layers of koleo must be"),
        ({"losses": {"a": {"loss": "koleo", "layers": [0.5]}}}, "losses.a: layers of koleo must be"),
        (
            {"losses": {"a": {"loss": "koleo", "options": [1]}}},
            r"losses.a.options must be names and values, got",
        ),
        ({"losses": {"a": {"loss": "koleo", "options": {"x": 1}}}}, "losses.a: koleo has no option 'x'"),
        (
            {"losses": {"a": {"loss": "koleo", "with_task": 1}}},
            "losses.a: with_task of koleo must be True or False, got 1",
        ),
        (
            {"losses": {"a": {"loss": "koleo", "with_task": True}}},
            "losses.a: with_task must be False but for",
        ),
    ],
)
def test_wrong_keys_and_values_get_a_sentence(changes, sentence, tmp_path):
    path = written(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:? {sentence}"):
        recipes.load(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "must be JSON: Expecting value in line 1, column 1"),
        (b'{"lr": 1,\n "batch" 2}', "must be JSON: Expecting ':' delimiter in line 2"),
        (b"\xff\xfe", "must be a text in UTF-8: invalid start byte at byte 0"),
        (b"[1, 2]", r"must hold an object with the keys of a recipe, got \[1, 2\]"),
        (b'{"lr": 1, "lr": 2}', "the key 'lr' is there twice: 1 and 2"),
        (b'{"lr": NaN}', "numbers must be finite, got NaN"),
        (b'{"lr": 1e999}', "lacks title"),
        (b"[" * 200000, "must be a recipe, got lists or objects within each other"),
        (b"lr = 0.1", "must be JSON: Expecting value"),
    ],
    ids=range(9),
)
def test_files_that_are_none_get_a_sentence(content, sentence, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:? {sentence}"):
        recipes.load(path)


def test_numbers_without_end_are_refused(tmp_path):
    path = written(tmp_path)
    text = path.read_text()
    for number, shown in (("1e999", "inf"), ("1" + 400 * "0", "1000")):
        path.write_text(text.replace('"lr": 0.1', f'"lr": {number}'))
        with pytest.raises(ValueError, match=f"lr must be a number of at least 0, got {shown}"):
            recipes.load(path)


def test_names_and_paths_that_are_not_there_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"there is no recipe 'deit': give one of deepvit_32b, .*mine.json"):
        recipes.load("deit")
    with pytest.raises(ValueError, match=r"/gone.json can't be read: No such file or directory"):
        recipes.load(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="can't be read: Is a directory"):
        recipes.load(tmp_path)


def test_what_python_makes_is_checked_like_a_file():
    with pytest.raises(TypeError, match="name_or_path must be a name or a path, got int"):
        recipes.load(5)
    with pytest.raises(ValueError, match=r"^batch must be a whole number of at least 1, got 0$"):
        Recipe(**SMALL | {"batch": 0})
    with pytest.raises(ValueError, match=r"^betas must be two numbers of at least 0 and below 1, got \["):
        replace(recipes.load("plain"), betas=(1.0, 0.9))


def test_settings_that_belong_together_come_in_any_order():
    recipe = recipes.load("deit_small")
    for settings in (["mean=null", "std=null"], ["std=null", "lr=1e-4", "mean=null"]):
        assert recipes.override(recipe, settings).std is None
    with pytest.raises(ValueError, match=r"^--set mean=null: mean and std must be given together"):
        recipes.override(recipe, ["mean=null", "lr=1e-4"])


def test_values_are_overridden():
    recipe = recipes.load("diverse_vit_deit_small")
    settings = ["lr=1e-4", "batch=64", "auto_augment=null", "losses.cosine.weight=0.1", "losses.heads=null"]
    settings += ["interpolation=bilinear", "losses.mixing.options.smoothing=0.2", "steps=10", "warmup=0.5"]
    changed = recipes.override(recipe, settings)
    assert changed.learning_rate == 1e-4 * 64 / 512
    assert (changed.auto_augment, changed.interpolation) == (None, "bilinear")
    assert (changed.steps, changed.epochs, changed.warmup, changed.warmup_epochs) == (10, None, 0.5, None)
    terms = changed.terms()
    assert terms["cosine"].weight == 0.1
    assert terms["mixing"].options == {"smoothing": 0.2}
    assert "heads" not in terms
    assert recipe == recipes.load("diverse_vit_deit_small")
    added = recipes.override(recipe, ['losses.mine={"loss": "koleo", "weight": 0.1}'])
    assert added.terms()["mine"].weight == 0.1


def test_an_option_of_a_loss_that_has_none_yet():
    changed = recipes.override(
        recipes.load("diverse_vit_deit_small"), ["losses.heads.options.include_self=false"]
    )
    assert changed.terms()["heads"].options == {"include_self": False}
    assert changed.terms()["heads"].weight == 1e-4


@pytest.mark.parametrize(
    ("text", "value"), [(".5", 0.5), ("5.", 5.0), ("+1", 1), ("1e-3", 1e-3), ("1_0", 10), ("0x1", None)]
)
def test_numbers_as_python_writes_them(text, value):
    if value is None:
        with pytest.raises(ValueError, match="lr must be a number"):
            recipes.override(recipes.load("plain"), [f"lr={text}"])
        return
    found = recipes.override(recipes.load("plain"), [f"lr={text}"]).lr
    assert (found, type(found)) == (value, type(value))


def test_texts_that_are_numbers_stay_texts():
    changed = recipes.override(recipes.load("plain"), ["title=2021", "weights=7", "data=.5"])
    assert (changed.title, changed.weights, changed.data) == ("2021", "7", ".5")
    assert recipes.override(changed, ["weights=null"]).weights is None


def test_keys_without_effect_beside_light_augmentation_are_refused():
    for setting in ("hflip=0.5", "auto_augment=rand-m9", "erase_probability=0.25", "test_crop=0.9"):
        key = setting.partition("=")[0]
        sentence = (
            f"^--set {setting}: {key} has no effect with augmentation light: add --set augmentation=timm"
        )
        with pytest.raises(ValueError, match=sentence):
            recipes.override(recipes.load("plain"), [setting])
        changed = recipes.override(recipes.load("plain"), [setting, "augmentation=timm"])
        assert getattr(changed, key) != getattr(recipes.load("plain"), key)
    # a recipe of a paper without timm
    light = recipes.override(recipes.load("deit_small"), ["augmentation=light"])
    assert recipes.parse(light.as_dict()) == light


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("lr", "--set lr: must be key=value, such as lr=1e-4"),
        ("=3", "--set =3: must be key=value"),
        ("lr=fast", "--set lr=fast: lr must be a number of at least 0, got 'fast'"),
        ("lr=NaN", "--set lr=NaN: lr must be a number of at least 0, got 'NaN'"),
        ("learning=1", "--set learning=1 has the unknown key 'learning'"),
        ("lr.x=1", "--set lr.x=1: there is no 'lr' to set a key of"),
        (
            "losses.gone.weight=1",
            "--set losses.gone.weight=1: the recipe has no loss 'gone' but cosine, contrast, heads, weights, "
            'mixing: add one by losses.gone={"loss": "koleo"}',
        ),
        ("losses.gone=null", "--set losses.gone=null: the recipe has no loss 'gone' but cosine"),
        ("losses.heads.option.x=1", "--set losses.heads.option.x=1: there is no 'option' to set a key of"),
        ("losses.heads.options.x=1", "--set losses.heads.options.x=1: losses.heads: attention_diversity has"),
        ('losses={"a": 1, "a": 2}', """--set losses={"a": 1, "a": 2}: the key 'a' is there twice: 1 and 2"""),
        ("losses=" + "[" * 50000, "--set losses=[[["),
        ("betas=[0.9,NaN]", "--set betas=[0.9,NaN]: numbers must be finite, got NaN"),
        ("seed=4294967296", "--set seed=4294967296: seed must be a whole number from 0 to 4294967295, got"),
        ("image_size=16385", "--set image_size=16385: image_size must be a whole number from 1 to 16384 or"),
        ("epochs=9007199254740993", "--set epochs=9007199254740993: epochs must be a whole number of at"),
        ("lr_images=1" + 400 * "0", "--set lr_images=1000"),
        ("repeats=1001", "--set repeats=1001: repeats must be a whole number from 1 to 1000, got 1001"),
        ("erase_count=1001", "--set erase_count=1001: erase_count must be a whole number from 1 to 1000"),
        ("losses.cosine.wieght=1", "--set losses.cosine.wieght=1: losses.cosine has no key 'wieght'"),
        ("epochs=null", "--set epochs=null: steps or epochs must be given"),
    ],
)
def test_settings_that_are_none_get_a_sentence(setting, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        recipes.override(recipes.load("diverse_vit_deit_small"), [setting])
