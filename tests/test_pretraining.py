"DINO with parts: the reference loss and centres, a slow recount of its pairs, schedules, views by height, resuming."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose

from reidbook import pretraining
from reidbook.models import create_model

SMALL = dict(batch_size=4, epochs=3, warm_epochs=1, outputs=16, hidden=8, bottleneck=4)


@pytest.fixture(scope="module")
def images(): return np.random.default_rng(0).integers(0, 255, (10, 3, 64, 32), dtype=np.uint8)


def test_loss_and_centres_of_the_reference(golden):
    g = {k: torch.as_tensor(v) for k, v in golden("pass_vit").items() if k.startswith("dino_")}
    centers = torch.zeros(4, 1, g["dino_teacher"].shape[2])
    args = g["dino_teacher"], g["dino_student_g"], g["dino_student_p"]
    assert_allclose(pretraining.dino_loss(*args, centers), g["dino_loss_1"], atol=2e-6)
    centers = pretraining.move_centers(centers, args[0])
    assert_allclose(centers, g["dino_centers_1"], atol=1e-6)
    assert_allclose(pretraining.dino_loss(*args, centers), g["dino_loss_2"], atol=2e-6)


@pytest.mark.parametrize("local", [1, 3])
def test_loss_is_the_mean_over_pairs_of_different_views(local):
    "Recounted pair by pair in float64; 44 pairs with three local views an area."
    torch.manual_seed(0)
    B, K = 3, 5
    teacher, student, pieces, centers = (torch.randn(s, dtype=torch.float64) for s in ((4, 2 * B, K), (4, 2 * B, K), (3, 2, local * B, K), (4, 1, K)))
    terms = []
    for h in range(4):
        views = list(student[h].chunk(2)) + ([v for a in range(3) for v in pieces[a, 0].chunk(local)] if h == 0 else list(pieces[h - 1, 1].chunk(local)))
        for i, said in enumerate(teacher[h].chunk(2)):
            q = F.softmax((said - centers[h]) / 0.04, dim=1)
            terms += [-(q * F.log_softmax(v / 0.1, dim=1)).sum(1).mean() for j, v in enumerate(views) if j != i]
    assert len(terms) == (44 if local == 3 else 2 * (1 + 3) + 3 * 2 * 2)
    assert_allclose(pretraining.dino_loss(teacher, student, pieces, centers), torch.stack(terms).mean(), rtol=1e-12)


def test_the_teacher_gets_no_gradient():
    teacher, student = torch.randn(4, 2, 3, requires_grad=True), torch.randn(4, 2, 3, requires_grad=True)
    pretraining.dino_loss(teacher, student, torch.randn(3, 2, 3, 3), torch.zeros(4, 1, 3)).backward()
    assert teacher.grad is None or not teacher.grad.any()
    assert student.grad.abs().sum() > 0


def test_local_views_come_from_their_area(images):
    "An image whose rows are numbered: what a local view shows lies in its half of the height."
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 2, (3, 64, 32))
    for a, (top, bottom) in enumerate(pretraining.AREAS):
        rows = pretraining.area(torch.tensor(ramp.copy()), a)[0, :, 0] / 2
        assert rows.min() == top * 64 and rows.max() == bottom * 64 - 1
    views = pretraining.Views(images, pretraining.TINY)[0]
    assert [tuple(v.shape[1:]) for v in views] == [(64, 32)] * 2 + [(32, 16)] * 9 and all(torch.isfinite(v).all() for v in views)


def test_schedules():
    s = pretraining.PAPER
    lr, wd, m = map(np.array, zip(*[pretraining.schedule(s, i, 1000) for i in range(1001)]))
    assert lr[0] == 0 and lr[100] == lr.max() == s["lr"] * 4 and lr[-1] == pytest.approx(s["min_lr"])
    assert wd[0] == pytest.approx(0.04) and wd[-1] == pytest.approx(0.4) and (np.diff(wd) >= 0).all()
    assert m[0] == pytest.approx(0.996) and m[-1] == 1


def test_first_epoch_keeps_the_classes_and_a_part_view_moves_its_head_only(images):
    t = pretraining.start(images, SMALL)
    before = [h.last.weight.clone() for h in t["student"].heads]
    views = [torch.randn(4, 3, 64, 32)] * 2 + [torch.randn(4, 3, 32, 16)] * 9
    pretraining.one_step(t, views, 2, 10)
    assert all(torch.equal(a, h.last.weight) for a, h in zip(before, t["student"].heads))
    t["epoch"] = 1
    pretraining.one_step(t, views, 3, 10)
    assert not any(torch.equal(a, h.last.weight) for a, h in zip(before, t["student"].heads))
    net = t["student"]
    net.zero_grad()
    net.piece(views[2], 1).sum().backward()
    assert [h.last.weight.grad is not None for h in net.heads] == [True, False, True, False]


def test_resuming_gives_the_same_run_and_the_weights_load(images, tmp_path):
    whole = pretraining.start(images, SMALL, seed=2, out=tmp_path / "a")
    want = list(pretraining.epochs(whole))
    part = pretraining.start(images, SMALL, seed=2, out=tmp_path / "b")
    next(pretraining.epochs(part))
    part = pretraining.start(images, SMALL, seed=2, out=tmp_path / "b")
    assert len(part["history"]) == 1
    for _ in pretraining.epochs(part): pass
    got = part["history"]
    assert [r["loss"] for r in got] == [r["loss"] for r in want]
    model, said = create_model("vit_tiny_pass", str(tmp_path / "b" / "backbone.safetensors"))
    assert all(torch.equal(v, whole["teacher"].backbone.state_dict()[k]) for k, v in model.backbone.state_dict().items())
    assert "backbone.safetensors" in said


def test_what_cannot_work_is_refused(images):
    with pytest.raises(ValueError, match="fewer than a batch"): pretraining.start(images[:2], SMALL)
    with pytest.raises(ValueError, match="no part tokens"): pretraining.start(images, SMALL | {"backbone": "vit_tiny"})


def test_the_page_trains_under_papermill(tmp_path):
    "The chapter as a training script, on a folder of unlabelled crops."
    pm = pytest.importorskip("papermill")
    from pathlib import Path
    from PIL import Image
    (tmp_path / "crops").mkdir()
    for i in range(64): Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 32, 3), dtype=np.uint8)).save(tmp_path / "crops" / f"{i}.png")
    page = Path(__file__).parent.parent / "nbs" / "17_pretraining.ipynb"
    pm.execute_notebook(page, tmp_path / "run.ipynb", dict(dataset="folder", root=str(tmp_path / "crops"), n_epochs=1, out=str(tmp_path / "out")),
                        cwd=str(page.parent), kernel_name="python3", progress_bar=False)
    create_model("vit_tiny_pass", str(tmp_path / "out" / "backbone.safetensors"))
