"The synthetic set: same bytes whoever makes it, whole or not at all, look-alikes that look alike, floors that stay low."
import dataclasses, json, re, subprocess, sys

import numpy as np
import pytest
from PIL import Image

from reidbook import synthetic
from reidbook.data import column, open_dataset
from reidbook.images import load_images
from reidbook.evaluation import evaluate
from reidbook.synthetic import CLOTHES, FOLDERS, PRESETS, histogram_features, identity, is_lookalike, make, pixel_features, render

TINY = PRESETS["synthetic-tiny"]


def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory): return make("synthetic-tiny", tmp_path_factory.mktemp("one"), workers=1)


@pytest.fixture
def other(monkeypatch):
    "`other(**changes)`: another preset under the name synthetic-tiny."
    def change(**changes): monkeypatch.setitem(PRESETS, "synthetic-tiny", dataclasses.replace(TINY, **changes))
    return change


def test_same_bytes_with_two_workers(tiny, tmp_path): assert contents(tiny) == contents(make("synthetic-tiny", tmp_path, workers=2))


def test_same_bytes_in_a_fresh_process_in_another_order(tiny, tmp_path):
    code = """import sys; from reidbook.synthetic import PRESETS, render
p = PRESETS["synthetic-tiny"]; render(p, 1, 3, 2, 0); render(p, 0, 5, 1, 2).save(sys.argv[1], quality=90)"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jpg")], check=True)
    name = synthetic._file_of(TINY, 0, 5, 1, 2)
    here = tmp_path / "b.jpg"
    render(TINY, 0, 5, 1, 2).save(here, quality=90)
    assert (tmp_path / "a.jpg").read_bytes() == here.read_bytes()
    assert (tiny / name).read_bytes() == here.read_bytes()


def test_another_seed_differs(tiny, tmp_path, other):
    other(seed=99)
    before, after = contents(tiny), contents(make("synthetic-tiny", tmp_path, workers=1))
    assert not set(before.values()) & set(after.values())


def test_every_image_differs(tiny): assert len(set(contents(tiny).values())) == len(contents(tiny))


def test_layout_and_counts(tiny):
    card = json.loads((tiny / "card.json").read_text())
    assert card["version"] == synthetic.VERSION and card["seed"] == TINY.seed and card["parameters"]["train_ids"] == TINY.train_ids
    for folder in FOLDERS:
        files = sorted((tiny / folder).iterdir())
        assert len(files) == card["counts"][folder]
        assert all(re.fullmatch(r"\d{4}_c[1-4]s1_\d{6}_\d\d\.jpg", f.name) for f in files)
        with Image.open(files[0]) as image: assert image.size == TINY.size[::-1] and image.mode == "RGB"


def test_reads_as_a_dataset(tiny):
    data = open_dataset("synthetic-tiny", tiny.parent)
    assert sorted(data.train.pid.unique()) == list(range(TINY.train_ids))
    assert data.query.pid.nunique() == TINY.test_ids and len(data.query) == TINY.test_ids * TINY.visits
    assert not data.query.duplicated(["pid", "cam"]).any()
    assert (data.gallery.pid == 0).sum() == TINY.distractors
    assert set(data.query.pid) == set(data.gallery.pid) - {0}
    assert set(data.query.cam) == set(range(TINY.cameras))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_promise_what_they_render(name):
    preset = PRESETS[name]
    keys = [(split, pid, cam, k) for split, n in enumerate((preset.train_ids, preset.test_ids, preset.distractors)) for pid in range(n)
            for cam, k in synthetic._images_of(preset, split, pid)]
    names = [synthetic._file_of(preset, *key) for key in keys]
    assert len(set(names)) == len(names)
    assert render(preset, *keys[-1]).size == preset.size[::-1]
    if name == "synthetic-large": assert preset.cameras == 12 and preset.train_ids >= 1000 and sum(k[0] == 0 for k in keys) >= 20_000


def test_returns_at_once_when_ready(tiny, monkeypatch):
    monkeypatch.setattr(synthetic, "_render_all", None)  # calling it would fail
    assert make("synthetic-tiny", tiny.parent) == tiny


@pytest.mark.parametrize("damage", [lambda folder: next((folder / "query").iterdir()).unlink(), lambda folder: (folder / "card.json").write_text("{"),
                                    lambda folder: (folder / "card.json").write_text('{"version": 0}')])
def test_stale_or_incomplete_is_made_again(tiny, tmp_path, capsys, damage):
    folder = make("synthetic-tiny", tmp_path, workers=1)
    damage(folder)
    make("synthetic-tiny", tmp_path, workers=1)
    assert contents(folder) == contents(tiny) and "making it again" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["synthetic-tiny"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_leaves_nothing(tmp_path, monkeypatch, workers):
    draw = synthetic.DRAW["person"]
    def crash(preset, split, pid, cam, rng):
        if (split, pid) == (1, 3): raise OSError("disk full")
        return draw(preset, split, pid, cam, rng)
    monkeypatch.setitem(synthetic.DRAW, "person", crash)
    with pytest.raises(OSError, match="disk full"): make("synthetic-tiny", tmp_path, workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_keeps_the_older_set(tmp_path, monkeypatch, other):
    before = contents(make("synthetic-tiny", tmp_path, workers=1))
    other(seed=99)
    monkeypatch.setitem(synthetic.DRAW, "person", None)
    with pytest.raises(TypeError): make("synthetic-tiny", tmp_path, workers=1)
    assert contents(tmp_path / "synthetic-tiny") == before


def test_a_quicker_process_wins(tiny, tmp_path, monkeypatch):
    render_all = synthetic._render_all
    def raced(*args):
        monkeypatch.setattr(synthetic, "_render_all", render_all)
        make("synthetic-tiny", tmp_path, workers=1)
        return render_all(*args)
    monkeypatch.setattr(synthetic, "_render_all", raced)
    assert contents(make("synthetic-tiny", tmp_path, workers=1)) == contents(tiny)
    assert [p.name for p in tmp_path.iterdir()] == ["synthetic-tiny"]


def test_refusals(tmp_path, other):
    with pytest.raises(ValueError, match="no synthetic set is called 'x'.*synthetic-small"): make("x", tmp_path)
    (tmp_path / "synthetic-tiny").mkdir()
    (tmp_path / "synthetic-tiny" / "holiday.jpg").touch()
    with pytest.raises(ValueError, match="no card.json"): make("synthetic-tiny", tmp_path)
    assert (tmp_path / "synthetic-tiny" / "holiday.jpg").exists()
    other(kind="cat")
    with pytest.raises(ValueError, match="'cat'.*person"): make("synthetic-tiny", tmp_path)


@pytest.mark.parametrize("share", [0., .15, .5, 1.])
def test_share_of_lookalikes(share):
    preset = dataclasses.replace(TINY, lookalike=share)
    assert abs(sum(is_lookalike(preset, pid) for pid in range(200)) - 200 * share) <= 1


@pytest.mark.parametrize("name", ["synthetic-small", "synthetic-lookalike"])
@pytest.mark.parametrize("split", [0, 1])
def test_lookalikes_share_all_clothes_but_one(name, split):
    preset = PRESETS[name]
    for pid in range(1, preset.test_ids):
        one, two = identity(preset, split, pid), identity(preset, split, pid - 1)
        different = [part for part in CLOTHES if getattr(one, part) != getattr(two, part)]
        if is_lookalike(preset, pid): assert len(different) == 1 and different[0] in ("upper", "lower", "carried")
        else: assert len(different) >= 2


def test_streams_do_not_collide():
    "SeedSequence pads with zeros: keys of different lengths or purposes must still differ."
    keys = [("who", 1), ("who", 1, 1), ("shot", 1), ("shot", 1, 0, 0, 0, 1), ("walk", 1, 0, 0, 0), ("cam", 1, 0), ("scen", 1, 0)]
    assert len({synthetic._rng(*key).random() for key in keys}) == len(keys)


def test_features_are_unit_rows_and_refuse_stamps():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 64, 32), dtype=np.uint8)
    for feats in (pixel_features(images), histogram_features(images), histogram_features(images, np.array([0, 0, 1, 1, 1]))):
        assert feats.dtype == np.float32 and feats.shape[0] == 5
        np.testing.assert_allclose(np.linalg.norm(feats, axis=1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 16 x 8"): pixel_features(images[:, :, :8])


def test_cheap_descriptors_stay_low(tmp_path, monkeypatch):
    "On the demo's people (fewer training ids: they are not looked at) the floors lie between chance and half of a trained model."
    monkeypatch.setitem(PRESETS, "synthetic-small", dataclasses.replace(PRESETS["synthetic-small"], train_ids=1))
    make("synthetic-small", tmp_path)
    data = open_dataset("synthetic-small", tmp_path)
    tables = data.query, data.gallery
    images, n = np.concatenate([load_images(t.path, size=(128, 64)) for t in tables]), len(data.query)
    pids, cams = (np.concatenate([column(t, name) for t in tables]) for name in ("pid", "cam"))
    def score(feats): return evaluate(feats[:n], feats[n:], pids[:n], pids[n:], cams[:n], cams[n:]).mAP
    assert .05 < score(pixel_features(images)) < .15
    centred = score(histogram_features(images, cams))
    assert .05 < centred < .33
    assert score(histogram_features(images)) < .6 * centred  # colours lie until each camera is centred
