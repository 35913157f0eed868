"Steady: an image counts as far as its neighbourhood has held still since the epoch before."
import numpy as np
import torch
import torch.nn.functional as F

from reidbook.methods.baseline import Baseline
from reidbook.neighbors import knn
from reidbook.training import Setting

class Steady(Baseline):
    "Cluster Contrast, in which an image whose neighbours change from epoch to epoch counts less."
    settings = Baseline.settings | dict(
        floor=Setting(0.5, "weight of an image whose neighbours have all changed", low=0, high=1),
        shuffled=Setting(False, "a control: the same weights, dealt to the images at random"))

    def start_epoch(self, t, feats):
        super().start_epoch(t, feats)
        now = knn(feats.global_, t.settings.k1, device=t.device)[1]
        before = getattr(self, "neighbors", now)
        kept = np.array([np.isin(a, b).mean() for a, b in zip(now, before)])
        if t.settings.shuffled: kept = np.random.default_rng([t.seed, t.epoch]).permutation(kept)
        weights = t.settings.floor + (1 - t.settings.floor) * kept
        self.weights, self.neighbors = weights / weights[t.labels >= 0].mean(), now

    def loss(self, t, batch):
        batch.feats = t.model(batch.images)[0]
        scores = F.normalize(batch.feats) @ self.memory.prototypes.T / self.memory.temperature
        each = F.cross_entropy(scores, batch.labels, reduction="none")
        weights = torch.from_numpy(self.weights[batch.index]).to(each)
        return {"memory": (weights * each).mean()}

    def state(self): return {"neighbors": torch.from_numpy(self.neighbors)}
    def load_state(self, t, state): self.neighbors = state["neighbors"].cpu().numpy()

METHOD = Steady
