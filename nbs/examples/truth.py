"A control: the labels are the true identities. No repair of labels can give better ones."
import numpy as np

from reidbook.methods.baseline import Baseline

class Truth(Baseline):
    "Cluster Contrast on true labels."
    def labels(self, t, feats):
        if t.pids is None: raise ValueError("this control needs to know the true identities")
        return np.unique(t.pids, return_inverse=True)[1]

METHOD = Truth
