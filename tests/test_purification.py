"Purification: the reference implementation's numbers, and teacher and student as runs."
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from numpy.testing import assert_allclose, assert_array_equal

from reidbook import runs, training
from reidbook.clustering import dbscan, min_similarity
from reidbook.data import open_dataset
from reidbook.memory import ClusterMemory, prototypes
from reidbook.methods.purification import Purification, distillation_loss, fuse, fused_similarity, memory_loss, pull, views, weigh
from reidbook.models import Features
from reidbook.neighbors import jaccard_similarity

HEADS = "gud"


@pytest.fixture(scope="module")
def extra(golden): return {k.removeprefix("purification_"): v for k, v in golden("engine_extra").items() if k.startswith("purification_")}


@pytest.fixture(scope="module")
def feats(extra): return Features(extra["feat_g"], np.stack([extra["feat_u"], extra["feat_d"]], 1))


def relative(got, want): return np.abs(got - want).max() / np.abs(want).max()


# -- golden ---------------------------------------------------------------------------------------------------------------------
def test_golden_fusion_is_bit_equal(extra):
    jac = [extra[f"jac_{h}"] for h in HEADS]
    assert_array_equal(fuse(*jac, 0.15), extra["jac_fused"])
    assert_array_equal(fuse(*map(torch.tensor, jac), 0.15).numpy(), extra["jac_fused"])


def test_golden_jaccards_and_labels(extra, feats):
    whole = fused_similarity(feats, lambda1=0.15)
    assert_allclose(1 - whole.toarray()[::6], extra["jac_fused"], atol=1e-6)
    for sim in whole, fused_similarity(feats, lambda1=0.15, least=min_similarity(0.6)):
        assert_array_equal(dbscan(sim, 0.6, 4), extra["labels"])
    assert (dbscan(fused_similarity(feats, lambda1=0.0), 0.6, 4) != extra["labels_global_only"]).sum() == 1  # the tie rule


def test_golden_banks(golden, extra, feats):
    g = golden("purification")
    for head, view in zip(HEADS, views(feats)): assert_allclose(prototypes(view, extra["labels"]), g[f"mem0_{head}"], atol=1e-6)


CASES = [("teacher", 0.1, None), ("student_e0", 0.1, 1.0), ("student_em1", 1.0, 1.0), ("student_mu0", 0.1, 0.0)]


def step(g, momentum, mu):
    banks = [ClusterMemory(g[f"mem0_{h}"], momentum, 0.05) for h in HEADS]
    student, teacher = ([torch.tensor(g[f"{who}_{h}"], requires_grad=who == "stu") for h in HEADS] for who in ("stu", "tea"))
    pair = lambda three: (three[0], torch.stack(three[1:], 1))
    y = torch.tensor(g["batch_targets"])
    loss = memory_loss(banks, pair(student), y, 0.2)
    if mu is not None: loss = loss + mu * distillation_loss(pair(student), pair(teacher), 0.2)
    loss.backward()
    for bank, f in zip(banks, student): bank.update(f, y)
    return loss.item(), [f.grad.numpy() for f in student], [b.prototypes.numpy() for b in banks]


@pytest.mark.parametrize("name, momentum, mu", CASES)
def test_golden_losses_gradients_and_banks(golden, name, momentum, mu):
    g = golden("purification")
    loss, grads, banks = step(g, momentum, mu)
    assert_allclose(loss, g[f"{name}_loss"], atol=1e-6)
    for h, grad, bank in zip(HEADS, grads, banks):
        assert relative(grad, g[f"{name}_grad_{h}"]) < 1e-5
        assert_allclose(bank, g[f"{name}_mem_{h}"], atol=1e-6)


def test_without_pull_the_student_is_the_teacher_bit_for_bit(golden):
    g = golden("purification")
    teacher, student, pulled = (step(g, 0.1, mu) for mu in (None, 0.0, 1.0))
    assert teacher[0] == student[0] != pulled[0]
    for a, b in zip(teacher[1] + teacher[2], student[1] + student[2]): assert_array_equal(a, b)


class Heads(torch.nn.Module):
    "Three linear heads with batch norm, as the golden runs have them."
    def __init__(self, flat):
        super().__init__()
        self.linear = torch.nn.ModuleList(torch.nn.Linear(32, 32, bias=False) for _ in HEADS)
        self.norm = torch.nn.ModuleList(torch.nn.BatchNorm1d(32) for _ in HEADS)
        torch.nn.utils.vector_to_parameters(torch.tensor(flat), self.parameters())
        for norm in self.norm: norm.bias.requires_grad_(False)

    def forward(self, x):
        first, *rest = [norm(linear(x)) for linear, norm in zip(self.linear, self.norm)]
        return first, torch.stack(rest, 1)


@pytest.mark.parametrize("name, momentum, mu", CASES[:3])
def test_golden_short_runs(golden, name, momentum, mu):
    g = golden("purification")
    net, teacher = Heads(g["run_init"]), Heads(g["run_tea_init"])
    banks = [ClusterMemory(g[f"mem0_{h}"], momentum, 0.05) for h in HEADS]
    adam = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3.5e-4, weight_decay=5e-4)
    for x, y in zip(map(torch.tensor, g["run_x"]), map(torch.tensor, g["run_y"])):
        feats = net(x)
        with torch.no_grad(): told = None if mu is None else teacher(x)  # in train mode, as released: its statistics drift
        adam.zero_grad()
        loss = memory_loss(banks, feats, y, 0.2)
        if mu is not None: loss = loss + mu * distillation_loss(feats, told, 0.2)
        loss.backward()
        adam.step()
        for bank, view in zip(banks, views(feats)): bank.update(view, y)
    assert_allclose(torch.nn.utils.parameters_to_vector(net.parameters()).detach(), g[f"run_{name}_params"], atol=1e-6)
    for h, bank in zip(HEADS, banks): assert_allclose(bank.prototypes, g[f"run_{name}_mem_{h}"], atol=1e-6)
    if mu is not None: assert_allclose([n.running_mean.numpy() for n in teacher.norm], g[f"run_{name}_tea_bn_mean"], atol=1e-6)


# -- fusion ---------------------------------------------------------------------------------------------------------------------
def three(n=60, seed=0):
    rng = np.random.default_rng(seed)
    mats = [rng.random((n, n)) * (rng.random((n, n)) < 0.2) for _ in range(3)]
    return [(m + m.T) / 2 for m in mats]


@pytest.mark.parametrize("kind, back", [(np.asarray, np.asarray), (torch.tensor, lambda x: x.numpy()), (sp.csr_matrix, lambda x: x.toarray()),
                                        (sp.csr_array, lambda x: x.toarray()), (sp.coo_matrix, lambda x: x.toarray()), (np.float32, np.asarray)])
@pytest.mark.parametrize("lambda1", [0, 0.15, np.float64(0.3), 0.5])
def test_fuse_keeps_the_type_and_is_the_formula(kind, back, lambda1):
    mats = three()
    fused = fuse(*map(kind, mats), lambda1)
    assert type(fused) is type(kind(mats[0])) and fused.dtype == kind(mats[0]).dtype
    assert_allclose(back(fused), (1 - 2 * lambda1) * mats[0] + lambda1 * (mats[1] + mats[2]), atol=1e-6)


def test_fuse_refuses():
    m = three()
    for wrong in -0.1, 0.6, np.nan:
        with pytest.raises(ValueError, match="lambda1"): fuse(*m, wrong)
    with pytest.raises(ValueError, match="same images"): fuse(m[0], m[1], m[2][:1], 0.15)
    with pytest.raises(ValueError, match="parts=2"): views(Features(np.eye(3)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lambda1", [0.0, 0.05, 0.15, 0.25, 0.5])
def test_leaving_out_far_pairs_changes_no_close_one(seed, lambda1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(12, 8))[np.arange(150) % 12][:, None] + 0.8 * rng.normal(size=(150, 3, 8))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    least = min_similarity(0.6)
    feats = Features(x[:, 0].astype(np.float32), x[:, 1:].astype(np.float32))
    whole = fuse(*[jaccard_similarity(v, 12, 4).toarray() for v in views(feats)], lambda1)
    pruned = fused_similarity(feats, 12, 4, lambda1, least).toarray()
    assert (whole >= least).any() and ((whole > 0) & (whole < least)).any()
    assert_array_equal(np.where(pruned >= least, pruned, 0), np.where(whole >= least, whole, 0))


# -- losses against float64 -----------------------------------------------------------------------------------------------------
def test_pull_is_two_minus_two_cosines_and_leaves_the_teacher_alone():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 8, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = pull(a, b)
    assert_allclose(got.item(), (2 - 2 * torch.cosine_similarity(a, b)).mean().item(), rtol=1e-12)
    got.backward()
    assert b.grad is None and a.grad.abs().sum() > 0
    assert pull(a, 3 * a).item() == pytest.approx(0, abs=1e-12)


def test_the_halves_count_on_top():
    assert weigh([1.0, 10.0, 100.0], 0.2) == pytest.approx(0.8 + 2 + 20)
    assert weigh([1.0, 10.0, 100.0], 0.0) == 1.0


# -- runs -----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(root): return open_dataset("synthetic-tiny", root)


def run(tiny, out=None, store=None, stop=None, seed=1, **settings):
    given = dict(epochs=1, iterations=2, batch_size=16, eval_every=9) | settings
    t = training.start(tiny, Purification, training.resolve(Purification, tiny.name, **given), seed=seed, out=out, store=store)
    for r in training.epochs(t):
        if r["epoch"] == stop: break
    return t


def records(t): return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in t.history]
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    "A student with its teacher, and their store."
    store = tmp_path_factory.mktemp("store")
    return run(tiny, store=store), store


def test_the_teacher_is_this_method_without_a_teacher(tiny, pair):
    student, _ = pair
    alone = run(tiny, mu=0.0, warm=0)
    assert not hasattr(alone.method, "teacher")
    assert same(student.method.teacher.model, alone.model)


def test_the_warm_epoch_is_the_teachers_and_comes_on_top(tiny, pair):
    student, store = pair
    assert [r["epoch"] for r in student.history] == [1, 2]
    t = training.start(tiny, Purification, training.resolve(Purification, tiny.name, epochs=1, iterations=2, batch_size=16, eval_every=9), store=store)
    training.seed_epoch(t)
    t.plan = t.method.plan(t)
    assert t.plan.iterations == 4
    own = training.make_labels(t)
    t.method.start_epoch(t, own)
    theirs = training.features(t.method.teacher, t.images)
    assert_array_equal(t.labels, dbscan(fused_similarity(theirs, 12, 4, 0.15), 0.6, 4))
    before = [b.prototypes.clone() for b in t.method.banks]
    for bank, view in zip(before, views(theirs)): assert_allclose(bank, prototypes(view, t.labels), atol=1e-7)
    training.train_epoch(t)
    for bank, b in zip(before, t.method.banks): assert_allclose(b.prototypes, bank, atol=1e-6)
    t.epoch = 1
    assert t.method.plan(t).iterations == 2


def test_the_teacher_is_found_again(tiny, pair, monkeypatch):
    student, store = pair
    [folder] = store.iterdir()
    stamp = (folder / "result.pt").stat().st_mtime_ns
    again = run(tiny, store=store)
    assert (folder / "result.pt").stat().st_mtime_ns == stamp and records(again) == records(student)
    run(tiny, store=store, mu=0.5, teacher_bn="batch", warm=1, stop=1)  # settings of the student: the same teacher
    assert list(store.iterdir()) == [folder]
    run(tiny, store=store, lambda2=0.4, stop=1)
    assert len(list(store.iterdir())) == 2


def test_a_teacher_from_a_file(tiny, pair, tmp_path):
    student, store = pair
    file = min(store.glob("*/result.pt"), key=lambda p: p.stat().st_mtime)
    assert records(run(tiny, teacher=str(file))) == records(student)
    with pytest.raises(FileNotFoundError, match="no weights file"): run(tiny, teacher="nothing.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit"): run(tiny, teacher=str(tmp_path / "other.pth"))


def test_teacher_bn(tiny, pair):
    student, store = pair
    with pytest.raises(ValueError, match="teacher_bn='off'"): run(tiny, teacher_bn="off")
    frozen = {k: v.clone() for k, v in student.method.teacher.model.state_dict().items()}
    released = run(tiny, store=store, teacher_bn="batch")
    drifted = [k for k, v in released.method.teacher.model.state_dict().items() if not torch.equal(v, frozen[k])]
    assert drifted and all("running" in k or "tracked" in k for k in drifted)
    assert records(released) != records(student)


def test_a_resumed_student_equals_an_undisturbed_one(tiny, pair, tmp_path):
    student, store = pair
    run(tiny, out=tmp_path, store=store, stop=1)
    resumed = run(tiny, out=tmp_path, store=store)
    assert records(resumed) == records(student) and same(resumed.model, student.model)


def test_papermill_teacher_then_student_then_found(root, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "runs_dir", lambda: tmp_path / "runs")
    monkeypatch.setenv("PYTHONPATH", str(runs.PACKAGE.parent))
    short = {"epochs": 1, "iterations": 2, "batch_size": 16}
    out = runs.execute("synthetic-tiny", "purification", root=root, settings=short)
    assert runs.read_manifest(out)["status"] == "done" and (out / "run.ipynb").exists()
    [teacher] = (tmp_path / "runs" / "stages").glob("teacher-*/result.pt")
    stamp = teacher.stat().st_mtime_ns
    runs.begin("synthetic-tiny", "purification", root=root, settings=short | {"mu": 0.5})
    assert list((tmp_path / "runs" / "stages").iterdir()) == [teacher.parent] and teacher.stat().st_mtime_ns == stamp
