r"""Memory on a planted shop of 200,000 items and 50,000 users: a few training steps of SASRec and of DuAF-MAT, all users ranked among all items, and what the
record explains (weights of 2,000 users, neighbours of pictures; a tenth of the pictures withheld, so that guesses are compared).

    python benchmarks/scale_recommenders.py         # results/scale_recommenders.csv; --items, --users, --steps, --rank for other sizes

The catalogue, its missing pictures and the users' choices follow the planted generator (`draw_items`, `choice_tables`). Two things are made otherwise:
choices are drawn from cumulative tables and drawn again where owned, since `simulate` holds users x items numbers at a time; and the vectors are made up, of
the encoders' lengths (384 and 1,280: the sum of a random vector for each factor, and noise), since encoding 200,000 texts takes most of an hour. Nothing is
written to data/cache: everything lies in a temporary folder (1.4 GB), the vectors memory-mapped. Each model runs in a process of its own; `peak_mb` is its
highest resident memory, imports and the pages of the memory map included.
"""
import argparse, json, os, resource, subprocess, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
import numpy as np, polars as pl
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import git_commit, versions
from mmrec_wb.core.seeds import rng
from mmrec_wb.data import Dataset, Feature

LENGTHS = dict(text=384, image=1280)
peak_mb = lambda: round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)

# ---- the shop ----
def choices(tables, n_users):
    "Users' items and times, with drifting attention: lists of (user, item, time) arrays, a step each."
    from mmrec_wb.data.planted import ATTENTION_DAYS, ATTENTION_SD
    g = rng(0, 'scale'); lengths = 5 + g.negative_binomial(2, .3, n_users); types = {m: g.integers(len(t), size=n_users) for m, t in tables.items()}
    cdf = {m: t.cumsum(1) for m, t in tables.items()}; owned = np.full((n_users, lengths.max()), -1, np.int32)
    z, t, steps = ATTENTION_SD*g.normal(size=n_users), 1325376000 + g.uniform(0, 365*86400, n_users), []
    for step in range(lengths.max()):
        u = np.flatnonzero(lengths > step); left, words = u, g.random(len(u)) < 1/(1 + np.exp(-z[u]))
        while len(left):
            drawn = np.empty(len(left), np.int32)
            for m, of in (('text', words), ('image', ~words)):
                for k in np.unique(types[m][left[of]]):
                    rows = np.flatnonzero(of & (types[m][left] == k)); drawn[rows] = np.searchsorted(cdf[m][k], g.random(len(rows))*cdf[m][k][-1])
            again = (owned[left] == drawn[:, None]).any(1); owned[left[~again], step] = drawn[~again]; left, words = left[again], words[again]
        steps.append((u, owned[u, step], t[u].astype(np.int64)))
        gap = np.where(g.random(n_users) < .25, 20 + g.exponential(60, n_users), g.exponential(1.5, n_users)) + 1e-4
        keep = np.exp(-gap/ATTENTION_DAYS); z, t = keep*z + np.sqrt(1 - keep**2)*ATTENTION_SD*g.normal(size=n_users), t + 86400*gap
    return steps

def make(folder, n_items, n_users):
    "Write the shop: sequences.npz, catalogue.parquet, text.npy, image.npy."
    from mmrec_wb.data.planted import CATEGORIES, FACTORS, choice_tables, draw_items
    items = draw_items(n_items, 0); user, item, times = map(np.concatenate, zip(*choices(choice_tables(items), n_users)))
    order = np.lexsort((times, user)); offsets = np.append(0, np.bincount(user).cumsum())
    np.savez(folder/'sequences.npz', offsets=offsets, items=item[order] + 1, times=times[order])
    padded = lambda x: np.append(x[:1], x)
    facts = dict(category=padded(np.array(list(CATEGORIES))[items['category']]), picture=padded(~items['missing'].to_numpy()))
    pl.DataFrame(facts).write_parquet(folder/'catalogue.parquet')
    for m, factors in FACTORS.items():
        g = rng(0, 'vectors', m); out = np.lib.format.open_memmap(folder/f'{m}.npy', 'w+', np.float32, (n_items + 1, LENGTHS[m]))
        parts = [(g.normal(size=(len(levels), LENGTHS[m])), items[f].to_numpy()) for f, levels in factors.items()]
        for a in range(0, n_items, 8192):
            rows = slice(a, min(a + 8192, n_items)); x = sum(table[level[rows]] for table, level in parts)
            out[1 + rows.start:1 + rows.stop] = (x + g.normal(size=x.shape))/x.shape[1]**.5

def load(folder) -> Dataset:
    "The shop as a data set; features memory-mapped."
    s, c = np.load(folder/'sequences.npz'), pl.read_parquet(folder/'catalogue.parquet'); n = c.height
    raw, none = [f'i{k}' for k in range(n)], pl.Series(['']*n)
    catalogue = pl.DataFrame(dict(id=np.arange(n, dtype=np.int32), raw_id=raw, title=none, text=none, category=c['category'],
                                  image=pl.Series([None]*n, dtype=pl.String)))
    present = dict(text=np.arange(n) > 0, image=c['picture'].to_numpy() & (np.arange(n) > 0))
    features = {m: Feature(np.load(folder/f'{m}.npy', mmap_mode='r'), present[m]) for m in LENGTHS}
    users = [f'u{k}' for k in range(len(s['offsets']) - 1)]
    return Dataset('toys', 'planted', users, s['offsets'], s['items'].astype(np.int32), s['times'], catalogue, 'scale', features)

# ---- one model ----
def measure(folder, name, steps, rank):
    "Build, train some steps, rank some users."
    import torch
    from accelerate import Accelerator
    from mmrec_wb.core.seeds import set_seed
    from mmrec_wb.data.batches import train_batches
    from mmrec_wb.models import get_model
    from mmrec_wb.training.fit import optimisers, step
    from mmrec_wb.training.ranking import metrics_of, rank_all
    data, clock = load(folder), time.perf_counter; set_seed(0)
    said = dict(dataset='planted, made for this test', model=name, items=data.n_items, users=data.n_users, interactions=len(data.items), loaded_mb=peak_mb())
    own = dict(visual_missing_rate=.1) if name == 'duaf_mat' else {}
    start = clock(); model = get_model(name)(data, **own); getattr(model, 'near', None)               # all items are compared once
    said |= dict(build_s=clock() - start, build_mb=peak_mb())
    accelerator, by = Accelerator(cpu=True), optimisers(model, 1e-3); batches = train_batches(data, model.max_len, 2048, 0, 1); model.train(); losses = []
    start = clock()
    for i in range(steps): losses.append(step(accelerator, model, batches[i], by)['loss'])
    said |= dict(steps=steps, targets=sum(int((batches[i].targets > 0).sum()) for i in range(steps)), s_per_step=(clock() - start)/steps,
                 first_loss=losses[0], last_loss=losses[-1], train_mb=peak_mb())
    some = replace(data, users=data.users[:rank], offsets=data.offsets[:rank + 1], items=data.items[:data.offsets[rank]], times=data.times[:data.offsets[rank]])
    start = clock(); frame = rank_all(model, some); said |= dict(ranked_users=frame.height, users_per_s=frame.height/(clock() - start), rank_mb=peak_mb())
    start = clock(); frames = model.eval().explanations(data); said |= dict(explained=' '.join(frames), explain_s=clock() - start)
    return said | {'NDCG@10': metrics_of(frame)['NDCG@10/model'], 'peak_mb': peak_mb(), 'threads': torch.get_num_threads()}

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--items', type=int, default=200_000); a.add_argument('--users', type=int, default=50_000)
    a.add_argument('--steps', type=int, default=5); a.add_argument('--rank', type=int, default=50_000)
    a.add_argument('--part', nargs=2, help=argparse.SUPPRESS); args = a.parse_args()
    if args.part:
        what, folder = args.part[0], Path(args.part[1])
        print(json.dumps(make(folder, args.items, args.users) if what == 'make' else measure(folder, what, args.steps, args.rank))); raise SystemExit
    rows, sizes = [], [f'--{k}={getattr(args, k)}' for k in ('items', 'users', 'steps', 'rank')]
    with tempfile.TemporaryDirectory() as folder:
        for what in ('make', 'sasrec', 'duaf_mat'):
            command = [sys.executable, __file__, *sizes, '--part', what, folder]
            p = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
            if said := json.loads(p.stdout.strip().splitlines()[-1]): rows.append(said); print(said, flush=True)
    table = pl.DataFrame(rows).with_columns(commit=pl.lit(git_commit()), versions=pl.lit(f'torch {versions()["torch"]}'))
    atomic_write(project_root()/'results'/'scale_recommenders.csv', lambda tmp: table.write_csv(tmp, float_precision=5))
