"The loop: repeatable, resumable, honest about bad labels."
import copy

import numpy as np
import pytest
import torch

from reidbook import checkpoints, settings, training
from reidbook.data import open_dataset
from reidbook.methods.baseline import Baseline
from reidbook.noise import label_quality

SHORT = dict(epochs=3, iterations=4)


@pytest.fixture(scope="module")
def tiny(root): return open_dataset("synthetic-tiny", root)


def records(t): return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in t.history]


def run(tiny, seed=1, stop=None, out=None, **settings):
    t = training.start(tiny, Baseline, training.resolve(Baseline, tiny.name, **SHORT | settings), seed=seed, out=out)
    for r in training.epochs(t):
        if r["epoch"] == stop: break
    return t


def test_same_seed_same_metrics(tiny):
    a, b, c = run(tiny), run(tiny), run(tiny, seed=2)
    assert records(a) == records(b)
    assert records(a) != records(c)


@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_equals_undisturbed(tiny, tmp_path, stop):
    whole = run(tiny)
    run(tiny, stop=stop, out=tmp_path)
    resumed = run(tiny, out=tmp_path)
    assert records(resumed) == records(whole)
    assert all(torch.equal(x, y) for x, y in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == SHORT["epochs"]


def test_checkpoint_of_another_network_is_refused(tiny, tmp_path):
    run(tiny, stop=1, out=tmp_path)
    with pytest.raises(ValueError, match="another network"): run(tiny, out=tmp_path, pooling="avg")


def test_unknown_ids_and_cameras_train(tiny, tmp_path):
    from dataclasses import replace
    own = replace(tiny, train=tiny.train[["path"]], query=None, gallery=None)
    t = training.start(own, Baseline, training.resolve(Baseline, tiny.name, epochs=1, iterations=2))
    record = next(training.epochs(t))
    assert "mAP" not in record and "label_pairwise_precision" not in record and record["clusters"] > 1


def test_few_clusters_make_a_smaller_batch_not_a_crash(tiny):
    class Three(Baseline):
        def labels(self, t, feats): return np.where(t.pids < 3, t.pids, -1)
    t = training.start(tiny, Three, training.resolve(Three, tiny.name, epochs=1, iterations=2))
    assert next(training.epochs(t))["clusters"] == 3


@pytest.mark.parametrize("labels, words", [(lambda p: np.full(len(p), -1), "at least 2 clusters"), (lambda p: p % 2, "below 0.2")])
def test_hopeless_labels_stop_the_run(tiny, labels, words):
    class Bad(Baseline):
        def labels(self, t, feats): return labels(t.pids)
    with pytest.raises(ValueError, match=words): next(training.epochs(training.start(tiny, Bad)))


def test_plan_restart_and_freeze(tiny):
    class Restarting(Baseline):
        def plan(self, t): return training.Plan(2, 1e-3, restart=t.epoch == 1, freeze=t.epoch == 2)
    t = training.start(tiny, Restarting, training.resolve(Restarting, tiny.name, epochs=3, eval_every=3))
    fresh = {k: v.clone() for k, v in t.model.state_dict().items()}
    seen, steps = [], training.epochs(t)
    next(steps)
    assert not torch.equal(fresh["necks.0.weight"], t.model.state_dict()["necks.0.weight"])
    next(steps); seen.append(t.labels)
    next(steps)
    assert np.array_equal(seen[0], t.labels)


@pytest.mark.parametrize("given, words", [
    ({"epoch": 3}, "unknown setting 'epoch'"), ({"epochs": "3"}, "expected a whole number"),
    ({"epochs": True}, "expected a whole number"), ({"lr": "fast"}, "expected a number"),
    ({"prefer_other_cameras": 1}, "expected true or false")])
def test_settings_are_checked(given, words):
    with pytest.raises(ValueError, match=words): training.resolve(Baseline, "market1501", **given)


def test_a_start_holds_its_labels_for_three_epochs(tiny, monkeypatch):
    monkeypatch.setitem(training.STARTS, "pixels", lambda t: np.eye(t.pids.max() + 1, dtype=np.float32)[t.pids] + 0.01)
    t = training.start(tiny, Baseline, training.resolve(Baseline, tiny.name, weights="none", start="pixels", epochs=4, iterations=2))
    labels = []
    try:
        for _ in training.epochs(t): labels.append(t.labels)
    except ValueError: pass  # the fourth epoch clusters an untrained network's features, which may give nothing
    assert label_quality(labels[0], tiny.train.pid.to_numpy()).pairwise_precision == 1
    assert len(labels) >= 3 and np.array_equal(labels[0], labels[1]) and np.array_equal(labels[0], labels[2])


def test_a_step_does_not_wait_for_the_device(tiny):
    "Nothing in a step reads a number back, but for one of the augmentation's draws, which are made on the CPU."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Count(TorchDispatchMode):
        reads = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))
    def reads(iterations):
        t = training.start(tiny, Baseline, training.resolve(Baseline, tiny.name, batch_size=16))
        training.seed_epoch(t)
        t.plan, t.labels = training.Plan(iterations, 1e-3), t.pids
        t.method.start_epoch(t, training.features(t, t.images))
        t.optimizer.step = lambda: None  # a CPU's Adam counts its steps in numbers, the fused one does not
        with Count() as count: training.train_epoch(t)
        return count.reads
    assert reads(5) - reads(2) <= 3


# the state: its fields and no others

@pytest.mark.parametrize("kind", [training.State, training.Batch])
def test_every_field_says_who_sets_it(kind):
    rows = training.field_rows(kind)
    assert [r["field"] for r in rows] == list(kind.__dataclass_fields__)
    places = checkpoints, training.Method, training
    for r in rows: assert any(hasattr(place, r["set by"]) for place in places), r


def test_a_typo_on_the_state_fails_and_names_the_field():
    t = training.start(open_dataset("synthetic-tiny"), Baseline)
    with pytest.raises(AttributeError, match="State has no field epohc: did you mean epoch?"): t.epohc = 1
    with pytest.raises(AttributeError, match="did you mean optimizer?"): t.optimiser
    with pytest.raises(AttributeError, match="goes on the method itself"): t.memory = 1
    with pytest.raises(AttributeError, match="plan is not set yet"): t.plan
    assert copy.copy(t).images is t.images
    batch = training.Batch(np.arange(2), torch.zeros(2), np.arange(2), torch.arange(2), None)
    with pytest.raises(AttributeError, match="did you mean images?"): batch.image


def test_every_field_is_set_after_an_epoch():
    s = training.resolve(Baseline, "synthetic-tiny", epochs=1, iterations=1)
    t = training.start(open_dataset("synthetic-tiny"), Baseline, s)
    next(training.epochs(t))
    assert set(vars(t)) == set(training.State.__dataclass_fields__)


def test_names_that_moved_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match="settings.SETTINGS"): assert training.SETTINGS is settings.SETTINGS
    with pytest.warns(DeprecationWarning, match="checkpoints.in_use"): assert training.in_use is checkpoints.in_use
    assert training.Setting is settings.Setting and training.stage is checkpoints.stage  # methods use them: no warning
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): training.nothing


def test_validation_identities_are_the_test(tiny):
    "The network never sees them, and every method, with or without a stage, is scored on them."
    t = run(tiny, validate=0.25)
    assert t.dataset.train.pid.nunique() == 12 and len(t.images) == len(t.dataset.train) < len(tiny.train)
    assert set(t.dataset.query.path) < set(tiny.train.path) and not set(t.dataset.query.path) & set(t.dataset.train.path)
    assert t.history[-1]["mAP"] != run(tiny).history[-1]["mAP"]


@pytest.mark.parametrize("method", ["icsr", "purification"])
def test_stages_of_a_validated_run_know_its_images(tiny, tmp_path, method):
    from reidbook import runs
    d = runs.describe("synthetic-tiny", method, 1, tiny.root.parent, "cpu", dict(epochs=1, iterations=2, validate=0.25))
    plain = runs.describe("synthetic-tiny", method, 1, tiny.root.parent, "cpu", dict(epochs=1, iterations=2))
    assert d.identity["data"] != plain.identity["data"] and d.run_id != plain.run_id
    t = training.start(d.dataset, d.method, d.settings, store=tmp_path / "stages", identity=d.identity)
    for _ in training.epochs(t): pass
    assert t.dataset.held_out == 0.25 and 0 < t.history[-1]["mAP"] <= 1
