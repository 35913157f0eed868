"A control for ICSR: it strikes out as many labels, but draws them at random."
import numpy as np

from reidbook.methods.icsr import ICSR, global_clusters

class RandomVeto(ICSR):
    "ICSR whose veto falls on images drawn at random from the clustered ones."
    def labels(self, t, feats):
        vetoed = super().labels(t, feats)
        labels = global_clusters(t, feats.global_, t.settings.clustering)
        count = int((labels >= 0).sum() - (vetoed >= 0).sum())
        labels[t.rng.choice(np.flatnonzero(labels >= 0), count, replace=False)] = -1
        left = labels >= 0  # a cluster that has lost all its images is none
        labels[left] = np.unique(labels[left], return_inverse=True)[1]
        return labels

METHOD = RandomVeto
