"""Real data: every kind of source gives the same arrays, what is wrong is named, and the reference is never reused."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.data.real_data import DataSettings, RealData, ledger_order, load_real_data, split_reference
from tests.damage import damaged


def picture(seed: int, mode: str = "L", size: tuple[int, int] = (9, 6)) -> Image.Image:
    """Noise, ``size`` (width, height)."""
    shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def save(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def load(source: Path | str, **settings: object) -> RealData:
    return load_real_data(DataSettings.model_validate({"source": str(source), **settings}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three grey images, written in no order."""
    for index in (4, 1, 5, 0, 3, 2):
        save(tmp_path / "folder" / ("zebra" if index > 2 else "ant") / f"{index}.png", picture(index))
    return tmp_path / "folder"


@pytest.fixture
def table() -> datasets.Dataset:
    """Three images with a class, a word and a number each."""
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "class": datasets.ClassLabel(names=["no", "yes"]),
            "word": datasets.Value("string"),
            "number": datasets.Value("int64"),
        }
    )
    rows = {
        "photo": [picture(index, "RGB") for index in range(3)],
        "class": [1, 0, 1],
        "word": ["pear", "apple", "pear"],
        "number": [1, -1, 1],
    }
    return datasets.Dataset.from_dict(rows, features)


def test_digits_cover_all_grey_levels() -> None:
    data, source = load("digits"), load_digits()
    assert data.images.shape == (1797, 8, 8, 1)
    assert data.images.dtype == np.uint8
    np.testing.assert_allclose(data.images[..., 0] / 255 * 16, source.images, atol=0.5 / 255 * 16 + 1e-9)
    assert data.images.max() == 255
    np.testing.assert_array_equal(data.labels, source.target)


def test_a_folder_of_classes_keeps_every_pixel_and_nothing_is_written_into_it(folder: Path) -> None:
    (folder / "notes.txt").write_text("not an image")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    data = load(folder)
    np.testing.assert_array_equal(data.images[..., 0], [np.asarray(picture(index)) for index in range(6)])
    assert data.images.shape == (6, 6, 9, 1)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.labels.dtype == np.int64
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_relative_directory_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert load("folder").sha256 == load(folder).sha256


def test_classes_are_directories_whatever_they_and_their_files_are_called(tmp_path: Path) -> None:
    names = ["airplane", "car", "test", "train", "val-1", "über uns", os.fsdecode(b"caf\xe9")]
    for number, name in enumerate(names):
        for file in ("train_00.PNG", "other_00.png", "validation.jpeg"):
            save(tmp_path / name / file, Image.new("L", (4, 4), 30 * number))
    data = load(tmp_path)
    assert data.labels is not None
    assert data.labels.tolist() == [number for number in range(7) for _ in range(3)]
    for number, name in enumerate(sorted(names)):
        shade = 30 * names.index(name)
        assert np.abs(data.images[data.labels == number].astype(int) - shade).max() <= 1
    assert list(data.classes) == ["airplane", "caf\ufffd", "car", "test", "train", "val-1", "über uns"]
    "".join(data.describe()).encode()


def test_links_are_followed_and_loops_end(folder: Path, tmp_path: Path) -> None:
    expected = load(folder).sha256
    (folder / "zebra").rename(tmp_path / "elsewhere")
    (folder / "zebra").symlink_to(tmp_path / "elsewhere")
    (folder / "ant" / "0.png").rename(tmp_path / "0.png")
    (folder / "ant" / "0.png").symlink_to(tmp_path / "0.png")
    (folder / "ant" / "up").symlink_to(folder)
    (folder / "ant" / "here").symlink_to(".")
    data = load(folder)
    assert data.sha256 == expected
    assert list(data.left_out) == ["ant/here", "ant/up"]


def test_what_is_no_image_is_left_out_and_said(folder: Path) -> None:
    expected = load(folder).sha256
    for name in ("README.txt", "ant/Thumbs.db", "zebra/metadata.csv", ".DS_Store", "ant/._0.png", ".hidden/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"P5 no image")
    (folder / "empty").mkdir()
    (folder / "zebra" / "3.png").rename(folder / "zebra" / "3.PnG")
    data = load(folder)
    assert data.sha256 == expected
    assert data.describe() == [
        "6 images, 6×9, grey, 2 classes: ant 3, zebra 3",
        "left out, as no images: README.txt, ant/Thumbs.db, empty, zebra/metadata.csv",
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: save(root / "stray.png", picture(0)),
            r"folder/stray\.png lies beside the directories",
        ),
        (lambda root: save(root / "ant" / "old" / "1.png", picture(0)), r"ant/old is a directory of images inside of"),
        (lambda root: save(root / "Ant" / "1.png", picture(0)), "the classes Ant and ant differ in case only"),
        (lambda root: (root / "cat").symlink_to("ant"), "(cat and .*ant|ant and .*cat) are one directory"),
        (lambda root: (root / "cat").symlink_to("gone"), r"folder/cat cannot be read \(No such file"),
        (lambda root: os.mkfifo(root / "ant" / "pipe.png"), r"ant/pipe\.png is no regular file"),
        (lambda root: (root / "ant" / "a\x1b[2J.png").write_bytes(b""), r"a\ufffd\[2J\.png cannot be read"),
        (lambda root: (root / "ant" / "new.heic").write_bytes(b"new"), r"ant/new\.heic cannot be read as an 8-bit"),
        (lambda root: (root / "ant" / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0"), r"ant/a\.png cannot be read"),
    ],
)
def test_what_does_not_fit_is_named(spoil: Callable[[Path], object], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(error.value).isprintable()


def test_directories_of_classes_are_splits(tmp_path: Path) -> None:
    for split, shade in (("train", 10), ("held", 20)):
        for name in ("a", "b"):
            save(tmp_path / split / name / "0.png", Image.new("L", (2, 2), shade))
    for split, shade in (("train", 10), ("held", 20)):
        data = load(tmp_path, split=split)
        assert (data.images == shade).all()
        assert (list(data.classes), data.labels is not None and data.labels.tolist()) == (["a", "b"], [0, 1])
    with pytest.raises(ValueError, match=r"classes \(held, train\) and none is called test: set data.split"):
        load(tmp_path, split="test")


def test_neither_a_picture_nor_a_name_with_a_slip_is_a_directory(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.png is a file: name the directory that holds the images"):
        load(next(folder.rglob("0.png")))
    with pytest.raises(ValueError, match="there is no directory 'my-imags' here"):
        load_real_data(DataSettings(source="my-imags"))


@pytest.mark.parametrize("column", ["image_column", "label_column"])
def test_a_directory_has_no_columns(column: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"{column}: .* is a directory of images, whose labels are its directories"):
        load(folder, **{column: "name"})


def test_a_folder_without_classes_has_no_labels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(0))
    data = load(tmp_path)
    assert (data.labels, len(data.images)) == (None, 1)


def test_a_split_can_be_part_of_one_but_not_nothing(folder: Path) -> None:
    np.testing.assert_array_equal(load(folder, split="train[1:3]").images, load(folder).images[1:3])
    with pytest.raises(ValueError, match=r"folder holds no images of split train\[:0\]"):
        load(folder, split="train[:0]")


def test_one_coloured_image_makes_all_of_them_rgb(folder: Path) -> None:
    save(folder / "zebra" / "colour.png", picture(9, "RGB"))
    images = load(folder).images
    assert images.shape == (7, 6, 9, 3)
    np.testing.assert_array_equal(images[0], np.asarray(picture(0))[..., None].repeat(3, 2))
    np.testing.assert_array_equal(images[6], np.asarray(picture(9, "RGB")))


@pytest.mark.parametrize(("mode", "suffix", "channels"), [("1", "png", 1), ("P", "gif", 3), ("CMYK", "tiff", 3)])
def test_modes_of_pillow_become_grey_or_rgb(mode: str, suffix: str, channels: int, tmp_path: Path) -> None:
    shown = save(tmp_path / f"a.{suffix}", picture(0, "RGB").convert(mode))
    images = load(tmp_path).images
    np.testing.assert_array_equal(images[0], np.asarray(Image.open(shown).convert("RGB"))[..., :channels])


RED, HALF = (255, 0, 0, 0), (0, 0, 200, 128)


@pytest.mark.parametrize(
    ("make", "white", "green"),
    [
        (lambda: Image.new("RGBA", (2, 2), RED), [255, 255, 255], [0, 128, 0]),
        (lambda: Image.new("RGBA", (2, 2), HALF), [127, 127, 227], [0, 64, 100]),
        (lambda: Image.new("LA", (2, 2), (0, 0)), [255], [0, 128, 0]),
        (lambda: Image.new("LA", (2, 2), (100, 255)), [100], [100, 100, 100]),
        (lambda: Image.new("RGBA", (2, 2), RED).quantize(4), [255, 255, 255], [0, 128, 0]),
    ],
    ids=["RGBA", "half", "LA", "opaque", "palette"],
)
def test_what_is_transparent_shows_the_background(
    make: Callable[[], Image.Image], white: list[int], green: list[int], tmp_path: Path
) -> None:
    save(tmp_path / "folder" / "a.png", make())
    datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "folder" / "a.png")]}, datasets.Features({"image": datasets.Image()})
    ).save_to_disk(tmp_path / "table")
    for source in (tmp_path / "folder", tmp_path / "table"):
        np.testing.assert_allclose(load(source).images[0, 0, 0], white, atol=1)
        np.testing.assert_allclose(load(source, background="#008000").images[0, 0, 0], green, atol=1)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_one_transparent_colour_shows_the_background(mode: str, tmp_path: Path) -> None:
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), {"L": 90, "RGB": (90, 90, 90), "P": 1, "1": 1}[mode])
    image.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert (load(tmp_path).images[0, 0, 0] == 255).all()
    assert (load(tmp_path, background="black").images[0, 0, 0] == 0).all()


def test_an_unknown_background_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown color specifier: 'blueish'"):
        load("digits", background="blueish")


def test_pictures_are_upright_and_of_animations_the_first(tmp_path: Path) -> None:
    turned = Image.new("RGB", (4, 2), "white")
    turned.putpixel((0, 0), (0, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter to the right
    turned.save(tmp_path / "a.png", exif=exif)
    images = load(tmp_path).images
    assert images.shape == (1, 4, 2, 3)
    assert np.argwhere(images[0, ..., 0] == 0).tolist() == [[0, 1]]
    (tmp_path / "a.png").unlink()
    frames = [Image.new("L", (4, 4), shade) for shade in (30, 200)]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    assert (load(tmp_path).images == 30).all()


def test_sizes_that_differ_need_image_size(tmp_path: Path) -> None:
    # White in the middle square, black beside it: only a crop to that square leaves next to no black.
    wide, tall = Image.new("L", (20, 8)), Image.new("L", (8, 30))
    wide.paste(255, (6, 0, 14, 8))
    tall.paste(255, (0, 11, 8, 19))
    save(tmp_path / "wide.png", wide)
    save(tmp_path / "tall.png", tall)
    with pytest.raises(ValueError, match=r"\(8, 30\) and \(20, 8\); set data.image_size"):
        load(tmp_path)
    images = load(tmp_path, image_size=4).images
    assert images.shape == (2, 4, 4, 1)
    assert images.min() > 230  # the filter sees a little beyond the edge


def test_reducing_does_not_alias(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (32, 16))
    save(tmp_path / "stripes.png", Image.fromarray(stripes))
    assert np.abs(load(tmp_path, image_size=8).images.astype(int) - 127.5).max() < 20


def test_what_save_to_disk_wrote_is_read(table: datasets.Dataset, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "table")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "splits")
    files = sorted(tmp_path.rglob("*"))
    data, test = load(tmp_path / "table"), load(tmp_path / "splits", split="test")
    np.testing.assert_array_equal(data.images, [np.asarray(picture(index, "RGB")) for index in range(3)])
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(test.images, data.images[1:2])
    assert sorted(tmp_path.rglob("*")) == files
    with pytest.raises(ValueError, match="no images of split nowhere"):
        load(tmp_path / "splits", split="nowhere")


def test_any_column_can_hold_the_labels(table: datasets.Dataset, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path)
    for column in ("word", "number"):
        data = load(tmp_path, label_column=column)
        assert data.labels is not None
        assert (data.labels.tolist(), data.labels.dtype) == ([1, 0, 1], np.int64)


def test_wrong_columns_are_named(table: datasets.Dataset, tmp_path: Path) -> None:
    mask = table.select_columns("photo").rename_column("photo", "mask")
    datasets.concatenate_datasets([table, mask], axis=1).save_to_disk(tmp_path / "two")
    table.remove_columns("photo").save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="image_column: choose one of photo, mask, not null"):
        load(tmp_path / "two")
    assert len(load(tmp_path / "two", image_column="mask").images) == 3
    with pytest.raises(ValueError, match="has no column of images; its columns are class, word, number"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="label_column: choose one of photo, class, word, number, mask, not label"):
        load(tmp_path / "two", image_column="mask", label_column="label")


def test_labels_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    rows = {"photo": [picture(0), picture(1)], "score": [0.5, 0.7], "nan": [1.0, float("nan")], "many": [[1], [2]]}
    datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image()).save_to_disk(tmp_path)
    for column, message in (("score", "holds no classes"), ("many", "holds no classes"), ("nan", "without a label")):
        with pytest.raises(ValueError, match=f"{column}' {message}|{column}' leaves images {message}"):
            load(tmp_path, label_column=column)


@pytest.mark.parametrize(("missing", "says"), [(None, "'class' leaves images without"), (-1, "1 images have no label")])
def test_a_missing_label_is_refused(missing: int | None, says: str, table: datasets.Dataset, tmp_path: Path) -> None:
    labels = datasets.Dataset.from_dict(
        {"class": [0, missing, 1]}, datasets.Features({"class": table.features["class"]})
    )
    datasets.concatenate_datasets([table.select_columns("photo"), labels], axis=1).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=says):
        load(tmp_path)
    if missing == -1:
        found = load_real_data(DataSettings(source=str(tmp_path)), partly=True)
        assert found.labels is not None
        assert found.labels.tolist() == [0, -1, 1]


def test_a_broken_image_is_named(folder: Path) -> None:
    broken = folder / "zebra" / "broken.png"
    broken.write_bytes((folder / "zebra" / "3.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"zebra/broken\.png cannot be read as an 8-bit image .*: repair or remove it"):
        load(folder)
    Image.fromarray(np.full((6, 9), 40_000, np.uint16)).save(broken)
    with pytest.raises(ValueError, match=r"broken\.png .*more than 8 bits"):
        load(folder)


def test_a_row_without_an_image_is_numbered(table: datasets.Dataset, tmp_path: Path) -> None:
    features = datasets.Features({"photo": datasets.Image()})
    datasets.Dataset.from_dict({"photo": [picture(0), None]}, features).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="image 1 cannot be read"):
        load(tmp_path)


def test_what_does_not_exist_or_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for source in ("nobody/nothing", "./nothing", str(tmp_path / "empty"), str(tmp_path / "script")):
        with pytest.raises(ValueError, match=f"{source}(: no images of split train in a | holds no images)") as error:
            load(source)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_limit_draws_the_same_images_of_all_classes() -> None:
    everything, some = load("digits"), load("digits", limit=200)
    assert len(some.images) == 200
    assert not np.array_equal(some.images, everything.images[:200])
    assert some.labels is not None
    assert set(some.labels.tolist()) == set(range(10))
    known = {image.tobytes() for image in everything.images}
    assert {image.tobytes() for image in some.images} <= known
    assert some.sha256 == load("digits", limit=200).sha256 != load("digits", limit=201).sha256
    assert load("digits", limit=5000).sha256 == everything.sha256


def test_a_limit_leaves_each_class_its_share(tmp_path: Path) -> None:
    for name, count in (("rare", 6), ("common", 54)):
        for number in range(count):
            save(tmp_path / name / f"{number}.png", picture(number))
    data = load(tmp_path, limit=20)
    assert data.labels is not None
    assert np.bincount(data.labels).tolist() == [18, 2]


def test_the_hash_is_of_images_shape_and_labels() -> None:
    images, labels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1), np.array([0, 1])
    hashes = [
        RealData(images, labels).sha256,
        RealData(images, labels[::-1].copy()).sha256,
        RealData(images[::-1].copy(), labels).sha256,
        RealData(images.reshape(2, 4, 3, 1), labels).sha256,
        RealData(images).sha256,
    ]
    assert len(set(hashes)) == 5
    assert RealData(images.copy(), labels.copy()).sha256 == hashes[0]
    assert RealData(images[:, ::-1], labels).sha256 == RealData(images[:, ::-1].copy(), labels).sha256


@pytest.mark.parametrize("labelled", [True, False])
def test_the_reference_is_apart_stratified_and_fixed(labelled: bool) -> None:
    labels = np.repeat([0, 1, 2], [10, 300, 690])
    data = RealData(np.zeros((1000, 1, 1, 1), np.uint8), labels if labelled else None)
    pool, reference = split_reference(data, 101)
    np.testing.assert_array_equal(np.sort(np.concatenate([pool, reference])), np.arange(1000))
    assert len(reference) == 101
    assert (np.diff(pool) > 0).all()
    assert (np.diff(reference) > 0).all()
    if labelled:
        counts = np.bincount(labels[reference], minlength=3)
        assert (np.abs(counts - np.array([10, 300, 690]) * 0.101) < 1).all()
    np.testing.assert_array_equal(split_reference(data, 101)[1], reference)
    other = split_reference(data, 101, seed=1)[1]
    assert 0 < len(np.intersect1d(other, reference)) < 60  # about 10 are expected by chance


def test_the_reference_is_the_same_on_every_machine() -> None:
    data = RealData(np.zeros((12, 1, 1, 1), np.uint8), np.arange(12) % 3)
    assert split_reference(data, 4)[1].tolist() == [2, 6, 7, 10]
    assert ledger_order(6, 0).tolist() == [2, 0, 1, 5, 3, 4]


@pytest.mark.parametrize("reference", [0, 20, 21])
def test_a_reference_that_leaves_nothing_is_refused(reference: int) -> None:
    with pytest.raises(ValueError, match=f"reference: {reference} of 20 images .* give 1 to 19"):
        split_reference(RealData(np.zeros((20, 1, 1, 1), np.uint8)), reference)


def test_each_seed_uses_up_the_pool_in_its_own_order() -> None:
    orders = [ledger_order(500, seed) for seed in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(500))
    assert all((orders[i] == orders[j]).mean() < 0.05 for i, j in [(0, 1), (0, 2), (1, 2)])
    np.testing.assert_array_equal(ledger_order(500, 2), orders[2])


def test_two_hundred_damaged_images_are_named_or_read_as_they_were(tmp_path: Path) -> None:
    """PNG, which has checksums: what a damaged file of another format shows, nobody can tell from what it showed."""
    path = save(tmp_path / "data" / "0.png", picture(0))
    whole, expected, dice = path.read_bytes(), load(tmp_path / "data").images, random.Random(0)
    refused = []
    for _ in range(200):
        path.write_bytes(damaged(whole, dice))
        try:
            images = load(tmp_path / "data").images
        except ValueError as error:
            refused.append(str(error))
        else:
            np.testing.assert_array_equal(images, expected)
    assert len(refused) > 160  # the rest lost nothing but the mark of its end
    assert all("0.png cannot be read" in each for each in refused)
