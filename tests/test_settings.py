"Settings: declared once, checked against it, frozen, and able to say where they are from."
import copy
import json
import math
import pickle
from pathlib import Path

import pytest

from reidbook import adaptation, runs, training
from reidbook.settings import DATASETS, declared, SETTINGS
from reidbook.methods import glc
from reidbook.methods.baseline import Baseline

ROOT = Path(__file__).parents[1]
OWNERS = {m: runs.get_method(m) for m in runs.method_names()} | {"supervised": adaptation.Supervised}
NAMES = [*DATASETS, "market1501", "dukemtmcreid", "csv", "synthetic-cameras"]
BASE = [(name, SETTINGS[name], Baseline) for name in SETTINGS]
EVERY = BASE + [(name, it, cls) for cls in OWNERS.values() for name, it in declared(cls).items()]
EVERY += [(name, it, OWNERS["glc"]) for name, it in declared(glc.GLC).items()]
OTHER = {bool: [1, 0, "true"], int: [1.5, "1", True], float: ["1", True, [1.0]], str: [3, True, ["a"]], list: [3, "3", {}]}


def bad_values(it):
    "Values that a declaration does not allow: of another kind, not finite, beyond each end, none of the choices."
    kind = type(it.default)
    out = [None, *OTHER[kind]]
    if it.choices: out += ["", "nowhere", it.choices[0].upper()]
    if kind in (int, float):
        out += [math.nan, math.inf, -math.inf, 10 ** 400]
        out += [it.low - 1] if it.low is not None else []
        out += [it.above, it.above - 1] if it.above is not None else []
        out += [it.high + 1] if it.high is not None else []
    if kind is int: out += [10 ** 30]
    if kind is list: out += [[], [it.low - 1], [math.nan], ["3"], [True], [None], [[3]], [3] * (it.count[1] + 1), [10 ** 30]]
    return out


def test_every_setting_has_a_meaning_and_numbers_have_a_range():
    for name, it, _ in EVERY:
        assert it.meaning, name
        if type(it.default) in (int, float, list): assert it.low is not None or it.above is not None, name
        assert it.accepts(it.default), name


@pytest.mark.parametrize("name, it, cls", EVERY, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_values_are_refused_in_one_line(name, it, cls):
    for value in bad_values(it):
        with pytest.raises(ValueError) as e: training.resolve(cls, "market1501", **{name: value})
        said = str(e.value)
        assert said.startswith(f"setting {name}=") and "expected" in said and "\n" not in said and len(said) < 250


@pytest.mark.parametrize("method, given", [
    ("baseline", dict(epochs=-1)), ("baseline", dict(flip=2)), ("baseline", dict(temperature=-1)), ("baseline", dict(min_samples=-1)),
    ("glc", dict(glc_t1=math.nan)), ("pplr", dict(k=0)), ("pplr", dict(parts=50)), ("baseline", dict(iterations=0)), ("baseline", dict(eval_every=0)),
    ("baseline", dict(instances=0)), ("glc", dict(glc_subgraphs=[])), ("icsr", dict(nodes="some")), ("baseline", dict(batch_size=30)),
    ("baseline", dict(bn_group_size=1)), ("baseline", dict(backbone="resnet51")), ("baseline", dict(backbone="vit_huge")), ("baseline", dict(weights="")),
    ("pplr", dict(parts=9)), ("pplr", dict(parts=3, backbone="vit_tiny")), ("baseline", dict(epochs=None)),
])
def test_what_the_issue_named_is_refused_before_anything_is_written(method, given, tmp_path, monkeypatch, root):
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path / "runs"))
    with pytest.raises(ValueError): runs.execute("synthetic-tiny", method, root=root, settings=given)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("cls", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("dataset", NAMES)
def test_defaults_pass(cls, dataset):
    settings = training.resolve(cls, dataset)
    assert training.resolve(cls, dataset, **settings) == settings
    assert set(settings) == set(settings.origins) == set(settings.table)


def test_committed_runs_pass():
    manifests = [json.loads(p.read_text()) for p in (ROOT / "nbs" / "runs").glob("*/manifest.json")]
    assert len(manifests) > 20
    for m in manifests:
        p = m["parameters"]
        now = training.resolve(runs.get_method(p["method"]), p["dataset"], **p["settings"])
        assert {k: now[k] for k in m["settings"]} == m["settings"]


def test_settings_are_frozen_plain_and_attributes():
    s = training.resolve(Baseline, "market1501", lr=1)
    assert s.lr == s["lr"] == 1.0 and s.update == "mean" and json.loads(json.dumps(s)) == dict(s)
    for change in (lambda: s.__setitem__("lr", 2), lambda: setattr(s, "lr", 2), lambda: s.pop("lr"), lambda: s.clear(), lambda: s.__ior__({"lr": 2}), lambda: s.__delitem__("lr")):
        with pytest.raises(TypeError, match="frozen"): change()
    with pytest.raises(AttributeError, match="no setting 'rl'"): s.rl
    other = s | {"lr": 2.0}
    assert other.lr == 2.0 and s.lr == 1.0 and other.origins["lr"] == "changed" and other.table is s.table
    for twin in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))): assert twin == s and twin.origins == s.origins


def test_every_value_says_where_it_is_from():
    s = training.resolve(OWNERS["glc"], "synthetic-tiny", source="msmt17", epochs=3)
    origin = lambda name: s.origins[name]
    assert origin("weights") == "loop" and origin("iterations") == "loop, for synthetic-tiny" and origin("glc_t1") == "plug glc"
    assert origin("glc_start") == "plug glc, for synthetic-tiny" and origin("correct") == origin("update") == "method"
    assert origin("epochs") == origin("source") == "you"


def test_a_subclass_that_changes_a_value_keeps_its_range():
    class Warm(Baseline): settings = Baseline.settings | dict(temperature=0.1, own=3)
    assert training.resolve(Warm, "market1501").temperature == 0.1 and training.resolve(Warm, "market1501", own=4).own == 4
    with pytest.raises(ValueError, match="above 0"): training.resolve(Warm, "market1501", temperature=0)
    with pytest.raises(ValueError, match="whole number"): training.resolve(Warm, "market1501", own="4")
