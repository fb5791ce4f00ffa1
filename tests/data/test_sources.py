"""What is found, drawn and decoded, and the one message for whatever is wrong with it."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxtl import config, hosts
from jaxtl.data import decode, sources
from jaxtl.errors import UserError

COLOURS = {"ant": (200, 0, 0), "bee": (0, 200, 0), "cat": (0, 0, 200)}


def load(size=32, **fields):
    return sources.load(config.Images(**fields), size)


def write_images(folder: Path, classes: dict[str, int], size=(8, 8), suffix=".png") -> Path:
    """Writes `classes[name]` one-coloured images of each class."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", size, COLOURS.get(name, "grey")).save(folder / name / f"{i:03}{suffix}")
    return folder


@pytest.fixture
def folder(tmp_path):
    """train: 10 ants and 10 bees; val: 4 and 4; all 8x8."""
    write_images(tmp_path / "train", {"bee": 10, "ant": 10})
    write_images(tmp_path / "val", {"ant": 4, "bee": 4})
    return tmp_path


def write_tfds(
    root: Path, name="shapes", version="1.0.0", splits=None, mode="RGB", labels=("circle", "square"), **image_fields
) -> Path:
    """Writes a prepared data set: what tfds lays out, without tensorflow. Image i of a split is of grey level i."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    splits = {"train": 24, "test": 8} if splits is None else splits
    folder = root / name / version
    folder.mkdir(parents=True)
    channels = 1 if mode == "L" else 3
    features = tfds.features.FeaturesDict(
        {
            "picture": tfds.features.Image(shape=(6, 6, channels), encoding_format="png", **image_fields),
            "shape": tfds.features.ClassLabel(names=labels),
            "comment": tfds.features.Text(),
        }
    )
    features.save_config(str(folder))
    short = name.split("/")[0]
    info = {"name": short, "version": version, "fileFormat": "array_record", "moduleName": "shapes", "splits": []}
    if "/" in name:
        info["configName"] = name.split("/")[1]
    for split, count in splits.items():
        path = folder / f"{short}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for i in range(count):
            png = io.BytesIO()
            Image.new(mode, (6, 6), i if mode == "L" else (i, i, i)).save(png, "PNG")
            example = tf_example_pb2.Example()
            example.features.feature["picture"].bytes_list.value.append(png.getvalue())
            example.features.feature["shape"].int64_list.value.append(i % len(labels))
            example.features.feature["comment"].bytes_list.value.append(b"")
            writer.write(example.SerializeToString())
        writer.close()
        info["splits"].append(
            {
                "name": split,
                "numBytes": str(path.stat().st_size),
                "shardLengths": [str(count)],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


# --- image folders ---------------------------------------------------------------------------------------


def test_a_folder_with_two_splits_gives_sorted_classes_and_the_right_pixels(folder):
    train, held_out = load(dir=str(folder))
    for images, count, split in ((train, 10, "train"), (held_out, 4, "val")):
        assert images.class_names == ("ant", "bee")
        assert images.inputs.shape == (2 * count, 8, 8, 3)
        assert images.inputs.dtype == np.uint8
        assert images.labels.dtype == np.int32
        assert images.labels.tolist() == [0] * count + [1] * count
        assert images.ids[0] == f"{split}/ant/000.png"
        for pixels, label in zip(images.inputs, images.labels, strict=True):
            assert (pixels == COLOURS[images.class_names[label]]).all()


def test_nested_and_upper_case_files_count_and_hidden_and_other_files_do_not(folder):
    ants = folder / "train" / "ant"
    (ants / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(ants / "deep" / "er" / "X.JPG", "JPEG")
    Image.new("RGB", (8, 8)).save(ants / ".hidden.png")
    (ants / "notes.txt").write_text("not an image")
    (folder / "train" / ".cache").mkdir()
    (folder / ".cache").mkdir()
    train, _ = load(dir=str(folder))
    assert "train/ant/deep/er/X.JPG" in train.ids
    assert len(train.ids) == 21


def test_files_with_the_suffix_of_no_image_are_said_to_be_left_out(folder, capsys):
    for name in ("ant/1.heic", "ant/deep/2.HEIC", "bee/notes.txt", "bee/.hidden", ".cache/x.heic", "bee/x.tif"):
        path = folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "TIFF")
    assert len(load(dir=str(folder))[0].ids) == 21
    assert f"left out of {folder}, not being images that are read: 2 .heic, 1 .txt" in capsys.readouterr().err


def test_the_split_that_eval_split_names_wins_over_the_others(folder):
    write_images(folder / "test", {"ant": 1, "bee": 2})
    assert len(load(dir=str(folder))[1].ids) == 8  # val: a test split is not for choosing models by
    assert len(load(dir=str(folder), eval_split="test")[1].ids) == 3


def test_held_out_part_is_drawn_from_the_training_images_when_that_is_asked_for(folder):
    train, held_out = load(dir=str(folder), eval_split="train")
    assert (len(train.ids), len(held_out.ids)) == (16, 4)
    assert not set(train.ids) & set(held_out.ids)


@pytest.mark.parametrize("training", ["train", "training"])
@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "dev", "test"])
def test_usual_names_of_splits_are_known_and_never_taken_for_classes(tmp_path, training, held_out):
    write_images(tmp_path / training, {"ant": 3, "bee": 3})
    write_images(tmp_path / held_out, {"ant": 1, "bee": 1})
    train, evaluation = load(dir=str(tmp_path))
    assert (train.class_names, len(train.ids), len(evaluation.ids)) == (("ant", "bee"), 6, 2)


@pytest.mark.parametrize("fields", [{"eval_split": "vall"}, {}])
def test_split_folder_that_is_not_understood_is_an_error_and_never_left_out(tmp_path, fields):
    write_images(tmp_path / "train", {"ant": 3, "bee": 3})
    write_images(tmp_path / "holdout", {"ant": 1, "bee": 1})
    with pytest.raises(UserError, match=r"holds train beside holdout: name the held-out split with data\.eval_split"):
        load(dir=str(tmp_path), **fields)
    assert len(load(dir=str(tmp_path), eval_split="holdout")[1].ids) == 2


def test_images_beside_no_class_folders_are_not_two_classes(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / split / "0.png")
    with pytest.raises(UserError, match="an image folder is"):
        load(dir=str(tmp_path))


def test_folder_inside_a_tfds_data_dir_is_answered_with_the_one_to_give(tmp_path):
    write_tfds(tmp_path)
    with pytest.raises(UserError, match=r"lies inside a tfds data dir.*give DIR"):
        load(dir=str(next(tmp_path.iterdir())), source="auto")


def test_capital_letters_in_split_names_do_not_make_them_classes(tmp_path):
    write_images(tmp_path / "Train", {"ant": 3, "bee": 3})
    write_images(tmp_path / "Test", {"ant": 1, "bee": 1})
    train, held_out = load(dir=str(tmp_path))
    assert (train.class_names, len(train.ids), len(held_out.ids)) == (("ant", "bee"), 6, 2)


@pytest.mark.parametrize("inside", ["", "train"])
def test_one_folder_is_split_by_seed_stratified_and_without_overlap(tmp_path, inside):
    write_images(tmp_path / inside, {"ant": 20, "bee": 10})
    train, held_out = load(dir=str(tmp_path), eval_fraction=0.3)
    assert np.bincount(train.labels).tolist() == [14, 7]
    assert np.bincount(held_out.labels).tolist() == [6, 3]
    assert not set(train.ids) & set(held_out.ids)
    assert load(dir=str(tmp_path), eval_fraction=0.3)[1].ids == held_out.ids
    assert load(dir=str(tmp_path), eval_fraction=0.3, subset_seed=1)[1].ids != held_out.ids


def test_every_bad_file_is_named_in_one_error(folder):
    photo = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photo, "JPEG")
    (folder / "train" / "ant" / "cut.jpg").write_bytes(photo.getvalue()[:1000])
    (folder / "train" / "bee" / "text.png").write_text("no image at all")
    (folder / "val" / "bee" / "empty.bmp").write_bytes(b"")
    png = (folder / "val" / "ant" / "000.png").read_bytes()
    (folder / "val" / "ant" / "cut.png").write_bytes(png[:50])
    (folder / "val" / "ant" / "gone.png").symlink_to(folder / "val" / "ant" / "nothing.png")
    with pytest.raises(UserError) as error:
        load(dir=str(folder))
    message = str(error.value)
    assert message.startswith("unreadable images (5)")
    for name in ("train/ant/cut.jpg", "train/bee/text.png", "val/bee/empty.bmp", "val/ant/cut.png", "val/ant/gone.png"):
        assert name in message
    assert "\n" not in message


def test_of_many_bad_files_the_first_twenty_are_named_and_all_counted(folder):
    for i in range(30):
        (folder / "train" / "ant" / f"bad{i:02}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"unreadable images \(30\).*bad19\.png \(not an image\); 10 more$"):
        load(dir=str(folder))


def test_a_bad_file_that_is_not_drawn_does_not_matter(folder):
    (folder / "train" / "ant" / "bad.png").write_bytes(b"")
    for seed in range(20):
        try:
            train, _ = load(dir=str(folder), train_size=4, subset_seed=seed)
        except UserError:
            continue
        assert "train/ant/bad.png" not in train.ids
        return
    pytest.fail("the bad file was drawn twenty times out of twenty, at 4 of 21")


def layout(tmp_path, **folders):
    for path, classes in folders.items():
        write_images(tmp_path / path, classes)
    return {"dir": str(tmp_path), "source": "folder"}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda tmp: {"dir": str(tmp / "none"), "source": "folder"}, "is not a folder: an image folder is"),
        (lambda tmp: {"dir": "", "source": "folder"}, "is not a folder: an image folder is"),
        (lambda tmp: {"dir": str(tmp), "source": "folder"}, "holds no folders: an image folder is"),
        (lambda tmp: {"dir": str(tmp / "none")}, "is not a folder: a tfds data dir is .* an image folder is"),
        (lambda tmp: {"dir": str(tmp)}, "has neither layout: a tfds data dir is .* an image folder is"),
        (lambda tmp: layout(tmp, train={"ant": 3}), "holds ant: an image folder is .* two classes or more"),
        (lambda tmp: layout(tmp, train={"ant": 3, "bee": 0}), "no images in bee"),
        (lambda tmp: layout(tmp, val={"ant": 3}, test={"ant": 3}), "holds test, val: an image folder is"),
        (lambda tmp: layout(tmp, train={"ant": 3, "bee": 3}, val={"ant": 0}), "val holds no images"),
        (lambda tmp: layout(tmp, train={"ant": 2, "bee": 2}, val={"ant": 1, "cat": 1, "dog": 1}), "not: cat, dog"),
        (lambda tmp: layout(tmp, train={"ant": 4, "bee": 1}), "two examples a class, and there is one of bee"),
    ],
)
def test_a_wrong_folder_is_an_error_that_shows_the_layout(tmp_path, make, match):
    with pytest.raises(UserError, match=match):
        load(**make(tmp_path))


def test_links_out_of_the_folder_are_refused_and_links_inside_it_are_not(folder, tmp_path_factory):
    outside = write_images(tmp_path_factory.mktemp("outside"), {"ant": 2})
    inside = folder / "train" / "ant" / "again.png"
    inside.symlink_to(folder / "train" / "ant" / "000.png")
    assert "train/ant/again.png" in load(dir=str(folder))[0].ids
    link = folder / "train" / "ant" / "out.png"
    link.symlink_to(outside / "ant" / "000.png")
    with pytest.raises(UserError, match=r"out\.png is a symbolic link out of"):
        load(dir=str(folder))
    link.unlink()
    (folder / "train" / "eel").symlink_to(outside / "ant")
    with pytest.raises(UserError, match="eel is a symbolic link to a folder"):
        load(dir=str(folder))


def test_a_folder_that_is_itself_reached_through_a_link_is_read(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp("elsewhere") / "data"
    link.symlink_to(folder)
    assert len(load(dir=str(link))[0].ids) == 20


# --- pixels ----------------------------------------------------------------------------------------------


def decoded(tmp_path, save, others=(8, 8), **fields):
    """Returns the pixels of the one image that `save(path without suffix)` writes, among images of size `others`."""
    write_images(tmp_path / "train", {"ant": 2, "bee": 2}, others)
    write_images(tmp_path / "val", {"ant": 2, "bee": 2}, others)
    save(tmp_path / "train" / "ant" / "x")
    train, _ = load(dir=str(tmp_path), **fields)
    (row,) = (row for row, name in enumerate(train.ids) if "/x." in name)
    return train.inputs[row].astype(int)


def test_images_are_turned_upright(tmp_path):
    def save(path):
        image = Image.new("RGB", (8, 8), "black")
        image.paste("white", (0, 0, 8, 4))  # the upper half
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise to view: the upper half is the right one
        image.save(f"{path}.jpg", exif=exif, quality=100)

    pixels = decoded(tmp_path, save)
    assert pixels[:, 4:].min() > 250
    assert pixels[:, :4].max() < 5


def grey16(path):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(f"{path}.png")


def grey8(path):
    Image.new("L", (8, 8), 77).save(f"{path}.bmp")


def black_and_white(path):
    Image.new("1", (8, 8), 1).save(f"{path}.png")


def palette(path):
    Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4).save(f"{path}.png")


def palette_transparent(path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 1, 2, 3])
    image.save(f"{path}.png", transparency=0)


def cmyk(path):
    Image.new("CMYK", (8, 8), (255, 0, 255, 0)).save(f"{path}.jpg", quality=100)


def half_transparent(path):
    Image.new("RGBA", (8, 8), (0, 100, 200, 128)).save(f"{path}.png")


def grey_transparent(path):
    Image.new("LA", (8, 8), (9, 0)).save(f"{path}.png")


def webp(path):
    Image.new("RGB", (8, 8), (200, 10, 10)).save(f"{path}.webp", lossless=True)


@pytest.mark.parametrize(
    ("save", "colour", "tolerance"),
    [
        (grey16, (156, 156, 156), 0),  # 40000 / 65535 * 255 = 155.6
        (grey8, (77, 77, 77), 0),
        (black_and_white, (255, 255, 255), 0),
        (palette, (10, 200, 30), 0),
        (palette_transparent, (255, 255, 255), 0),
        (cmyk, (0, 255, 0), 3),  # no cyan and no yellow reflected back: green; JPEG
        (half_transparent, (127, 177, 227), 1),  # halfway to white: 255 - (255 - c) * 128 / 255
        (grey_transparent, (255, 255, 255), 0),
        (webp, (200, 10, 10), 0),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, save, colour, tolerance):
    pixels = decoded(tmp_path, save)
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels - colour).max() <= tolerance


def test_one_small_size_is_kept_and_anything_else_is_resized(folder):
    def shapes(size):
        return [images.inputs.shape[1:3] for images in load(size, dir=str(folder))]

    assert shapes(32) == [(8, 8)] * 2
    assert shapes(8) == [(8, 8)] * 2
    assert shapes(6) == [(6, 6)] * 2
    # One image of another size, the last one of the evaluation split, has both splits resized.
    Image.new("RGB", (9, 8)).save(folder / "val" / "bee" / "z.png")
    assert shapes(32) == [(32, 32)] * 2


def stripes(path):
    """16 wide, 8 high: columns 0-3 red, 4-11 green, 12-15 blue; the middle square is green."""
    image = Image.new("RGB", (16, 8), "red")
    image.paste((0, 255, 0), (4, 0, 12, 8))
    image.paste("blue", (12, 0, 16, 8))
    image.save(f"{path}.png")


@pytest.mark.parametrize(("image_size", "side"), [(32, 8), (4, 4)], ids=["kept", "resized"])
def test_crop_takes_the_square_in_the_middle(tmp_path, image_size, side):
    pixels = decoded(tmp_path, stripes, (16, 8), size=image_size, resize="crop")
    assert pixels.shape == (side, side, 3)
    assert (pixels == (0, 255, 0)).all()


def test_stretch_keeps_the_whole_width(tmp_path):
    pixels = decoded(tmp_path, stripes, (16, 8), size=8, resize="stretch")
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, -1].tolist() == [0, 0, 255]


def test_host_resizing_is_antialiased(tmp_path):
    """Alternating black and white lines shrink to grey; sampling without a filter would leave lines."""

    def save(path):
        lines = np.zeros((64, 64, 3), np.uint8)
        lines[::2] = 255
        Image.fromarray(lines).save(f"{path}.png")

    pixels = decoded(tmp_path, save, size=8)
    assert np.abs(pixels - 127.5).max() < 10  # a line more or less at the border


def test_large_sets_are_decoded_into_an_unlinked_file(folder, tmp_path_factory, monkeypatch):
    in_memory, _ = load(dir=str(folder))
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(decode.tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(decode, "_MEMORY_LIMIT", 100)
    mapped, _ = load(dir=str(folder))
    assert isinstance(mapped.inputs, np.memmap)
    assert np.array_equal(mapped.inputs, in_memory.inputs)
    assert not list(temporary.iterdir())


def test_a_full_disk_is_an_error_that_says_where(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(decode, "_MEMORY_LIMIT", 100)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"No space left on device; .*TMPDIR"):
        load(dir=str(folder))


def test_progress_is_shown_for_every_image(folder):
    seen = []

    def track(iterable, total, description):
        items = list(iterable)
        seen.append((description, total, len(items)))
        return items

    sources.load(config.Images(dir=str(folder)), 32, track)
    assert seen == [("decoding training images", 20, 20), ("decoding evaluation images", 8, 8)]


# --- which examples --------------------------------------------------------------------------------------


def test_digits_are_the_8x8_images_of_scikit_learn():
    train, held_out = load(source="digits")
    assert train.class_names == tuple("0123456789")
    assert len(train.ids) + len(held_out.ids) == 1797
    assert len(held_out.ids) == 359  # a fifth
    assert train.inputs.shape[1:] == (8, 8, 3)
    assert train.inputs.max() == 255  # 16
    assert 128 in train.inputs  # 8 * 255 / 16 = 127.5, to even
    assert (train.inputs[..., 0] == train.inputs[..., 2]).all()


def test_a_balanced_source_gives_a_balanced_subset(tmp_path):
    write_images(tmp_path / "train", {"ant": 12, "bee": 12, "cat": 12})
    write_images(tmp_path / "val", {"ant": 5, "bee": 5, "cat": 5})
    fields = {"dir": str(tmp_path), "train_size": 15, "eval_size": 6}
    train, held_out = load(**fields)
    assert np.bincount(train.labels).tolist() == [5, 5, 5]
    assert np.bincount(held_out.labels).tolist() == [2, 2, 2]
    again, other = load(**fields), load(**fields, subset_seed=7)
    assert again[0].ids == train.ids
    assert other[0].ids != train.ids
    assert (again[0].inputs == train.inputs).all()


@pytest.mark.parametrize("size", [None, 20])
def test_the_whole_split_is_taken_in_its_own_order(folder, size):
    assert list(load(dir=str(folder), train_size=size)[0].ids) == sorted(load(dir=str(folder))[0].ids)


def test_classes_are_filtered_and_numbered_in_the_order_given(tmp_path):
    write_images(tmp_path / "train", {"ant": 3, "bee": 3, "cat": 3})
    write_images(tmp_path / "val", {"ant": 2, "bee": 2, "cat": 2})
    train, held_out = load(dir=str(tmp_path), classes=("cat", "ant"))
    for images in (train, held_out):
        assert images.class_names == ("cat", "ant")
        for name, label in zip(images.ids, images.labels, strict=True):
            assert name.split("/")[1] == images.class_names[label]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"train_size": 21}, "data.train_size=21: there are 20 examples"),
        ({"eval_size": 9}, "data.eval_size=9: there are 8 examples"),
        ({"train_size": 1}, "data.train_size=1 would draw 1 of 20 .* 2 classes takes at least 2"),
        ({"train_size": 19}, "leaves at least 2, or takes all"),
        ({"classes": ("ant", "bea")}, r"no class 'bea' \(did you mean 'bee'\?\)"),
        ({"classes": ("ant",)}, "at least two classes"),
        ({"classes": ("ant", "ant")}, "each once"),
    ],
)
def test_a_subset_that_cannot_be_drawn_is_an_error(folder, fields, match):
    with pytest.raises(UserError, match=match):
        load(dir=str(folder), **fields)


# --- tfds ------------------------------------------------------------------------------------------------


def test_a_prepared_data_set_is_found_and_read(tmp_path):
    write_tfds(tmp_path)
    for fields in ({}, {"name": "shapes"}, {"name": "shapes:1.0.0"}, {"source": "tfds", "name": "shapes"}):
        train, held_out = load(dir=str(tmp_path), **fields)
        assert train.class_names == ("circle", "square")
        assert train.inputs.shape == (24, 6, 6, 3)
        assert (train.inputs == np.arange(24)[:, None, None, None]).all()  # grey level i for image i
        assert train.labels.tolist() == [0, 1] * 12
        assert train.ids[3] == "train:3"
        assert held_out.ids == tuple(f"test:{i}" for i in range(8))


def test_only_the_images_drawn_are_decoded(tmp_path, monkeypatch):
    write_tfds(tmp_path)
    opened = []
    real = Image.open
    monkeypatch.setattr(decode.Image, "open", lambda file: opened.append(1) or real(file))
    train, held_out = load(dir=str(tmp_path), train_size=4, eval_size=2)
    assert np.bincount(train.labels).tolist() == [2, 2]
    assert len(opened) == 4 + 2 + 1  # one to learn the size
    for images in (train, held_out):
        rows = [int(name.split(":")[1]) for name in images.ids]
        assert images.inputs[:, 0, 0, 0].tolist() == rows


def test_grey_images_get_three_channels(tmp_path):
    write_tfds(tmp_path, mode="L")
    train, _ = load(dir=str(tmp_path))
    assert (train.inputs == np.arange(24)[:, None, None, None]).all()


def test_configs_and_versions_are_found(tmp_path):
    write_tfds(tmp_path, "shapes/small", splits={"train": 4, "test": 4})
    write_tfds(tmp_path, "shapes/small", "1.9.0", splits={"train": 6, "test": 4})
    write_tfds(tmp_path, "shapes/small", "1.10.0", splits={"train": 8, "test": 4})
    assert len(load(dir=str(tmp_path), name="shapes")[0].ids) == 8  # 1.10 comes after 1.9
    assert len(load(dir=str(tmp_path), name="shapes/small:1.9.0")[0].ids) == 6
    write_tfds(tmp_path, "shapes/large")
    with pytest.raises(UserError, match=r"data.name='shapes': choose one of shapes/large, shapes/small"):
        load(dir=str(tmp_path), name="shapes")


def test_the_default_dir_is_that_of_tfds(tmp_path, monkeypatch):
    write_tfds(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(load(name="shapes")[0].ids) == 24


def test_a_data_set_without_a_held_out_split_is_divided(tmp_path):
    write_tfds(tmp_path, splits={"train": 20})
    train, held_out = load(dir=str(tmp_path))
    assert (np.bincount(train.labels).tolist(), np.bincount(held_out.labels).tolist()) == ([8, 8], [2, 2])
    assert not set(train.ids) & set(held_out.ids)


def test_slices_of_splits_are_splits(tmp_path):
    write_tfds(tmp_path)
    train, held_out = load(dir=str(tmp_path), train_split="train[:50%]", eval_split="train[50%:]")
    assert (len(train.ids), len(held_out.ids)) == (12, 12)
    assert held_out.inputs[0, 0, 0, 0] == 12


@pytest.mark.parametrize(
    ("train_split", "eval_split"),
    [
        ("train", "train[90%:]"),
        ("train+test", "test"),
        ("train[:60%]", "train[50%:]"),
        ("train[5:7]", "test+train[6:]"),
    ],
)
def test_splits_that_overlap_are_refused(tmp_path, train_split, eval_split):
    write_tfds(tmp_path)
    with pytest.raises(UserError, match=r"holds examples of data\.train_split=.* data\.eval_split=train to draw"):
        load(dir=str(tmp_path), train_split=train_split, eval_split=eval_split)


@pytest.mark.parametrize(
    ("train_split", "eval_split"), [("train+test", ""), ("train[:50%]", "train"), ("train", "train")]
)
def test_held_out_part_is_drawn_where_the_usual_split_overlaps_or_it_is_asked_for(tmp_path, train_split, eval_split):
    write_tfds(tmp_path)
    train, held_out = load(dir=str(tmp_path), train_split=train_split, eval_split=eval_split)
    assert not set(train.ids) & set(held_out.ids)
    assert len(held_out.ids) == round(0.2 * (len(train.ids) + len(held_out.ids)))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"eval_split": "tset"}, "data.eval_split=tset: the splits of shapes are train, test"),
        ({"name": "shpes"}, r"no such tfds data set \(did you mean 'shapes'\?\); in .* there are shapes$"),
        ({"name": "cifar11"}, r"did you mean 'cifar10"),
        ({"name": "mnist", "download": False}, "mnist is not prepared in .*mnist, and nothing is downloaded"),
        ({"name": "shapes:9.0.0", "download": False}, "shapes:9.0.0 is not prepared in"),
        ({"train_size": 25}, "data.train_size=25: there are 24"),
    ],
)
def test_what_tfds_does_not_have_is_an_error(tmp_path, fields, match):
    write_tfds(tmp_path)
    with pytest.raises(UserError, match=match):
        load(**{"dir": str(tmp_path), "name": "shapes"} | fields)


def test_without_a_name_and_a_data_set_there_is_nothing_to_load(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"data.name is empty"):
        load()
    write_tfds(tmp_path)
    write_tfds(tmp_path, "forms")
    with pytest.raises(UserError, match="choose one of forms, shapes"):
        load()


def test_a_set_of_another_task_is_an_error(tmp_path):
    folder = write_tfds(tmp_path)
    features = json.loads((folder / "features.json").read_text())
    del features["featuresDict"]["features"]["shape"]
    (folder / "features.json").write_text(json.dumps(features))
    with pytest.raises(UserError, match=r"has not one image and one class label, but .*picture \(Image\)"):
        load(dir=str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "cut", "info", "labels", "format"])
def test_a_damaged_data_set_is_one_error_that_names_it(tmp_path, damage):
    folder = write_tfds(tmp_path, labels=("circle", "square"))
    shard = folder / "shapes-train.array_record-00000-of-00001"
    info = folder / "dataset_info.json"
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:200])
    elif damage == "info":
        info.write_text("{")
    elif damage == "format":
        info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    else:
        features = json.loads((folder / "features.json").read_text())
        features["featuresDict"]["features"]["missing"] = features["featuresDict"]["features"].pop("shape")
        (folder / "features.json").write_text(json.dumps(features))
        (folder / "missing.labels.txt").write_text("circle\nsquare\n")
    expected = {"labels": "have no labels", "format": "stored as tfrecord.*convert_format"}
    with pytest.raises(UserError, match=expected.get(damage, str(folder))):
        load(dir=str(tmp_path))


def test_a_failed_preparation_says_why_and_how_to_do_it_elsewhere(tmp_path, monkeypatch):
    trace = "Traceback\n  somewhere\nModuleNotFoundError: No module named 'tensorflow'\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", trace))
    with pytest.raises(UserError) as error:
        load(source="tfds", dir=str(tmp_path), name="mnist")
    message = str(error.value)
    for part in (
        "No module named 'tensorflow'",
        "tfds build mnist --file_format=array_record",
        str(tmp_path / "mnist"),
        "--set data.dir=DIR",
    ):
        assert part in message
    assert "\n" not in message


def test_a_data_set_is_prepared_where_it_is_missing_by_another_process(tmp_path, monkeypatch):
    commands = []

    def prepare(command, **_):
        commands.append(command)
        write_tfds(tmp_path, "mnist")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", prepare)
    train, _ = load(source="tfds", dir=str(tmp_path), name="mnist")
    assert len(train.ids) == 24
    ((program, *_, name, directory),) = commands
    assert (program, name, directory) == (sys.executable, "mnist", str(tmp_path))


def test_loading_imports_no_tensorflow_and_prints_nothing(tmp_path):
    write_tfds(tmp_path)
    code = (
        "import sys; from jaxtl import config; from jaxtl.data import sources;"
        f"sources.load(config.Images(dir={str(tmp_path)!r}), 32);"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_cifar10_gives_500_training_and_100_held_out_images_of_each_class(cifar10):
    train, held_out = load(224, dir=str(cifar10), name="cifar10", train_size=5000, eval_size=1000)
    assert np.bincount(train.labels).tolist() == [500] * 10
    assert np.bincount(held_out.labels).tolist() == [100] * 10
    assert train.inputs.shape == (5000, 32, 32, 3)
    assert train.class_names[3] == "cat"


@pytest.fixture
def process(monkeypatch):
    """Returns what has this process be one of two, of which the other says these flags."""

    def become(number, *theirs):
        monkeypatch.setattr(hosts, "index", lambda: number)
        monkeypatch.setattr(hosts, "all_say", lambda flags: [a and b for a, b in zip(flags, theirs, strict=True)])

    return become


def test_of_several_processes_each_decodes_its_own_images_and_all_to_one_size(tmp_path, process, monkeypatch):
    write_images(tmp_path, {"a": 5, "b": 4})
    drawn = sources.listings(config.Images(source="folder", dir=str(tmp_path), eval_fraction=0.3))
    whole = sources.read(drawn, "stretch", 32)
    owners = [np.arange(len(listing.labels), dtype=np.int32) % 2 for listing in drawn]
    for number in range(2):
        process(number, True, True)
        for split, of, all_of_it in zip(sources.read(drawn, "stretch", 32, owners=owners), owners, whole, strict=True):
            np.testing.assert_array_equal(split.inputs, all_of_it.inputs[of == number])
            np.testing.assert_array_equal(split.labels, all_of_it.labels)
    found = []

    def say(flags):  # the other one has found an image of another size
        found.append(flags)
        return [flags[0], flags[1] and len(found) > 1]

    monkeypatch.setattr(hosts, "all_say", say)
    assert sources.read(drawn, "stretch", 32, owners=owners)[0].inputs.shape[1:3] == (32, 32)
    assert found == [[True, True], [True, True]]


def test_of_several_processes_all_end_where_one_has_an_unreadable_image(tmp_path, process):
    write_images(tmp_path, {"a": 5, "b": 4})
    drawn = sources.listings(config.Images(source="folder", dir=str(tmp_path), eval_fraction=0.3))
    owners = [np.arange(len(listing.labels), dtype=np.int32) % 2 for listing in drawn]
    process(0, False, True)
    with pytest.raises(UserError, match="another process cannot decode its images"):
        sources.read(drawn, "stretch", 32, owners=owners)
    Path(drawn[0].items[0]).write_bytes(b"damaged")
    process(0, True, True)
    with pytest.raises(UserError, match=r"unreadable images \(1\)"):
        sources.read(drawn, "stretch", 32, owners=owners)
