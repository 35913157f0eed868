"Every layout and every trap of the field's data sets, on miniature trees painted here; pixels, transforms, samplers, check."
import importlib
import json
import os
import pickle
import shutil
import struct
import time
import warnings
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from reidbook import data, images as pictures
from reidbook.checks import answerable, check, inspect_file
from reidbook.images import augment, draw_augmentation, files_key, load_images, MEAN, open_image, ORIENTATION, show_images, STD, train_transform
from reidbook.sampling import group_batches, pk_batches, released_generators, released_order, shard


def paint(path, size=(16, 32), seed=None):
    "One small image; the file's name decides its pixels unless a seed is given."
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(str(path.name).encode()) if seed is None else seed)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


BOXES = data.BOXES


def boxes(root, train, query, gallery, folders=BOXES):
    "A tree of three folders."
    for folder, names in zip(folders, (train, query, gallery)):
        for name in names: paint(root/folder/name)
    return root


def market(root):
    return boxes(root, [f"{p:04}_c{c}s1_000001_00.jpg" for p in (2, 7, 30) for c in (1, 6)],
                 ["0005_c1s1_000001_00.jpg", "0009_c2s1_000001_00.jpg"],
                 ["0005_c3s1_000001_00.jpg", "0009_c4s1_000001_00.jpg", "0000_c1s1_000001_00.jpg", "-1_c2s1_000001_00.jpg"])


def msmt(root, train="train", test="test"):
    names = dict(train=["0000/0000_000_01_0303morning_0008_0_ex.jpg", "0001/0001_000_15_0303noon_0001_0.jpg"],
                 val=["0001/0001_001_02_0303noon_0002_0.jpg"],
                 query=["0000/0000_000_03_0303morning_0001_0.jpg"],
                 gallery=["0000/0000_001_04_0303morning_0002_0.jpg", "0003/0003_000_04_0303noon_0002_1_ex.jpg"])
    for split, files in names.items():
        for name in files: paint(root/(train if split in ("train", "val") else test)/name)
        (root/f"list_{split}.txt").write_text("".join(f"{n} {int(n[:4])}\n" for n in files))
    return root


# ---------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("folder", ["Market-1501-v15.09.15", "market1501", "market1501/Market-1501-v15.09.15", "."])
def test_market(tmp_path, folder):
    market(tmp_path/folder)
    ds = data.open_dataset("market1501", tmp_path)
    assert ds.name == "market1501"
    assert data.column(ds.train, "pid").tolist() == [0, 0, 1, 1, 2, 2]
    assert data.column(ds.train, "cam").tolist() == [0, 5] * 3
    assert data.column(ds.query, "pid").tolist() == [5, 9]
    assert data.column(ds.gallery, "pid").tolist() == [0, 5, 9]  # -1 never loaded, 0 stays
    assert all(os.path.isabs(p) and os.path.exists(p) for t in (ds.train, ds.query, ds.gallery) for p in t["path"])
    assert ds.train["pid"].dtype == np.int64 and ds.train["cam"].dtype == np.int64
    assert "| train | 6 | 3 | 2 |" in ds._repr_markdown_()


def test_parent_folder_does_not_matter(tmp_path):
    market(tmp_path/"run_3_c4"/"market1501")
    ds = data.open_dataset("market1501", tmp_path/"run_3_c4")
    assert data.column(ds.train, "cam").tolist() == [0, 5] * 3 and ds.query["pid"].tolist() == [5, 9]


def test_duke_says_withdrawn(tmp_path):
    with pytest.raises(FileNotFoundError, match="withdrawn") as error: data.open_dataset("dukemtmcreid", tmp_path)
    assert "http" not in str(error.value)
    boxes(tmp_path/"DukeMTMC-reID", ["0001_c2_f0046182.jpg"], ["0005_c8_f0000001.jpg"], ["0005_c1_f0000001.jpg"])
    ds = data.open_dataset("dukemtmcreid", tmp_path)
    assert ds.train["cam"].tolist() == [1] and ds.query["cam"].tolist() == [7] and "withdrawn" in ds.notes[-1]


@pytest.mark.parametrize("folder", ["VeRi", "veri/VeRi", "VeRi-776"])
def test_veri(tmp_path, folder):
    boxes(tmp_path/folder, ["0002_c002_00030600_0.jpg", "0001_c020_00030600_1.jpg"],
          ["0003_c010_00030600_0.jpg"], ["0003_c001_00030600_0.jpg"], ("image_train", "image_query", "image_test"))
    (tmp_path/folder/"train_label.xml").write_bytes('<?xml version="1.0" encoding="gb2312"?><a/>'.encode())  # never parsed
    ds = data.open_dataset("veri776", tmp_path)
    assert ds.train["pid"].tolist() == [0, 1] and ds.train["cam"].tolist() == [19, 1] and ds.query["cam"].tolist() == [9]


def test_personx_subset(tmp_path):
    boxes(tmp_path/"personx"/"PersonX", [f"0001_c{c}s1_1.jpg" for c in (3, 4, 8, 10, 11, 12)], ["0002_c3s1_1.jpg"], ["0002_c12s1_1.jpg"])
    ds = data.open_dataset("personx", tmp_path)
    assert sorted(ds.train["cam"]) == [0, 1, 2, 3, 4, 5] and ds.gallery["cam"].tolist() == [5]
    paint(tmp_path/"personx"/"PersonX"/"query"/"0002_c5s1_1.jpg")
    with pytest.raises(ValueError, match=r"cameras \[5\].*six-camera subset"): data.open_dataset("personx", tmp_path)


@pytest.mark.parametrize("name, boxes_of, suffix", [("cuhk03np", "detected", "png"), ("cuhk03np-labeled", "labeled", "jpg")])
def test_cuhk03(tmp_path, name, boxes_of, suffix):
    boxes(tmp_path/"cuhk03-np"/boxes_of, [f"0001_c1_1.{suffix}"], [f"0002_c1_1.{suffix}"], [f"0002_c2_1.{suffix}"])
    ds = data.open_dataset(name, tmp_path)
    assert ds.train["cam"].tolist() == [0] and ds.gallery["cam"].tolist() == [1]
    if name == "cuhk03np-labeled":
        with pytest.raises(FileNotFoundError, match="cuhk03np-labeled"): data.open_dataset("cuhk03np", tmp_path)


@pytest.mark.parametrize("folder", ["MSMT17_V1", "msmt17/MSMT17_V1"])
def test_msmt_v1(tmp_path, folder):
    msmt(tmp_path/folder)
    ds = data.open_dataset("msmt17", tmp_path)
    assert ds.variant == "V1" and len(ds.train) == 3  # train and val joined
    assert ds.train["cam"].tolist() == [0, 14, 1] and ds.train["pid"].tolist() == [0, 1, 1]
    assert ds.query["pid"].tolist() == [0] and ds.gallery["pid"].tolist() == [0, 3]  # restart at 0: other people


def test_msmt_v2_warns(tmp_path):
    msmt(tmp_path/"MSMT17_V2", "mask_train_v2", "mask_test_v2")
    with pytest.warns(UserWarning, match="blurred"): ds = data.open_dataset("msmt17", tmp_path)
    assert ds.variant.startswith("V2") and len(ds.train) == 3
    assert any("blurred" in w for w in check(ds).warnings)
    msmt(tmp_path/"MSMT17_V1")
    assert data.open_dataset("msmt17", tmp_path).variant == "V1"


@pytest.mark.parametrize("folder", ["MSMT17_V1", "msmt17"])
def test_msmt_repacked(tmp_path, folder):
    boxes(tmp_path/folder, ["0001_c15_0001.jpg", "0000_c1_0002.jpg"], ["0000_c3_0001.jpg"], ["0000_c10_0001.jpg"])
    ds = data.open_dataset("msmt17", tmp_path)
    assert "re-packed" in ds.variant and ds.train["cam"].tolist() == [0, 14] and ds.gallery["cam"].tolist() == [9]


def test_msmt_missing_list(tmp_path):
    (msmt(tmp_path/"MSMT17_V1")/"list_query.txt").unlink()
    with pytest.raises(FileNotFoundError) as error: data.open_dataset("msmt17", tmp_path)
    text = str(error.value)
    assert "lacks list_query.txt" in text and "V1 as published with 3 of its 4" in text and "bounding_box_train" in text


def test_msmt_lists_of_another_edition(tmp_path):
    root = msmt(tmp_path/"MSMT17_V1")
    (root/"list_val.txt").write_text("0900/0900_000_01_x.jpg 900\n")
    with pytest.raises(ValueError, match="list_val.txt: 1 of the 1 files it names are not there.*same edition"):
        data.open_dataset("msmt17", tmp_path)
    for line in "../../etc/a.jpg 0", "/etc/a.jpg 0", "..\\..\\a.jpg 0":
        (root/"list_val.txt").write_text(f"0001/0001_001_02_0303noon_0002_0.jpg 1\n{line}\n")
        with pytest.raises(ValueError, match="line 2.*outside"): data.open_dataset("msmt17", tmp_path)
    (root/"list_val.txt").write_text("\n")
    with pytest.raises(ValueError, match="names no image"): data.open_dataset("msmt17", tmp_path)


def test_list_with_spaces_unicode_and_bom(tmp_path):
    (tmp_path/"list.txt").write_bytes("\ufeff0000/a b.jpg 3\r\n0000/ü 7.jpg -1\r\n0000/plain.jpg\r\n".encode())
    names = ["0000/a b.jpg", "0000/ü 7.jpg", "0000/plain.jpg"]
    assert data.read_list(tmp_path/"list.txt", set(names)) == names


class Bomb:
    def __reduce__(self): return (os.mkdir, ("/tmp/reidbook-unpickled",))


def test_luperson(tmp_path):
    for n in range(5): paint(tmp_path/"LUP"/"images"/f"v{n}_{n}.jpg")
    (tmp_path/"LUP"/"CFS_list.pkl").write_bytes(pickle.dumps(Bomb()))
    ds = data.open_dataset("luperson", tmp_path)
    assert callable(ds.__dict__["train"])  # not scanned yet
    assert len(ds.train) == 5 and list(ds.train) == ["path"] and not len(ds.query) and "unpickling" in ds.notes[0]
    (tmp_path/"LUP"/"CFS_list.txt").write_text("v1_1.jpg\nv3_3.jpg\n")
    assert len(data.open_dataset("luperson", tmp_path).train) == 2
    assert data.column(ds.train, "pid") is None and data.column(ds.train, "cam") is None


def test_csv(tmp_path):
    for name in "abcd": paint(tmp_path/"im ages"/f"{name} ü.jpg")
    file = tmp_path/"my set.csv"
    file.write_text("path,pid,cam,split\nim ages/a ü.jpg,ann,north,train\nim ages/b ü.jpg,bob,south,train\n"
                    "im ages/c ü.jpg,cy,north,Query\nim ages/d ü.jpg,cy,west,gallery\n")
    for root in (tmp_path, file):
        ds = data.open_dataset("csv", root)
        assert ds.train["pid"].tolist() == [0, 1] and ds.train["cam"].tolist() == [0, 1]
        assert ds.query["pid"].tolist() == ds.gallery["pid"].tolist() == [2] and ds.gallery["cam"].tolist() == [2]
        assert check(ds).ok
    assert load_images(ds.train["path"], (8, 4)).shape == (2, 3, 8, 4)


def test_csv_without_labels_and_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    for name in "ab": paint(tmp_path/f"{name}.jpg")
    pd.DataFrame(dict(path=["a.jpg", "b.jpg"], pid=[30, 7])).to_parquet(tmp_path/"set.parquet")
    ds = data.open_dataset("csv", tmp_path)
    assert ds.train["pid"].tolist() == [1, 0] and "cam" not in ds.train
    (tmp_path/"other.csv").write_text("path\na.jpg\n")
    with pytest.raises(FileNotFoundError, match="2 CSV or parquet files"): data.open_dataset("csv", tmp_path)
    assert list(data.open_dataset("csv", tmp_path/"other.csv").train) == ["path"]


def test_csv_with_a_blank_split(tmp_path):
    for name in "abc": paint(tmp_path/f"{name}.jpg")
    (tmp_path/"set.csv").write_text("path,pid,cam,split\na.jpg,,cam10,train\nb.jpg,77,cam9,query\nc.jpg,77,cam10,gallery\n")
    ds = data.open_dataset("csv", tmp_path)
    assert list(ds.train) == ["path", "cam"] and ds.query["pid"].tolist() == ds.gallery["pid"].tolist() == [77]
    assert ds.train["cam"].tolist() == [0] and ds.query["cam"].tolist() == [1]
    (tmp_path/"set.csv").write_text("path,pid,cam\na.jpg,,3\nb.jpg,,10\n")
    ds = data.open_dataset("csv", tmp_path)
    assert list(ds.train) == ["path", "cam"] and ds.train["cam"].tolist() == [0, 1]


@pytest.mark.parametrize("text, message", [
    ("file,pid\na.jpg,1\n", "expected 'path'"), ("path,pid\na.jpg,1\nb.jpg,\n", "pid is blank in 1 of 2 train rows, first in row 2"),
    ("path,split\na.jpg,test\n", "split 'test'; expected train, query, gallery"),
    ("path\n../a.jpg\n", "outside"), ("path\n/etc/a.jpg\n", "outside"),
    ("path\n", "no rows"), ("path,pid\n,1\n", "path is blank"), ("path,pid\na.jpg,-1\n", "pid -1 is negative")])
def test_csv_errors(tmp_path, text, message):
    (tmp_path/"set.csv").write_text(text)
    with pytest.raises(ValueError, match=message): data.open_dataset("csv", tmp_path)


def test_folder(tmp_path):
    for name in "a.jpg", "sub dir/ü.PNG", "deep/er/b.jpeg": paint(tmp_path/name)
    ds = data.open_dataset("folder", tmp_path)
    assert len(ds.train) == 3 and list(ds.train) == ["path"] and not len(ds.query) and not len(ds.gallery)
    with pytest.raises(FileNotFoundError, match="no folder"): data.open_dataset("folder", tmp_path/"nowhere")


def test_synthetic(root):
    ds = data.open_dataset("synthetic-tiny", root)
    assert len(ds.train) and {"path", "pid", "cam"} == set(ds.train) and (root/"synthetic-tiny"/"card.json").exists()
    report = check(ds, progress=False)
    assert report.ok, report.errors
    with pytest.raises(ValueError, match="synthetic-tiny"): data.open_dataset("synthetic-nothing", root)


def test_unknown_name_and_root(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="market1501.*synthetic-PRESET"): data.open_dataset("market", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder.*REIDBOOK_DATA"): data.open_dataset("market1501", tmp_path/"nowhere")
    monkeypatch.setenv("REIDBOOK_DATA", str(tmp_path))
    assert data.data_root() == tmp_path and data.data_root("/x") == data.Path("/x")
    monkeypatch.delenv("REIDBOOK_DATA")
    assert data.data_root().name == "data"


def test_errors_look_around(tmp_path):
    (tmp_path/"Market-1501-v15.09.15.zip").touch()
    with pytest.raises(FileNotFoundError, match=r"unpack Market-1501-v15.09.15.zip"): data.open_dataset("market1501", tmp_path)
    market(tmp_path/"Market-1501-v15.09.15"/"Market-1501-v15.09.15")  # unpacked one level too deep
    with pytest.raises(FileNotFoundError, match="has these folders; if it is the one, pass it as root"):
        data.open_dataset("market1501", tmp_path)
    with pytest.raises(FileNotFoundError, match="Market-style"):
        data.open_dataset("veri776", tmp_path/"Market-1501-v15.09.15"/"Market-1501-v15.09.15")


def test_open_pair(tmp_path):
    market(tmp_path/"market1501")
    msmt(tmp_path/"MSMT17_V1")
    pair = data.open_pair("market1501", "msmt17", tmp_path)
    assert "pid" in pair.source.train and list(pair.target.train) == ["path", "cam"] and "pid" in pair.target.query
    with pytest.raises(ValueError, match="two data sets"): data.open_pair("msmt17", "msmt17", tmp_path)
    paint(tmp_path/"LUP"/"images"/"a.jpg")
    with pytest.raises(ValueError, match="no ids"): data.open_pair("luperson", "msmt17", tmp_path)


# ---------------------------------------------------------------------------------------------- hostile trees, indexes


def test_hostile_names(tmp_path):
    root = market(tmp_path/"market1501")
    for name in "._0002_c1s1_000001_00.jpg", "Thumbs.db": (root/BOXES[0]/name).write_bytes(b"x")
    paint(root/BOXES[0]/"99999999999999999999_c1s1_1.jpg")   # no identity of this set
    paint(root/BOXES[0]/"0044_c2s1 with space ü.jpg")
    (root/BOXES[0]/"loop").symlink_to(root, target_is_directory=False)
    (root/BOXES[0]/"self").symlink_to(root/BOXES[0]/"self")
    (root/BOXES[0]/"self.d").symlink_to(root/BOXES[0]/"self.d")
    os.mkfifo(root/BOXES[0]/"0002_c2s1_000009_00.jpg")  # would be read for ever
    shutil.rmtree(root/"query")
    boxes(root, [], ["0005_c1s1_1.jpg"], [])
    names = data.list_images(root/BOXES[0])
    assert len([n for n in names if "/" not in n]) == 8 and not any("loop/loop" in n for n in names)
    (root/BOXES[0]/"loop").unlink()
    ds = data.open_dataset("market1501", tmp_path)
    assert len(ds.train) == 7 and "1 of 8 images skipped" in ds.notes[0]


def test_newline_and_undecodable_names(tmp_path):
    pids, cams, rows = data.parse_names(["0001_c1s1\n9999_c9.jpg", "x\n0002_c2.jpg", "a/b\n/0003_c3.jpg"], data.PID_CAM)
    assert pids.tolist() == [1, 3] and cams.tolist() == [1, 3] and rows.tolist() == [0, 2]
    try: (tmp_path/os.fsdecode(b"\xff_a.jpg")).write_bytes(b"x")
    except OSError: pytest.skip("file system refuses the name")
    paint(tmp_path/"b.jpg")
    with pytest.warns(UserWarning, match="not UTF-8.*rename"): ds = data.open_dataset("folder", tmp_path)
    assert len(ds.train) == 1 and check(ds).ok


def test_empty_and_foreign_folders(tmp_path):
    for folder in BOXES: (tmp_path/"market1501"/folder).mkdir(parents=True)
    with pytest.raises(ValueError, match="no image in.*holds nothing"): data.open_dataset("market1501", tmp_path)
    for folder in BOXES: paint(tmp_path/"market1501"/folder/"holiday.jpg")
    with pytest.raises(ValueError, match="none of the 1 names.*'holiday.jpg'.*0002_c1s1"): data.open_dataset("market1501", tmp_path)
    for folder in BOXES: paint(tmp_path/"market1501"/folder/"0001_c7s1_1.jpg")
    with pytest.raises(ValueError, match=r"cameras \[7\].*another data set"): data.open_dataset("market1501", tmp_path)


def test_read_only_folder(tmp_path, monkeypatch):
    market(tmp_path/"market1501")
    monkeypatch.setattr(data, "CACHED_FROM", 1)
    monkeypatch.setenv("REIDBOOK_CACHE", str(tmp_path/"nope"/"deep"))
    (tmp_path/"nope").write_text("a file where the cache should be")
    ds = data.open_dataset("market1501", tmp_path)  # no index can be written: no matter
    assert len(ds.train) == 6

    def refuse(*args, **kwargs): raise PermissionError(13, "Permission denied")
    for module in data, pictures: monkeypatch.setattr(module, "write_atomic", refuse)
    with pytest.warns(UserWarning, match="cannot be written"): images = load_images(ds.train["path"], (8, 4), cache=tmp_path/"cache")
    assert images.shape == (6, 3, 8, 4)


def test_index_is_used_and_invalidated(tmp_path, monkeypatch):
    monkeypatch.setenv("REIDBOOK_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(data, "CACHED_FROM", 3)
    tree = tmp_path/"tree"
    for name in "a.jpg", "sub/b.jpg", "sub/c d.jpg": paint(tree/name)
    past = time.time() - 60
    for folder in tree, tree/"sub": os.utime(folder, (past, past))
    expected = ["a.jpg", "sub/b.jpg", "sub/c d.jpg"]
    assert data.list_images(tree) == expected and len(list((tmp_path/"cache").glob("index-*.txt"))) == 1
    calls, scan = [], data.scan
    monkeypatch.setattr(data, "scan", lambda folder: calls.append(folder) or scan(folder))
    assert data.list_images(tree) == expected and not calls  # from the index
    paint(tree/"sub"/"new.jpg")
    assert "sub/new.jpg" in data.list_images(tree) and len(calls) == 1
    (tree/"sub"/"b.jpg").rename(tree/"sub"/"renamed.jpg")
    assert "sub/renamed.jpg" in data.list_images(tree) and len(calls) == 2
    next((tmp_path/"cache").glob("index-*.txt")).write_bytes(b"{broken")
    assert len(data.list_images(tree)) == 4


def test_a_million_names():
    names = [f"{i % 5000:04}_c{i % 15 + 1}s1_{i:07}.jpg" for i in range(1_000_000)]
    start = time.time()
    pids, cams, rows = data.parse_names(names, data.PID_CAM)
    table = data.make_table("/data", names, pids, cams)
    assert len(table) == 10**6 and time.time() - start < 20


# ---------------------------------------------------------------------------------------------- pixels


def test_load_images_is_the_papers_resize(tmp_path):
    paths = [paint(tmp_path/f"{n}.png", size=(20 + n, 50)) for n in range(70)]
    images = load_images(paths, (32, 16), workers=3)
    for row, path in enumerate(paths):
        expected = np.asarray(Image.open(path).convert("RGB").resize((16, 32), Image.BICUBIC)).transpose(2, 0, 1)
        assert_array_equal(images[row], expected)
    assert images.dtype == np.uint8 and load_images([], (4, 2)).shape == (0, 3, 4, 2)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_modes(tmp_path, mode):
    path = tmp_path/("a.jpg" if mode == "CMYK" else "a.png")
    (Image.new(mode, (8, 16)) if mode == "I;16" else Image.new("RGB", (8, 16), (10, 200, 30)).convert(mode)).save(path)
    assert load_images([path], (16, 8)).shape == (1, 3, 16, 8)


def test_image_cache(tmp_path):
    paths = [paint(tmp_path/"set"/f"{n}.jpg") for n in range(3)]
    first = np.array(load_images(paths, (8, 4), cache=tmp_path/"cache"))
    again = load_images(paths, (8, 4), cache=tmp_path/"cache")
    assert isinstance(again, np.memmap) and not again.flags.writeable and (first == again).all()
    assert load_images(paths, (4, 4), cache=tmp_path/"cache").shape[2] == 4 and len(list((tmp_path/"cache").iterdir())) == 2
    paint(paths[1], seed=99)
    os.utime(paths[1], (1, 1))
    assert (load_images(paths, (8, 4), cache=tmp_path/"cache")[1] != first[1]).any()  # stale copy not used
    for file in (tmp_path/"cache").iterdir(): file.write_bytes(file.read_bytes()[:100])     # half-written copies not used
    assert (load_images(paths, (8, 4), cache=tmp_path/"cache")[0] == first[0]).all()
    shutil.copytree(tmp_path/"set", tmp_path/"moved")
    assert files_key([str(p) for p in paths]) == files_key([str(tmp_path/"moved"/p.name) for p in paths])


def test_cache_is_atomic(tmp_path):
    good, bad = paint(tmp_path/"a.jpg"), tmp_path/"b.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 2 images cannot be read"): load_images([good, bad], (8, 4), cache=tmp_path/"cache")
    assert list((tmp_path/"cache").iterdir()) == []
    with pytest.raises(ValueError, match="missing.jpg"): load_images([good, tmp_path/"missing.jpg"], (8, 4), cache=tmp_path/"cache")


def test_unreadable_images_are_named_together(tmp_path):
    good = paint(tmp_path/"good.jpg")
    (tmp_path/"half.jpg").write_bytes(good.read_bytes()[:-200])
    (tmp_path/"empty.jpg").touch()
    (tmp_path/"page.jpg").write_text("<html>")
    Image.new("1", (8000, 8000)).save(tmp_path/"bomb.png")
    (tmp_path/"gone.jpg").symlink_to(tmp_path/"nowhere.jpg")
    (tmp_path/"self.jpg").symlink_to(tmp_path/"self.jpg")
    ds = data.open_dataset("folder", tmp_path)
    with pytest.raises(ValueError, match="6 of 7 images cannot be read") as error: load_images(ds.train["path"], (8, 4))
    assert all(name in str(error.value) for name in ("half", "empty", "page", "bomb", "gone"))
    report = check(ds)
    assert len(report.files) == 6 and not report.ok and "images that cannot be read: 6" in report.errors[0]
    assert "decompression bomb" in report.files.set_index("path").loc["bomb.png", "problem"]


def test_digest(tmp_path):
    ds = data.open_dataset("market1501", market(tmp_path/"a"/"market1501").parent)
    shutil.copytree(tmp_path/"a", tmp_path/"b")
    other = data.open_dataset("market1501", tmp_path/"b")
    assert data.dataset_digest(ds) == data.dataset_digest(other)
    paint(tmp_path/"b"/"market1501"/"query"/"0011_c1s1_1.jpg")
    assert data.dataset_digest(data.open_dataset("market1501", tmp_path/"b")) != data.dataset_digest(ds)


def test_show_images(tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    images = np.zeros((5, 3, 8, 4), np.uint8)
    assert len(show_images(images, titles="abcde", ncols=3, frames=["r"] * 5).axes) == 6
    assert len(show_images([paint(tmp_path/"a.jpg")], ncols=1).axes) == 1
    with pytest.raises(ValueError, match="no image"): show_images([])


# ---------------------------------------------------------------------------------------------- transforms


def slow(images, draw, compat=False):
    "torchvision, one image at a time, in the order of the released code."
    out = []
    for n, image in enumerate(torch.as_tensor(images)):
        if draw.flip[n]: image = F.horizontal_flip(image)
        image = F.crop(F.pad(image, [draw.pad] * 4), int(draw.top[n]), int(draw.left[n]), *images.shape[2:]) / 255
        b, c, s = draw.factor[n].tolist()
        image = F.normalize(F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(image, b), c), s), MEAN, STD)
        fill = torch.tensor(MEAN)[:, None, None] if compat else torch.zeros(3, 1, 1)
        out.append(F.erase(image, *draw.box[n].tolist(), fill))
    return torch.stack(out)


@pytest.mark.parametrize("size", [(64, 32), (256, 128), (33, 47)])
@pytest.mark.parametrize("compat", [False, True])
def test_augment_equals_torchvision(size, compat):
    images = np.random.default_rng(0).integers(0, 256, (24, 3, *size), dtype=np.uint8)
    draw = draw_augmentation(24, size, torch.Generator().manual_seed(1), jitter=0.3)
    assert_allclose(augment(images, draw, compat), slow(images, draw, compat), atol=2e-5)
    assert_allclose(pictures.test_transform(images), F.normalize(torch.as_tensor(images) / 255, MEAN, STD), atol=1e-6)


def test_draws():
    draw = draw_augmentation(20_000, (256, 128), torch.Generator().manual_seed(0))
    assert abs(draw.flip.float().mean() - .5) < .02 and set(draw.top.tolist()) == set(draw.left.tolist()) == set(range(21))
    on = draw.box[:, 2] > 0
    y, x, h, w = draw.box[on].T
    area, ratio = h * w / (256 * 128), h / w
    assert abs(on.float().mean() - .5) < .02 and area.min() > .018 and area.max() < .41 and ratio.min() > .28 and ratio.max() < 3.5
    assert (y >= 0).all() and (x >= 0).all() and (y + h <= 256).all() and (x + w <= 128).all() and (draw.factor == 1).all()


def test_switches_do_not_disturb_each_other():
    a = draw_augmentation(32, (64, 32), torch.Generator().manual_seed(0))
    b = draw_augmentation(32, (64, 32), torch.Generator().manual_seed(0), erase=0, jitter=.4)
    assert (a.flip == b.flip).all() and (a.top == b.top).all() and (b.box[:, 2:] == 0).all()
    images = torch.zeros(4, 3, 64, 32, dtype=torch.uint8)
    g = torch.Generator().manual_seed(0)
    first, second = train_transform(images + 90, g), train_transform(images + 90, g)
    assert (first != second).any() and first.dtype == torch.float32
    plain = train_transform(images + 90, g, flip=0, pad=0, erase=0)
    assert_allclose(plain, pictures.test_transform(images + 90))


def test_transform_refuses_other_shapes():
    g = torch.Generator()
    for images in (np.zeros((2, 3, 8, 4), np.float32), np.zeros((3, 8, 4), np.uint8), torch.zeros(2, 8, 4, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="B x 3 x H x W of uint8"): pictures.test_transform(images)
    assert train_transform(np.zeros((1, 3, 8, 4), np.uint8), g).shape == (1, 3, 8, 4)
    read_only = np.zeros((2, 3, 8, 4), np.uint8)
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.test_transform(read_only)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_draws_on_a_gpu():
    images = torch.randint(0, 256, (16, 3, 64, 32), dtype=torch.uint8)
    one = train_transform(images, torch.Generator().manual_seed(3), jitter=.2)
    two = train_transform(images.cuda(), torch.Generator().manual_seed(3), jitter=.2)
    assert two.is_cuda
    assert_allclose(one, two.cpu(), atol=1e-5)


# ---------------------------------------------------------------------------------------------- samplers


def take(batches, n): return [next(batches) for _ in range(n)]


@pytest.mark.parametrize("name, prefer", [("rmgs", True), ("rmgs_nocam", False)])
def test_released_order_pplr(golden, name, prefer):
    g = golden("pplr_sampler")
    generators = released_generators(json.loads(str(g["args"]))["seed"])
    for epoch in (0, 1):
        assert_array_equal(released_order(g["in_pid"], g["in_cam"], 4, generators, prefer), g[f"out_{name}_e{epoch}"])


def test_released_order_icsr_and_purification(golden):
    g = golden("samplers")
    labels, cams = g["icsr_sampler_items_label"], g["icsr_sampler_items_cam"]
    assert_array_equal(released_order(labels, cams, 4, released_generators(11)), g["icsr_sampler_order"])
    assert_array_equal(released_order(labels, cams, 4, released_generators(11), False), g["icsr_sampler_order_nocam"])
    labels, cams = g["purification_sampler_items_label"], g["purification_sampler_items_cam"]
    assert_array_equal(released_order(labels, cams, 16, released_generators(11)), g["purification_sampler_order"])


def test_compat_batches(golden):
    g = golden("pplr_sampler")
    batches = pk_batches(g["in_pid"], g["in_cam"], batch_size=64, instances=4, rng=11, compat=True)
    got = take(batches, 4)
    assert_array_equal(np.concatenate(got[:2]), g["out_rmgs_e0"][:128])  # what is left of a pass is dropped
    assert_array_equal(np.concatenate(got[2:]), g["out_rmgs_e1"][:128])
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(batches, 3)
    assert (torch.get_rng_state() == before[0]).all() and (np.random.get_state()[1] == before[1]).all()
    labels = np.repeat(np.arange(16), 1)
    with pytest.raises(ValueError, match="StopIteration"): next(pk_batches(labels, batch_size=64, instances=4, rng=0, compat=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=4, max_size=12), st.integers(0, 10**6), st.booleans(), st.sampled_from([2, 3, 4]))
def test_pk_batches_are_exact(sizes, seed, with_cams, instances):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), [-1] * 5])
    labels = rng.permutation(labels)
    cams = rng.integers(0, 3, len(labels)) if with_cams else None
    batches = take(pk_batches(labels, cams, batch_size=3 * instances, instances=instances, rng=seed), 3 * len(sizes))
    visits = np.zeros(len(sizes), int)
    for batch in batches:
        groups = batch.reshape(3, instances)
        assert batch.dtype == np.int64 and (labels[batch] >= 0).all()
        assert all(len(set(labels[g])) == 1 for g in groups) and len({labels[g[0]] for g in groups}) == 3
        for g in groups:
            size = sizes[labels[g[0]]]
            assert len(set(g)) == min(size, instances)              # repeats only when the cluster is too small
            assert np.unique(g, return_counts=True)[1].max() == -(-instances // size)
            if with_cams:
                others = ((labels == labels[g[0]]) & (cams != cams[g[0]])).sum()
                assert len({r for r in g if cams[r] != cams[g[0]]}) == min(others, instances - 1)
        visits[[labels[g[0]] for g in groups]] += 1
    assert set(visits) == {9}  # every cluster as often as every other


def test_dealing_covers_everything():
    labels = np.repeat([0, 1, 2, 3], 10)
    batches = pk_batches(labels, batch_size=8, instances=2, rng=0)
    assert len(set(np.concatenate(take(batches, 5)).tolist())) == 40  # five visits of 2 images: all 10, none twice


def test_cameras_are_ignored_when_asked():
    labels, cams = np.repeat([0, 1], 50), np.tile([0] * 45 + [1] * 5, 2)
    def mixed(prefer):
        batches = pk_batches(labels, cams, batch_size=2, instances=2, rng=0, prefer_other_cameras=prefer)
        return np.mean([len(set(cams[batch])) > 1 for batch in take(batches, 200)])

    assert mixed(True) == 1 and mixed(False) < .5


def test_sampler_errors():
    with pytest.raises(ValueError, match="2 clusters, but a batch of 64 is 16 clusters x 4"): pk_batches([0, 0, 1, -1], rng=0)
    with pytest.raises(ValueError, match="not a multiple"): pk_batches([0, 1], batch_size=10, instances=4, rng=0)
    with pytest.raises(ValueError, match="one per image"): pk_batches([0, 1], [0], batch_size=2, instances=1, rng=0)
    with pytest.raises(ValueError, match="one number per image"): pk_batches([[0, 1]], batch_size=2, instances=1, rng=0)
    with pytest.raises(ValueError, match="0 clusters"): pk_batches([-1, -1], batch_size=2, instances=1, rng=0)
    with pytest.raises(ValueError, match="2 labelled images"): group_batches([0, 0, -1], rng=0)


def test_same_seed_same_batches():
    labels = np.random.default_rng(0).integers(-1, 20, 300)
    for compat in (False, True):
        make = lambda: pk_batches(labels, batch_size=16, instances=4, rng=np.random.default_rng(5), compat=compat)
        one, two = take(make(), 9), take(make(), 9)
        assert_array_equal(one, two)


def test_shard():
    labels = np.repeat(np.arange(20), 6)
    make = lambda: pk_batches(labels, batch_size=16, instances=4, rng=3)
    whole = take(make(), 5)
    parts = [take(shard(make(), rank, 4), 5) for rank in range(4)]
    assert_array_equal(np.concatenate(parts, 1), whole)
    assert all(len(set(labels[p])) == 1 for part in parts for p in part)
    with pytest.raises(ValueError, match="rank 4 of 4"): next(shard(make(), 4, 4))
    with pytest.raises(ValueError, match="evenly"): next(shard(make(), 0, 3))


def test_group_batches():
    labels = np.array([0] * 10 + [1] * 7 + [2, 3, -1, -1])
    batches = group_batches(labels, batch_size=5, group=4, rng=0)
    one_pass = take(batches, 3)
    drawn = np.concatenate(one_pass)
    assert len(set(drawn)) == 15 and (labels[drawn] >= 0).all()
    big = next(group_batches(np.repeat([0, 1], 32), batch_size=32, group=32, rng=0))
    assert len(set(np.repeat([0, 1], 32)[big])) == 1  # a whole cluster stays together


# ---------------------------------------------------------------------------------------------- check


def small_official(monkeypatch, **counts):
    monkeypatch.setitem(data.LAYOUTS, "market1501", data.LAYOUTS["market1501"]._replace(official=counts, cams=(1, 2, 3, 4, 6)))


def test_check_passes_a_complete_set(tmp_path, monkeypatch):
    market(tmp_path/"market1501")
    small_official(monkeypatch, train=(6, 3), query=(2, 2), gallery=(3, 3))
    report = check(data.open_dataset("market1501", tmp_path), workers=2, progress=False)
    assert report.ok and not report.warnings, str(report)
    assert report.table.loc["train", "official images"] == 6 and "ready" in str(report) and "| train | 6 |" in report._repr_markdown_()
    assert json.loads(report.to_json())["ok"] is True


def test_check_counts(tmp_path, monkeypatch):
    market(tmp_path/"market1501")
    report = check(data.open_dataset("market1501", tmp_path))
    assert "train: images 6, 12,936 expected" in report.errors and "gallery: ids 3, 751 expected" in report.errors
    twin = data.LAYOUTS["veri776"]._replace(official=dict(train=(6, 3), query=(2, 2), gallery=(3, 3)))
    monkeypatch.setitem(data.LAYOUTS, "veri776", twin)
    assert any("counts are those of veri776" in e for e in check(data.open_dataset("market1501", tmp_path)).errors)


def test_check_copies(tmp_path, monkeypatch):
    root = market(tmp_path/"market1501")
    shutil.copy(root/"query"/"0005_c1s1_000001_00.jpg", root/"bounding_box_train"/"0050_c1s1_000001_00.jpg")
    shutil.copy(root/"query"/"0009_c2s1_000001_00.jpg", root/"bounding_box_test"/"0009_c2s1_000009_00.jpg")  # same id, same camera
    shutil.copy(root/BOXES[0]/"0002_c1s1_000001_00.jpg", root/BOXES[0]/"0002_c1s1_000002_00.jpg")
    report = check(data.open_dataset("market1501", tmp_path))
    assert any("train and test" in e for e in report.errors) and any("left out by the evaluation" in w for w in report.warnings)
    assert any("one split" in w for w in report.warnings) and len(report.files) == 6
    shutil.copy(root/"query"/"0009_c2s1_000001_00.jpg", root/"bounding_box_test"/"0009_c6s1_000009_00.jpg")  # same id, another camera
    assert any("another camera" in e for e in check(data.open_dataset("market1501", tmp_path)).errors)
    shutil.copy(root/BOXES[0]/"0002_c1s1_000001_00.jpg", root/BOXES[0]/"0007_c1s1_000002_00.jpg")
    assert any("two ids" in w for w in check(data.open_dataset("market1501", tmp_path)).warnings)


def test_check_listed_twice_missing_and_lonely(tmp_path):
    for name in "abc": paint(tmp_path/f"{name}.jpg")
    rows = ["path,pid,cam,split", "a.jpg,1,1,train", "b.jpg,2,1,query", "b.jpg,2,1,gallery", "gone.jpg,1,1,train", "c.jpg,3,1,train"]
    (tmp_path/"set.csv").write_text("\n".join(rows))
    report = check(data.open_dataset("csv", tmp_path))
    assert any("listed twice" in e for e in report.errors) and any("No such file" in e for e in report.errors)
    assert any("one camera only" in w for w in report.warnings) and any("single image: 1" in w for w in report.warnings)
    assert any("1 of 1 have no gallery image" in e for e in report.errors)


def test_check_unlabelled(tmp_path):
    paint(tmp_path/"a.jpg", size=(6, 12))
    report = check(data.open_dataset("folder", tmp_path))
    assert report.ok and any("ids are unknown" in w for w in report.warnings)
    assert any("plain identity sampling" in w for w in report.warnings)
    assert any("lower than 16 pixels" in w for w in report.warnings) and "-" in str(report)
    empty = data.Dataset("none", tmp_path, *(data.make_table("", []) for _ in range(3)))
    assert "train: no images" in check(empty).errors


def test_answerable():
    query = pd.DataFrame(dict(pid=[1, 1, 2, 3], cam=[0, 1, 0, 0]))
    gallery = pd.DataFrame(dict(pid=[1, 2, 2, 4], cam=[0, 0, 0, 1]))
    assert answerable(query, gallery).tolist() == [False, True, False, False]


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png16(path, values, colour_type):
    "A PNG of 16 bits per value, which Pillow writes for grey only."
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("colour_type, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_keep_the_upper_eight(tmp_path, colour_type, channels):
    values = np.random.default_rng(0).integers(0, 65536, (6, 4, channels))
    if channels in (2, 4): values[..., -1] = 65535  # opaque
    path = png16(tmp_path / "deep.png", values, colour_type)
    want = (values >> 8)[..., :3 if channels > 2 else 1].repeat(3 if channels < 3 else 1, axis=2)
    assert_array_equal(np.asarray(open_image(path)), want)
    assert_array_equal(load_images([path], (6, 4))[0].transpose(1, 2, 0), want)
    assert inspect_file(path).kinds == ("16 bits",)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_turned_as_exif_says(tmp_path, suffix, turn):
    image, exif = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 32, 3), dtype=np.uint8)), Image.Exif()
    exif[ORIENTATION] = turn
    image.save(path := tmp_path / f"turned{suffix}", exif=exif)
    with Image.open(path) as opened: want = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert_array_equal(np.asarray(open_image(path)), want)
    found = inspect_file(path)
    assert found.size == want.shape[1::-1] and found.kinds == ("turned",) * (turn > 1) and not found.problem


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L key"])
def test_transparent_becomes_black(tmp_path, mode):
    "Half of the image is transparent; what the painter left below is not seen."
    grey = np.full((8, 8), 200, np.uint8)
    alpha = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8)[None].repeat(8, 0)
    path = tmp_path / "a.png"
    if mode == "P":
        image = Image.fromarray((alpha > 0).astype(np.uint8), "L").convert("P")
        image.putpalette([9, 200, 9, 200, 200, 200])
        image.save(path, transparency=0)
    elif mode == "L key": Image.fromarray(np.where(alpha, 200, 7).astype(np.uint8)).save(path, transparency=7)
    else: Image.fromarray(np.dstack([grey] * (len(mode) - 1) + [alpha]), mode).save(path)
    got = np.asarray(open_image(path))
    assert (got[:, :4] == 0).all() and (got[:, 4:] == 200).all()
    assert inspect_file(path).kinds == ("transparent",)


def test_broken_exif_and_cmyk_are_read(tmp_path):
    image = Image.new("RGB", (8, 16), (10, 200, 30))
    image.save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name in ("exif", "cmyk"):
        path = tmp_path / f"{name}.jpg"
        assert np.abs(np.asarray(open_image(path)).astype(int) - (10, 200, 30)).max() < 12
        assert inspect_file(path)[1:] == ("", (8, 16), ())


def test_32_bits_have_no_scale(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tif")
    path = (tmp_path / "a.tif").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no agreed scale"): open_image(path)
    assert "no agreed scale" in inspect_file(path).problem


def test_check_counts_unusual_images(tmp_path):
    folder, exif = tmp_path / "own", Image.Exif()
    for i in range(4): paint(folder / f"{i}.png")
    exif[ORIENTATION] = 6
    Image.new("RGB", (20, 40)).save(folder / "turned.jpg", exif=exif)
    png16(folder / "deep.png", np.full((20, 20, 4), 30000), 6)
    warnings = "\n".join(check(data.open_dataset("folder", folder), progress=False).warnings)
    assert "images of 16 bits per value (the upper 8 are used): 1, first deep.png" in warnings
    assert "images turned as their Exif says: 1, first turned.jpg" in warnings
    assert "images with transparent pixels (they become black): 1, first deep.png" in warnings


def test_copies_of_another_decoding_are_not_used(tmp_path, monkeypatch):
    path = paint(tmp_path / "a.png")
    now = files_key([str(path)])
    monkeypatch.setattr("reidbook.images.DECODED", "as it was")
    assert files_key([str(path)]) != now


def test_temporary_names_are_unpredictable_and_follow_no_link(tmp_path, monkeypatch):
    (file, first), (other, second) = (data.new_temporary(tmp_path/"a.npy") for _ in range(2))
    assert first != second and data.TEMPORARY.fullmatch(first.name) and first.parent == tmp_path
    file.close(), other.close()
    data.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(data.secrets, "token_hex", lambda n: "0" * 2 * n)  # as if one could know
    victim, trap = tmp_path/"victim", tmp_path/f".a.npy.{'0' * 16}.tmp"
    victim.write_text("mine")
    trap.symlink_to(victim)
    with pytest.raises(FileExistsError): data.write_atomic(tmp_path/"a.npy", lambda f: f.write(b"x"))
    data.sweep(tmp_path)
    assert victim.read_text() == "mine" and trap.is_symlink()  # neither written to nor removed


def test_the_sweep_leaves_pipes_and_folders_of_such_names(tmp_path):
    for number, make in enumerate([os.mkfifo, os.mkdir]): make(tmp_path/f".a.{number:016x}.tmp")
    data.sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def write_slowly(paths, cache, ready):
    "A child that decodes into the cache, and is never done."
    import time
    from reidbook import images
    def decode(*args): ready.set(); time.sleep(60)
    images.decode_into = decode
    images.load_images(paths, (8, 4), cache=cache)


def test_a_killed_process_leaves_no_half_image_cache(tmp_path):
    "What a living process holds stays; what a killed one left, the next start removes."
    import multiprocessing
    context = multiprocessing.get_context("spawn")
    Image.new("RGB", (4, 8)).save(tmp_path/"a.jpg")
    paths, cache, ready = [tmp_path/"a.jpg"], tmp_path/"cache", context.Event()
    child = context.Process(target=write_slowly, args=(paths, cache, ready))
    child.start()
    assert ready.wait(60)
    load_images(paths, (4, 4), cache=cache)
    assert sorted(p.suffix for p in cache.iterdir()) == [".npy", ".tmp"]  # it is still writing
    child.kill(), child.join()
    assert len(list(cache.iterdir())) == 2
    load_images(paths, (4, 4), cache=cache)
    assert [p.suffix for p in cache.iterdir()] == [".npy"]


def test_moved_names_answer_with_a_warning():
    assert {m for m in data._MOVED} == {"images", "sampling", "checks"}
    for module, names in data._MOVED.items():
        for name in names:
            with pytest.warns(DeprecationWarning, match=f"data.{name} is {module}.{name} now"): it = getattr(data, name)
            assert it is getattr(importlib.import_module(f"reidbook.{module}"), name)
    with pytest.raises(AttributeError, match="no attribute 'load_imags'"): data.load_imags
