"One similarity for every method: `distance=camera` reaches each `labels`, and the plain one is what it was."
import json

import numpy as np
import pytest
import torch

from reidbook import neighbors, runs, training
from reidbook.cli import main
from reidbook.data import Dataset, open_dataset
from reidbook.methods.baseline import Baseline

SHORT = {"epochs": 2, "iterations": 2, "eval_every": 9}
OWN = {"icsr": dict(camera_epochs=1, camera_iterations=1), "mprd": dict(gcn_passes=0), "pplr": dict(camera=True)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(root): return open_dataset("synthetic-tiny", root)


def started(tiny, **settings): return training.start(tiny, Baseline, training.resolve(Baseline, tiny.name, **settings))


def same(a, b): return a.shape == b.shape and (a != b).nnz == 0


def test_the_plain_similarity_is_what_it_was(tiny):
    t = started(tiny)
    x = training.features(t, t.images).global_
    assert t.settings.distance == "jaccard" and (t.settings.k1, t.settings.k2) == (12, 4)
    assert same(t.method.similarity(t, x, 0), neighbors.jaccard_similarity(x, 12, 4))
    assert same(t.method.similarity(t, x, 0, k2=6), neighbors.jaccard_similarity(x, 12, 6))
    assert same(t.method.similarity(t, x), neighbors.jaccard_similarity(x, 12, 4, min_similarity=.4 - 1e-5))


@pytest.mark.parametrize("lists", ["end", "released"])
def test_the_setting_asks_for_the_cameras(tiny, lists):
    "Other heads in the first epoch; lists that run over are asked for with `camera_lists`."
    t = started(tiny, distance="camera", camera_k1=[3, 9], camera_k2=[4, 1], warm_k2=[1, 3], camera_lists=lists)
    t.cams = np.where(np.arange(len(t.cams)) < 3, 9, np.where(t.cams == 0, 1, t.cams))  # one camera of three images
    x = training.features(t, t.images).global_
    for t.epoch, heads in (0, (1, 3)), (1, (4, 1)), (2, (4, 1)):
        meant, released = (neighbors.camera_jaccard(x, t.cams, (3, 9), heads, compat=c) for c in (False, True))
        got = t.method.similarity(t, x, 0, k2=6)
        assert same(got, released if lists == "released" else meant) and (t.epoch == 0 or not same(meant, released))


def test_released_brings_the_lists_back():
    assert training.resolve(Baseline, "market1501", released=True).camera_lists == "released"
    s = training.resolve(Baseline, "market1501")
    assert (s.distance, s.camera_k1, s.camera_k2, s.warm_k2, s.camera_lists) == ("jaccard", [5, 20], [2, 4], [3, 3], "end")


@pytest.mark.parametrize("name", runs.method_names())
def test_every_method_trains_on_it(name, tiny, root, tmp_path, monkeypatch):
    "What `reidbook run` does, without the notebook around it: every similarity of all images comes from the camera-aware one."
    asked = []
    def counted(feats, cams, *words, **more):
        asked.append(len(feats))
        return neighbors.camera_jaccard(feats, cams, *words, **more)
    def plain(*words, **more): raise AssertionError("the plain similarity")
    monkeypatch.setattr(training, "camera_jaccard", counted)
    monkeypatch.setattr(training, "jaccard_similarity", plain)
    own = OWN.get(name, {})
    run = runs.begin("synthetic-tiny", name, root=root, out=tmp_path / "run", settings=SHORT | own | {"distance": "camera"})
    records = list(training.epochs(run.state))
    manifest = runs.finish(run)
    assert len(records) == run.state.settings.epochs and all(np.isfinite(r["loss"]) for r in records)
    assert manifest["status"] == "done" and 0 < manifest["metrics"]["mAP"] <= 1
    assert manifest["settings"]["distance"] == "camera" and "distance camera" in manifest["title"]
    assert len(asked) >= 2 and set(asked) == {len(tiny.train)}


def test_the_command(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path / "runs"))
    words = ["-p", "epochs=1", "-p", "iterations=2", "-p", "distance=camera", "-p", "camera_k2=[1, 3]"]
    assert main(["run", "--dataset", "synthetic-tiny", "--root", str(root), *words]) == 0, capsys.readouterr().err
    manifest = json.loads(next((tmp_path / "runs").glob("*/manifest.json")).read_text())
    assert manifest["status"] == "done" and manifest["settings"]["camera_k2"] == [1, 3]


def nameless(tiny):
    train = tiny.train.drop(columns="cam")
    return Dataset(tiny.name, tiny.root, train, tiny.query, tiny.gallery)


@pytest.mark.parametrize("name", ["baseline", "icsr", "purification"])
def test_unknown_cameras_are_refused_before_anything_is_written(name, tiny, root, tmp_path, monkeypatch):
    cls, said = runs.get_method(name), "distance=camera: synthetic-tiny has no camera numbers.*Give every image its camera.*distance=jaccard"
    settings = training.resolve(cls, tiny.name, distance="camera", **SHORT)
    with pytest.raises(ValueError, match=said): training.start(nameless(tiny), cls, settings, out=tmp_path / "a")
    monkeypatch.setattr(runs, "open_dataset", lambda *words: nameless(tiny))
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path / "runs"))
    with pytest.raises(ValueError, match=said): runs.execute("synthetic-tiny", name, root=root, settings={"distance": "camera"})
    assert list(tmp_path.iterdir()) == []


def test_without_cameras_the_plain_one_runs(tiny, tmp_path):
    settings = training.resolve(Baseline, tiny.name, **SHORT)
    assert len(list(training.epochs(training.start(nameless(tiny), Baseline, settings, out=tmp_path / "a")))) == 2


def test_infomap_has_no_distance():
    with pytest.raises(ValueError, match="clustering=dbscan or agglomerative"): training.resolve(runs.get_method("icsr"), "market1501", distance="camera")
    assert training.resolve(runs.get_method("icsr"), "market1501", distance="camera", clustering="dbscan").distance == "camera"


def test_stage_one_of_icsr_does_not_look_at_the_distance():
    "It stays in one camera; a run with the other distance finds its stage again."
    from reidbook.methods import icsr
    changed = {"distance", "camera_k1", "camera_k2", "warm_k2", "camera_lists"}
    assert changed <= icsr.STAGE_TWO
