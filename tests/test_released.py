"`released=true`: the quirks of the released code reach the run, those of the loop and those of every method."
import numpy as np
import pytest
import torch

from reidbook import runs, training
from reidbook.data import open_dataset
from reidbook.images import augment, draw_augmentation
from reidbook.methods.baseline import Baseline
from reidbook.sampling import released_generators, released_order

QUIRKS = {"baseline": {}, "pplr": dict(compat=True, rows=3000), "icsr": dict(nodes="last", nodes_from="infomap", camera_loss="released"),
          "mprd": dict(compat=True), "purification": dict(teacher_bn="batch"), "glc": {},
          "ncplr": dict(weighting="far", rows=3000), "spcl": {}, "ise": dict(compat=True), "o2cap": {}, "dcmip": dict(compat=True)}
QUIRKS = {name: quirks for name, quirks in QUIRKS.items() if name in runs.method_names()}  # a reader may delete a method
SHORT = {"epochs": 1, "iterations": 2, "eval_every": 9}
STAGES = {"icsr": dict(camera_epochs=1, camera_iterations=1), "mprd": dict(gcn_passes=0), "dcmip": dict(first_epochs=1)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(root): return open_dataset("synthetic-tiny", root)


def started(tiny, method=Baseline, **settings):
    t = training.start(tiny, method, training.resolve(method, tiny.name, **SHORT | settings), seed=1)
    t.plan = t.method.plan(t)
    training.make_labels(t)
    return t


@pytest.mark.parametrize("name", QUIRKS)
def test_every_quirk_is_set_and_can_be_taken_back(name):
    cls = runs.get_method(name)
    s = training.resolve(cls, "market1501", released=True)
    assert {k: s[k] for k in QUIRKS[name]} == QUIRKS[name]
    assert (s.sampler, s.erase_fill, s.camera_lists) == ("released", "released", "released")
    plain = training.resolve(cls, "market1501")
    changed = {k for k in s if s[k] != plain[k]}
    assert changed <= {"released", "sampler", "erase_fill", "camera_lists", *QUIRKS[name]}
    assert all(s.origins[k] == "released code" for k in changed - {"released"})
    assert training.resolve(cls, "market1501", released=True, sampler="dealt").sampler == "dealt"


def test_batches_are_those_of_the_released_sampler(tiny):
    t = started(tiny, sampler="released")
    training.seed_epoch(t)
    first = next(training.batches(t)).index
    training.seed_epoch(t)
    generators = released_generators(int(t.rng.integers(2**31)))
    order = released_order(t.labels, t.cams, t.settings.instances, generators)
    assert np.array_equal(first, order[:t.settings.batch_size])
    training.seed_epoch(t)
    dealt = started(tiny)
    training.seed_epoch(dealt)
    assert not np.array_equal(first, next(training.batches(dealt)).index)


@pytest.mark.parametrize("fill", ["mean", "released"])
def test_erased_rectangles_are_filled_as_asked(tiny, fill):
    t = started(tiny, erase_fill=fill, erase=1.0, jitter=0.0)
    training.seed_epoch(t)
    images, s = training.read(t, np.arange(4)), t.settings
    draw = draw_augmentation(4, (s.height, s.width), torch.Generator().manual_seed(t.generator.initial_seed()),
                             flip=s.flip, pad=s.pad, erase=1.0)
    torch.testing.assert_close(training.augmented(t, images), augment(images, draw, compat=fill == "released"))


@pytest.mark.parametrize("name", QUIRKS)
def test_every_method_runs_as_released(tiny, name):
    cls = runs.get_method(name)
    given = SHORT | STAGES.get(name, {})
    if name == "pplr": given |= {"camera": True}
    t = training.start(tiny, cls, training.resolve(cls, tiny.name, released=True, **given), seed=1)
    record = next(iter(training.epochs(t)))
    assert np.isfinite(record["loss"])
