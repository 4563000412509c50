r"""How much of Eq. 20's probability over the whole catalogue lies on the candidates of an insertion (the 50 nearest of both neighbours, models.contrastive)?

    MMREC_DATA=... python benchmarks/insertion_mass.py      # results/insertion_mass.csv; a minute, once vectors are there

The gaps are those that virtual sequences fill in the first eight batches of an epoch (rate .2, gamma .5, temperature .1; what is owned is no candidate).
`mass`: the candidates' share, mean over gaps (`low`, `high`: 10th and 90th percentile). `same_neighbours`: the share of the 50 nearest items in all directions
of the features that are among the 50 nearest in the 64 directions kept; 500 items. `full`: the share of
the epoch's windows that have all of their 50 places taken. Seed 0.
"""
import numpy as np, polars as pl, torch
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import git_commit
from mmrec_wb.data import load_dataset
from mmrec_wb.data.batches import train_batches, train_windows, training_items
from mmrec_wb.data.features import add_features
from mmrec_wb.models.contrastive import _gaps_to_fill, insertion_probabilities, neighbour_table
from tune_recommenders import title
from why_attention import unit

SETS = (('toys', 'planted'), ('toys1k', 'raw'), ('ml-100k', 'raw'), ('toys', 'raw'))

def mass(data, near, batches: int=8, gamma=.5, temperature=.1) -> np.ndarray: # a share for each gap
    "Of the whole catalogue's probability, what lies on the candidates."
    found, loops = [], train_batches(data, 50, 2048, 0, 0); g = torch.Generator().manual_seed(0)
    for i in range(min(batches, len(loops))):
        b = loops[i]; own = training_items(data, b.user); n = (b.items > 0).sum(1); n_new = torch.poisson(.2*n.float(), generator=g).long()
        row, at = _gaps_to_fill(b.items, near, n_new, g); left, right = b.items[row, at], b.items[row, at + 1]
        cand, p = insertion_probabilities(left, right, own[row], near, gamma, temperature)
        whole = (gamma*near.vectors[left] + (1 - gamma)*near.vectors[right]) @ near.vectors.T/temperature
        whole = whole.masked_fill(~near.vectors.any(-1), -torch.inf).scatter(1, own[row], -torch.inf).softmax(1)
        among = torch.zeros_like(whole, dtype=torch.bool).scatter(1, cand.where(p > 0, 0), True); among[:, 0] = False
        found.append((whole*among).sum(1)[p.sum(1) > 0])
    return torch.cat(found).numpy()

def same_neighbours(feature, near, items: int=500) -> float:
    "Fifty nearest in all directions and in those kept."
    own = np.flatnonzero(feature.present); some = np.random.default_rng(0).permutation(len(own))[:items]
    x = torch.from_numpy(unit(feature)[own])
    sim = x[some] @ x.T; sim[range(len(some)), some] = -2.; best = torch.from_numpy(own)[sim.topk(near.ids.shape[1], 1).indices]
    return float((near.ids[own[some]][:, :, None] == best[:, None]).any(1).float().mean())

if __name__ == '__main__':
    rows = []
    for name, source in SETS:
        data = add_features(load_dataset(name, source=source, **dict(planted_seed=1) if source == 'planted' else {}), progress=False)
        windows = train_windows(data.train.starts, data.train.ends, 50); full = float((windows.length == 50).mean())
        for modality, feature in data.features.items():
            if not feature.present.any(): continue
            near = neighbour_table(feature.values, feature.present); found = mass(data, near)
            low, high = np.quantile(found, [.1, .9]).tolist(); same = same_neighbours(feature, near)
            rows.append(dict(dataset=title(name, source, 1), items=data.n_items, modality=modality, gaps=len(found), mass=float(found.mean()),
                             low=low, high=high, same_neighbours=same, full=full, commit=git_commit()))
            print(rows[-1], flush=True)
    table = pl.DataFrame(rows); atomic_write(project_root()/'results'/'insertion_mass.csv', lambda tmp: table.write_csv(tmp, float_precision=3))
