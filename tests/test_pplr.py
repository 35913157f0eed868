"PPLR against the released implementation's vectors, an independent float64 recomputation of two training steps, and real replicas."
import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from numpy.testing import assert_allclose, assert_array_equal

from reidbook import runs, training
from reidbook.cli import main
from reidbook.clustering import dbscan, min_similarity
from reidbook.data import open_dataset
from reidbook.memory import prototypes, soft_triplet_loss
from reidbook.memory import camera_proxies
from reidbook.methods.pplr import PPLR, aals_loss, cross_agreement, inter_camera_loss, pglr_loss, refined_labels, smoothed_loss
from reidbook.models import ReIDModel, create_model, load_pretrained
from reidbook.neighbors import jaccard_similarity


def leaf(x): return torch.tensor(x, requires_grad=True)


def parts_first(x):
    "The vectors keep parts last, this book keeps them in the middle."
    return np.ascontiguousarray(x.swapaxes(1, 2))


def test_golden_agreement(golden):
    g = golden("pplr_agreement")
    want, parts = g["out_score"], parts_first(g["in_features_p"])
    for compat in (False, True): assert_allclose(cross_agreement(g["in_features_g"], parts, 20, compat=compat), want, atol=1e-6)
    assert_allclose(cross_agreement(torch.tensor(g["in_features_g"]), torch.tensor(parts)), want, atol=1e-6)
    assert 0.05 < want.mean() < 0.95 and np.abs(cross_agreement(g["in_features_g"], parts, 10) - want).max() > 0.1  # k matters


def test_golden_losses(golden):
    g = golden("pplr_losses")
    y, s, logits = torch.tensor(g["in_targets"]), torch.tensor(g["in_ca"]), leaf(g["in_logits_g"])
    part_logits = leaf(parts_first(g["in_logits_p"]))
    loss = pglr_loss(logits, part_logits, y, s)
    loss.backward()
    assert_allclose(loss.item(), g["out_pglr"], atol=2e-6)
    assert_allclose(logits.grad, g["out_pglr_grad_g"], rtol=1e-5, atol=1e-8)
    assert part_logits.grad is None and g["out_pglr_grad_p_is_none"]
    for name, make in (("aals", lambda p: aals_loss(p, y, s)), ("lsce", lambda p: smoothed_loss(p, y, 0.1))):
        p = leaf(parts_first(g["in_logits_p"]))
        loss = make(p)
        loss.backward()
        assert_allclose(loss.item(), g[f"out_{name}"], atol=2e-6)
        assert_allclose(p.grad.swapaxes(1, 2), g[f"out_{name}_grad_p"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("compat", [False, True])
def test_golden_inter_camera(golden, compat):
    g = golden("pplr_losses")
    x = leaf(g["in_emb"])
    loss = inter_camera_loss(x, g["in_targets"], g["in_cams"], g["in_proxy"], g["in_proxy_pids"], g["in_proxy_cids"], compat=compat)
    loss.backward()
    assert_allclose(loss.item(), g["out_intercam"], atol=2e-6)
    assert_allclose(x.grad, g["out_intercam_grad"], rtol=1e-5, atol=1e-7)


def test_golden_epoch(golden):
    "One whole label step: clusters, agreement, classifiers and camera proxies."
    g = golden("pplr_epoch")
    x, parts = g["in_features_g"], parts_first(g["in_features_p"])
    labels = dbscan(jaccard_similarity(x, 30, 6, min_similarity=min_similarity(0.5)), 0.5, 4)
    keep = np.flatnonzero(labels >= 0)
    assert_array_equal(keep, g["out_keep"])
    assert_array_equal(labels[keep], g["out_pids"])
    assert labels.max() + 1 == g["out_num_class"]
    scores = cross_agreement(x, parts)
    assert_allclose(scores, g["out_score_all"], atol=1e-6)
    assert_allclose(scores[keep], g["out_score"], atol=1e-6)
    assert_allclose(prototypes(x, labels), g["out_classifier_g"], atol=1e-6)
    proxies, pids, cams = camera_proxies(x, labels, g["in_cam"])
    assert_allclose(proxies, g["out_proxy_g"], atol=1e-6)
    assert_array_equal(pids, g["out_proxy_pids"])
    assert_array_equal(cams, g["out_proxy_cids"])
    for p in range(3):
        assert_allclose(prototypes(parts[:, p], labels), g["out_classifier_p"][:, :, p], atol=1e-6)
        assert_allclose(camera_proxies(parts[:, p], labels, g["in_cam"])[0], g["out_proxy_p"][:, :, p], atol=1e-6)


def test_agreement_counts_sets():
    "Against sets built by sorting all distances, and with fewer images than k."
    rng = np.random.default_rng(0)
    x, parts = rng.normal(size=(40, 8)), rng.normal(size=(40, 2, 8))
    x, parts = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (x, parts))
    def lists(a): return [set([j for j in np.argsort(((a - row) ** 2).sum(1)) if j != i][:7]) for i, row in enumerate(a)]
    want = [[len(a & b) / len(a | b) for b in (lists(parts[:, p])[i] for p in range(2))] for i, a in enumerate(lists(x))]
    assert_allclose(cross_agreement(x, parts, 7), want, atol=1e-6)
    assert_allclose(cross_agreement(x[:5], parts[:5], 20), 1)  # everybody is everybody's neighbour
    with pytest.raises(ValueError, match="N x P x D"): cross_agreement(x, parts[:, 0])


def test_losses_by_hand():
    "Losses from their definitions, image by image in float64."
    rng = np.random.default_rng(1)
    B, P, C = 6, 3, 5
    logits, part_logits, y, s = rng.normal(size=(B, C)), rng.normal(size=(B, P, C)), rng.integers(0, C, B), rng.random((B, P))
    q = np.exp(part_logits) / np.exp(part_logits).sum(2, keepdims=True)
    refined, total = np.zeros((B, C)), 0.0
    for b in range(B):
        w = np.exp(s[b]) / np.exp(s[b]).sum()
        for c in range(C): refined[b, c] = 0.3 * (c == y[b]) + 0.7 * sum(w[n] * q[b, n, c] for n in range(P))
        for n in range(P):
            kl = sum(1 / C * math.log((1 / C) / q[b, n, c]) for c in range(C))
            total += (s[b, n] * -math.log(q[b, n, y[b]]) + (1 - s[b, n]) * kl) / (B * P)
    assert_allclose(refined_labels(part_logits, y, s, 0.3), refined, atol=1e-12)
    assert_allclose(aals_loss(part_logits, y, s), total, atol=1e-12)
    log_q = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert_allclose(pglr_loss(logits, part_logits, y, s, 0.3), -(refined * log_q).sum(1).mean(), atol=1e-12)
    assert_allclose(refined_labels(part_logits, y, s, 1.0), np.eye(C)[y], atol=1e-12)


def inter_camera_by_hand(x, y, a, proxies, py, pa, temperature, hard, compat=False):
    total, counted = 0.0, 0
    for i in range(len(x)):
        sim = proxies @ (x[i] / np.linalg.norm(x[i])) / temperature
        pos = [j for j in range(len(sim)) if py[j] == y[i] and pa[j] != a[i]]
        neg = sorted([j for j in range(len(sim)) if py[j] != y[i]], key=lambda j: -sim[j])[:hard]
        if compat and len(neg) < hard: neg = neg + [j for j in range(len(sim)) if py[j] == y[i]]
        if not pos: continue
        counted += 1
        below = sum(math.exp(sim[j]) for j in pos) + sum(math.exp(sim[j]) for j in neg)
        total -= sum(sim[j] - math.log(below) for j in pos) / len(pos)
    return total / (len(x) if compat else max(counted, 1))


def test_inter_camera_quirks():
    "Few proxies and lone cameras: by default the own cluster stays out of the negatives and lone images out of the mean; compat keeps both."
    rng = np.random.default_rng(2)
    py, pa = np.array([0, 0, 1, 1, 2, 3]), np.array([0, 1, 0, 2, 1, 1])  # clusters 2 and 3 live in one camera
    proxies = rng.normal(size=(6, 8)); proxies /= np.linalg.norm(proxies, axis=1, keepdims=True)
    x, y, a = rng.normal(size=(8, 8)), np.array([0, 0, 1, 1, 2, 2, 3, 3]), np.array([0, 1, 0, 2, 1, 1, 1, 1])
    results = {}
    for hard in (2, 50):
        for compat in (False, True):
            results[hard, compat] = inter_camera_loss(x, y, a, proxies, py, pa, 0.5, hard, compat).item()
            assert_allclose(results[hard, compat], inter_camera_by_hand(x, y, a, proxies, py, pa, 0.5, hard, compat), rtol=1e-9)
    assert_allclose(results[2, True], results[2, False] / 2)  # half the images have no positive
    assert results[50, True] > results[50, False] / 2  # positives stand in the denominator twice
    lone = leaf(x[4:])
    loss = inter_camera_loss(lone, y[4:], a[4:], proxies, py, pa)
    assert loss.item() == 0
    loss.backward()
    assert_array_equal(lone.grad, 0)


# ---- the training step

def bn(x, weight, eps=1e-5):
    "Batch norm over rows of B x D in training, zero bias."
    m = x.mean(0)
    return (x - m) / torch.sqrt(((x - m) ** 2).mean(0) + eps) * weight


@pytest.fixture(scope="module")
def tiny(): return open_dataset("synthetic-tiny")


def steps(tiny, n, epoch=0, **given):
    "A PPLR epoch in float64 that records its batches: state before, batches, state after."
    seen = []
    class Recorder(PPLR):
        def start_epoch(self, t, feats):
            super().start_epoch(t, feats)
            self.classifiers.data = self.classifiers.data.double()
        def loss(self, t, batch):
            batch.images = batch.images.double()
            if not seen: self.before = copy.deepcopy(t.model.state_dict()), self.classifiers.detach().clone()
            terms = super().loss(t, batch)
            seen.append((batch, {k: v.item() for k, v in terms.items()}))
            return terms
        def end_epoch(self, t):
            self.after = self.classifiers.detach().clone()
            super().end_epoch(t)
    settings = training.resolve(Recorder, "synthetic-tiny", epochs=epoch + 1, iterations=n, **given)
    t = training.start(tiny, Recorder, settings, seed=3, device="cpu")
    t.epoch = epoch
    t.model.double()
    forward = t.model.forward
    t.model.forward = lambda x: forward(x.double())
    list(training.epochs(t))
    return t, seen


def replay(t, seen, groups, camera):
    """The same steps from the equations, without this book's models, losses or optimiser: necks, classifiers, refinement, triplet and Adam
    by hand on top of the backbone; returns losses, and the parameters after the last step."""
    state, table = t.method.before
    s, method = t.settings, t.method
    fresh = ReIDModel(s.backbone, s.pooling, s.parts, s.bn_group_size).double()
    fresh.load_state_dict(state)
    fresh.train()
    necks = [nn.Parameter(neck.weight.detach().clone()) for neck in fresh.necks]
    table = nn.Parameter(table.double().clone())
    params = [*fresh.backbone.parameters(), *necks, table]
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    losses = []
    for step, (batch, _) in enumerate(seen, 1):
        fmap, y, B = fresh.backbone(batch.images), batch.labels, len(batch.labels)
        thirds = [fmap] + [fmap[:, :, i * fmap.shape[2] // 3:math.ceil((i + 1) * fmap.shape[2] / 3)] for i in range(3)]
        x = [torch.cat([bn(g, w) for g in r.mean((2, 3)).chunk(groups)]) for r, w in zip(thirds, necks)]
        q = [torch.softmax(f.double() @ c[:method.classes].T, 1) for f, c in zip(x, table)]
        score = method.scores[batch.index].double()
        weight = torch.exp(score) / torch.exp(score).sum(1, keepdim=True)
        one_hot = torch.eye(method.classes, dtype=torch.float64)[y]
        mixed = (0.5 * one_hot + 0.5 * sum(weight[:, n:n + 1] * q[n + 1] for n in range(3))).detach()
        terms = {"pglr": -(mixed * q[0].log()).sum(1).mean(), "parts": 0}
        for n in range(3):
            ce = -q[n + 1].log()[torch.arange(B), y]
            spread = -q[n + 1].log().mean(1)
            if t.epoch - 1 >= s.aals_epoch: part = score[:, n] * ce + (1 - score[:, n]) * (spread - math.log(method.classes))
            else: part = 0.9 * ce + 0.1 * spread
            terms["parts"] = terms["parts"] + part.mean() / 3
        dist = torch.sqrt(((x[0][:, None] - x[0][None]) ** 2).sum(2).clamp(min=1e-12))
        far = torch.stack([dist[i][y == y[i]].max() for i in range(B)])
        near = torch.stack([dist[i][y != y[i]].min() for i in range(B)])
        terms["triplet"] = torch.log1p(torch.exp(far - near)).mean()
        if camera:
            proxies, (_, py, pa) = [p for p, _, _ in method.proxies], method.proxies[0]
            each = []
            for h in range(4):
                unit, total = x[h] / x[h].norm(dim=1, keepdim=True), []
                for i in range(B):
                    sim = unit[i] @ proxies[h].double().T / 0.07
                    pos = [j for j in range(len(py)) if py[j] == y[i] and pa[j] != batch.cams[i]]
                    size = sim.detach().numpy()
                    neg = sorted([j for j in range(len(py)) if py[j] != y[i]], key=lambda j: -size[j])[:50]
                    if pos: total.append(torch.logsumexp(sim[pos + neg], 0) - sim[pos].mean())
                each.append(torch.stack(total).mean())
            terms["camera"] = s.camera_weight * (each[0] + sum(each[1:]) / 3)
        losses.append({k: v_.item() for k, v_ in terms.items()})
        grads = torch.autograd.grad(sum(terms.values()), params)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(params, grads)):  # Adam with the decay inside the gradient
                g = g + s.weight_decay * p
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
                p -= t.plan.lr * (m[i] / (1 - 0.9 ** step)) / (torch.sqrt(v[i] / (1 - 0.999 ** step)) + 1e-8)
    return losses, params


@pytest.mark.parametrize("epoch, camera", [(0, False), (5, True)])
def test_training_steps_in_float64(tiny, epoch, camera):
    "Two steps of the loop, losses and parameters, against the equations; before and after AALS starts, without and with cameras."
    t, seen = steps(tiny, 2, epoch, camera=camera, aals_epoch=5, pooling="avg")
    losses, params = replay(t, seen, groups=len(seen[0][0].labels) // t.settings.bn_group_size, camera=camera)
    for (_, got), want in zip(seen, losses):
        assert got.keys() == want.keys()
        for k in got: assert_allclose(got[k], want[k], rtol=2e-7, err_msg=k)
    ours = [*t.model.backbone.parameters(), *(n.weight for n in t.model.necks)]
    for a, b in zip(ours, params): assert_allclose(a.detach(), b.detach(), rtol=1e-5, atol=1e-7)
    moved = (t.method.after - t.method.before[1]).abs().max()
    assert_allclose(t.method.after, params[-1].detach(), atol=1e-5 * float(moved) + 2e-7)
    assert moved > 1e-4


def test_groups_are_replicas(tiny):
    "PPLR's network and losses with 4 groups of 16 on one device against four replicas: joined losses, gradients, replica 0's running statistics."
    torch.manual_seed(0)
    one = ReIDModel("small", "avg", parts=3, bn_group_size=16).double()
    alone = ReIDModel("small", "avg", parts=3).double()
    alone.load_state_dict(one.state_dict())
    replicas = [copy.deepcopy(alone) for _ in range(4)]
    images, y = torch.randn(64, 3, 64, 32, dtype=torch.float64), torch.arange(16).repeat_interleave(4)
    table, s = torch.randn(4, 16, 128, dtype=torch.float64), torch.rand(64, 3, dtype=torch.float64)
    def loss(whole, parts):
        logits = torch.einsum("bhd,hcd->bhc", torch.cat([whole[:, None], parts], 1), table)
        return pglr_loss(logits[:, 0], logits[:, 1:], y, s) + aals_loss(logits[:, 1:], y, s) + soft_triplet_loss(whole, y)
    ours = loss(*one(images))
    ours.backward()
    theirs = loss(*(torch.cat(o) for o in zip(*(r(x) for r, x in zip(replicas, images.chunk(4))))))
    theirs.backward()
    assert_allclose(ours.item(), theirs.item(), rtol=1e-12)
    for name, p in one.named_parameters():
        if not p.requires_grad: continue
        assert_allclose(p.grad, sum(dict(r.named_parameters())[name].grad for r in replicas), rtol=1e-7, atol=1e-12, err_msg=name)
    for name, value in one.state_dict().items(): assert_allclose(value, replicas[0].state_dict()[name], rtol=1e-10, atol=1e-14, err_msg=name)
    whole = loss(*alone(images))
    assert abs(whole.item() - ours.item()) > 1e-3  # one group of 64 is another loss


# ---- the loop

def short(**given): return training.resolve(PPLR, "synthetic-tiny", epochs=2, iterations=3, eval_every=2, **given)


@pytest.mark.parametrize("given", [{}, {"rows": 40}])
def test_resume_repeats_the_run(tiny, tmp_path, given):
    "Stopped after an epoch and continued from the checkpoint: the same weights; with a table of rows its moments travel along."
    runs = {}
    for name in ("whole", "stopped"):
        t = training.start(tiny, PPLR, short(**given), seed=1, out=tmp_path / name, device="cpu")
        epochs = training.epochs(t)
        next(epochs)
        if name == "stopped": t = training.start(tiny, PPLR, short(**given), seed=1, out=tmp_path / name, device="cpu")
        assert len(t.optimizer.param_groups) == 1  # the classifiers have left
        list(training.epochs(t) if name == "stopped" else epochs)
        runs[name] = t
    a, b = (r.model.state_dict() for r in runs.values())
    for k in a: assert torch.equal(a[k], b[k]), k
    kept = runs["whole"].method.kept
    if given: assert kept["rows"].shape == (4, 40, 128) and float(kept["moments"]["exp_avg"].abs().max()) > 0
    else: assert kept is None


def test_too_few_rows_are_refused(tiny):
    t = training.start(tiny, PPLR, short(rows=5), seed=1, device="cpu")
    with pytest.raises(ValueError, match="rows=5.*rows=0"): next(training.epochs(t))


def test_camera_variant_needs_cameras_and_uses_them(tiny):
    without = copy.copy(tiny)
    without.train = tiny.train.drop(columns="cam")
    with pytest.raises(ValueError, match="no camera numbers"): training.start(without, PPLR, short(camera=True), seed=1, device="cpu")
    record = next(training.epochs(training.start(without, PPLR, short(), seed=1, device="cpu")))
    assert "camera" not in record
    record = next(training.epochs(training.start(tiny, PPLR, short(camera=True, compat=True), seed=1, device="cpu")))
    assert record["camera"] > 0


def test_published_settings():
    "Section 6 of the specification."
    def of(name): return [training.resolve(PPLR, name)[k] for k in ("height", "width", "eps", "camera_eps", "camera_weight", "instances")]
    assert of("market1501") == [384, 128, 0.5, 0.4, 0.5, 4] == of("dukemtmcreid")
    assert of("msmt17") == [384, 128, 0.5, 0.6, 1.0, 4]
    assert of("veri776") == [256, 256, 0.7, 0.7, 0.5, 8]
    s = training.resolve(PPLR, "market1501")
    want = dict(batch_size=64, iterations=400, epochs=50, parts=3, k=20, beta=0.5, aals_epoch=5, k1=30, k2=6, min_samples=4, lr=3.5e-4, weight_decay=5e-4,
                lr_step=20, bn_group_size=16, backbone="resnet50", pooling="avg", smoothing=0.1, camera_temperature=0.07, hard_negatives=50, eval_every=5,
                flip=0.5, pad=10, erase=0.5, jitter=0.0, rows=0, compat=False)
    assert {k: s[k] for k in want} == want


# ---- checkpoints of the released code

def released(model, module=""):
    "The state of a ReIDModel under the names of PPLR's released code, classifiers and all."
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    state = {}
    for k, v in model.state_dict().items():
        first, second, rest = k.split(".", 2)
        name = f"base.{numbers[second]}.{rest}" if first == "backbone" else f"bnneck{'' if second == '0' else int(second) - 1}.{rest}"
        state[module + name] = v
    for n in ("", 0, 1, 2): state[f"{module}classifier{n}.weight"] = torch.zeros(3000, model.dim)
    return state


@pytest.fixture(scope="module")
def saved():
    torch.manual_seed(0)
    model = ReIDModel("resnet18", "avg", parts=3)
    for p in model.parameters(): p.data.add_(0.01 * torch.randn_like(p))
    for b in model.buffers():
        if b.dtype == torch.float32: b.add_(torch.rand_like(b))
    return model.eval()


@pytest.mark.parametrize("module", ["", "module."])
def test_released_checkpoint_loads_whole(saved, tmp_path, tiny, module):
    "With and without `module.`, in a .pth.tar with an epoch and a numpy best mAP; then a test without training."
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": released(saved, module), "epoch": 50, "best_mAP": np.float64(0.815)}, path)
    model, said = create_model("resnet18", str(path), pooling="avg", parts=3)
    for k, v in saved.state_dict().items(): assert torch.equal(model.state_dict()[k], v), k
    assert "left out: classifier, classifier0, classifier1, classifier2" in said
    settings = training.resolve(PPLR, "synthetic-tiny", backbone="resnet18", pooling="avg", weights=str(path))
    t = training.start(tiny, PPLR, settings, seed=1, device="cpu")
    assert t.weights == said
    evaluation, query, gallery = training.test(t)
    images = torch.rand(2, 3, 64, 32)
    with torch.no_grad(): assert torch.equal(t.model.eval()(images)[0], saved(images)[0])
    assert query.parts.shape[1:] == (3, 512) and 0 < evaluation.mAP < 1


def test_released_checkpoint_through_the_command(saved, root, tmp_path, monkeypatch):
    "`reidbook run --eval-only` on such a file, through papermill: the mAP is that of the notebook's way."
    monkeypatch.setattr(runs, "runs_dir", lambda: tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": released(saved, "module."), "epoch": 50, "best_mAP": np.float64(0.815)}, "model_best.pth.tar")
    words = f"run --dataset synthetic-tiny --method pplr --root {root} --weights model_best.pth.tar --eval-only -p backbone=resnet18 -p pooling=avg"
    assert main(words.split()) == 0
    [out] = (tmp_path / "runs").iterdir()
    manifest = json.loads((out / "manifest.json").read_text())
    settings = training.resolve(PPLR, "synthetic-tiny", backbone="resnet18", pooling="avg", weights="model_best.pth.tar")
    evaluation, _, _ = training.test(training.start(open_dataset("synthetic-tiny", root), PPLR, settings, seed=1, device="cpu"))
    assert manifest["eval_only"] and manifest["epochs"] == 0
    assert_allclose(manifest["metrics"]["mAP"], evaluation.mAP, atol=1e-5)


def test_released_checkpoint_is_strict(saved, tmp_path):
    state = released(saved)
    del state["bnneck1.weight"], state["base.4.0.conv1.weight"]
    path = tmp_path / "broken.pth.tar"
    torch.save({"state_dict": state | {"extra.weight": torch.zeros(1), "base.9.bias": torch.zeros(1)}}, path)
    model = ReIDModel("resnet18", "avg", parts=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error: load_pretrained(model, "resnet18", path)
    for name in ("2 missing", "necks.2.weight", "backbone.layer1.0.conv1.weight", "2 unexpected", "extra.weight", "base.9.bias"): assert name in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    path = tmp_path / "small.pth"
    torch.save(released(ReIDModel("resnet18", "avg", parts=2)), path)
    with pytest.raises(ValueError, match="necks.3.weight"): load_pretrained(model, "resnet18", path)  # a head is not there


class Trap:
    def __reduce__(self): return print, ("code in a checkpoint ran",)


def test_checkpoints_run_no_code(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": Trap()}, tmp_path / "trap.pth.tar")
    with pytest.raises(ValueError, match="may run code, so it was not read"): load_pretrained(ReIDModel("small"), "small", tmp_path / "trap.pth.tar")


def test_own_checkpoint_is_a_whole_network(tiny, tmp_path):
    t = training.start(tiny, PPLR, short(), seed=1, out=tmp_path, device="cpu")
    next(training.epochs(t))
    again, said = create_model("small", str(tmp_path / "checkpoint.pt"), pooling="gem", parts=3)
    assert "whole network" in said
    for k, v in t.model.state_dict().items(): assert torch.equal(again.state_dict()[k], v), k
