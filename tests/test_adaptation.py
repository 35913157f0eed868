"The supervised source stage: losses, schedule, what passes on, found again, refused; a papermill run from source to target."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reidbook import adaptation, training
from reidbook.data import open_dataset
from reidbook.memory import soft_triplet_loss
from reidbook.methods.baseline import Baseline
from reidbook.models import create_model

FAST = dict(height=32, width=16, backbone="small", weights="none", epochs=1, iterations=2, eval_every=1, bn_group_size=16)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "One short epoch of the source stage, and no result left over from another test."
    monkeypatch.setitem(adaptation.Supervised.datasets, "synthetic-tiny", dict(epochs=2, warm_epochs=1, iterations=2, batch_size=16, lr=2e-3, eval_every=9))
    monkeypatch.setattr(adaptation, "_made", {})


def run(root, **kw):
    d = open_dataset("synthetic-cameras", root)
    return training.start(d, Baseline, training.resolve(Baseline, d.name, **FAST, **kw.pop("settings", {})), seed=1, **kw)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A small target: the tiny preset under another name would be a hash of its own, so a cut of synthetic-tiny stands in."
    from reidbook import synthetic
    import dataclasses
    mp = pytest.MonkeyPatch()
    mp.setitem(synthetic.PRESETS, "synthetic-cameras", dataclasses.replace(synthetic.PRESETS["synthetic-tiny"], seed=9, style="harbour"))
    yield tmp_path_factory.mktemp("two_towns")
    mp.undo()


def test_the_triplet_sees_the_feature_before_the_neck():
    for backbone in ("small", "vit_tiny", "vit_tiny_pass_mean", "vit_tiny_pass_multi"):
        net, _ = create_model(backbone, "none")
        before = adaptation.watch_necks(net)
        x = torch.randn(4, 3, 64, 32)
        after = net.eval()(x)[0]
        if backbone == "vit_tiny_pass_multi":
            from reidbook.vit import fuse
            want = fuse(net.backbone(x * net.gain + net.shift), "cat")
            torch.testing.assert_close(before(), want)
        else: torch.testing.assert_close(net.necks[0](before()), after)


def test_losses_are_cross_entropy_and_triplet(root):
    d = open_dataset("synthetic-tiny", root)
    t = training.start(d, adaptation.Supervised, training.resolve(adaptation.Supervised, d.name, **(FAST | dict(epochs=2))), seed=1)
    training.seed_epoch(t)
    t.plan, t.labels = t.method.plan(t), t.pids
    batch = next(training.batches(t))
    terms = t.method.loss(t, batch)
    with torch.no_grad():
        pre = t.model.pools[0](t.model.backbone(batch.images))
        post = F.batch_norm(pre, None, None, t.model.necks[0].weight, t.model.necks[0].bias, True)
        logits = post @ t.model.classifier.weight.T
        want = -(logits.log_softmax(1)[torch.arange(len(pre)), batch.labels]).mean()
    if len(pre) <= 16: torch.testing.assert_close(terms["identity"].detach(), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms["triplet"].detach(), soft_triplet_loss(pre, batch.labels), atol=1e-4, rtol=1e-4)
    assert t.plan.lr == pytest.approx(0.01 * t.settings.lr)


def test_the_backbone_passes_on_and_nothing_else(root):
    t = run(root, settings=dict(source="synthetic-tiny"))
    state = t.source["backbone"]
    assert all(torch.equal(v, state[k]) for k, v in t.model.backbone.state_dict().items())
    fresh, _ = create_model("small", "none", seed=1, bn_group_size=16)
    assert torch.equal(t.model.necks[0].running_mean, fresh.necks[0].running_mean) and not hasattr(t.model, "classifier")
    assert not torch.equal(fresh.backbone.state_dict()["0.weight"], state["0.weight"])
    assert "synthetic-tiny" in t.weights and "2 epochs" in t.weights
    training.fresh_network(t)
    assert all(torch.equal(v, state[k]) for k, v in t.model.backbone.state_dict().items()), "a restart starts from the source again"


def test_the_stage_is_found_again(root, tmp_path, monkeypatch):
    a = run(root, settings=dict(source="synthetic-tiny"), store=tmp_path)
    monkeypatch.setattr(adaptation, "_made", {})
    monkeypatch.setattr(training, "epochs", lambda t: pytest.fail("trained again"))
    b = run(root, settings=dict(source="synthetic-tiny"), store=tmp_path)
    assert all(torch.equal(v, b.source["backbone"][k]) for k, v in a.source["backbone"].items())
    assert len(list(tmp_path.iterdir())) == 1


def test_seed_and_settings_of_the_run_decide_the_stage(root):
    a, b = (adaptation.source_settings(run(root, settings=kw), open_dataset("synthetic-tiny", root)) for kw in ({}, {"optimizer": "sgd"}))
    assert a["backbone"] == "small" and a["height"] == 32 and a["epochs"] == 2 and (a["optimizer"], b["optimizer"]) == ("auto", "sgd")


def test_wrong_sources_are_refused(root):
    with pytest.raises(ValueError, match="target itself"): run(root, settings=dict(source="synthetic-cameras"))
    with pytest.raises(ValueError, match="unknown data set"): run(root, settings=dict(source="market1502"))


def test_optimizers():
    from types import SimpleNamespace
    def made(backbone, name):
        model = torch.nn.Linear(2, 2)
        return type(training.make_optimizer(SimpleNamespace(model=model, device=torch.device("cpu"), settings=SimpleNamespace(optimizer=name, backbone=backbone, lr=1, weight_decay=0))))
    assert made("resnet50", "auto") is made("vit_tiny", "adam") is torch.optim.Adam and made("vit_tiny", "auto") is made("small", "sgd") is torch.optim.SGD
    with pytest.raises(ValueError, match="one of auto, adam, sgd"): training.resolve(Baseline, "synthetic-tiny", optimizer="lion")


def test_papermill_run_from_a_source_to_unlabelled_crops(tmp_path, monkeypatch):
    "One command: labels of synthetic-tiny, then a folder of crops without identities, cameras or test set."
    pytest.importorskip("papermill")
    import json
    from pathlib import Path
    from reidbook import runs
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setenv("REIDBOOK_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(runs, "runs_dir", lambda: tmp_path / "runs")
    (tmp_path / "crops").mkdir()
    for i, path in enumerate(open_dataset("synthetic-tiny").train.path[:96]): (tmp_path / "crops" / f"{i}.jpg").write_bytes(Path(path).read_bytes())
    small = dict(source="synthetic-tiny", weights="none", backbone="small", height=64, width=32, bn_group_size=16, epochs=1, iterations=3, batch_size=16, instances=4, k1=8, k2=3)
    out = runs.execute("folder", "baseline", root=str(tmp_path / "crops"), settings=small)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "done" and "trained with labels on synthetic-tiny" in (out / "run.ipynb").read_text()
    [record] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert record["clusters"] >= 2 and np.isfinite(record["loss"])
