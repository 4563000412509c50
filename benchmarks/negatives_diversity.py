r"""Do the negatives that the autoencoder chooses differ more from each other than top-K's, when they are as hard for the model? results/negatives_diversity.csv

    python benchmarks/negatives_diversity.py                                      # planted, generator seed 1: pictures
    MMREC_DATA=... python benchmarks/negatives_diversity.py --dataset toys1k      # words

K = 3 negatives for 2,000 training targets of a trained SASRec (settings of tune_recommenders.py), three seeds. `distance`: mean pairwise cosine distance of the
three in the frozen vectors of the item's picture (or words), not in the units. `gap`: score of the target minus score of the negative. `sae`: the greedy choice
from the 200 items most like the target; all arms draw from items that have such a vector; `topk`: drawn from the 20 best-scored; `matched`: for each item
that `sae` chose, one of the ten whose scores lie nearest to its score, so that the gaps are the same; `alike`: three of the same
200 at random. Never the target, never what the user had before.
`minus matched`: difference of distances over targets, mean and 95% interval (bootstrap over users).
"""
import os; os.environ.setdefault('OMP_NUM_THREADS', '1')
import argparse
import numpy as np, polars as pl, torch
import torch.nn.functional as F
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import git_commit, versions
from mmrec_wb.core.seeds import rng
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.preference.negatives import pool_of, sample
from mmrec_wb.training.factors import load_factors, train_sae
from mmrec_wb.training.recommender import load_model, train_recommender
from mmrec_wb.training.rodpo import probe_batches, seen_before
from tune_recommenders import best, title

K = 3

def matched(scores, own, ids, g):
    "For each id one of the ten items with the nearest scores; not the same twice in a row."
    s = scores.scatter(1, own, torch.inf).scatter(1, torch.zeros_like(own[:, :1]), torch.inf); out = []
    for k in range(ids.shape[1]):
        near = (s - scores.gather(1, ids[:, [k]])).abs().scatter(1, ids, torch.inf).topk(10, largest=False).indices
        got = near.gather(1, torch.randint(10, (len(near), 1), generator=g)); s = s.scatter(1, got, torch.inf); out.append(got)
    return torch.cat(out, 1)

def spread(v, ids): # [B]
    "Mean pairwise cosine distance."
    u = F.normalize(v[ids], dim=2); c = 1 - u @ u.transpose(1, 2)
    return c.sum((1, 2))/(ids.shape[1]*(ids.shape[1] - 1))

def one_seed(data, args, seed):
    "A frame: user, arm, distance, gap."
    settings, visual = best(args.dataset, args.source)['sasrec'], 'image' if 'image' in data.features else 'text'
    run = train_recommender(data, 'sasrec', **settings, seed=seed, out_dir='runs/recommenders', device='cpu', planted_seed=args.planted_seed)
    factors = load_factors(train_sae(data, visual=visual, seed=seed, out_dir='runs/sae', planted_seed=args.planted_seed), data)
    return drawn(data, load_model(run, data), factors, torch.from_numpy(np.array(data.features[visual].values)), seed)

@torch.no_grad()
def drawn(data, model, factors, v, seed):
    "The arms on the same targets."
    parts, g = [], torch.Generator().manual_seed(seed)
    for batch, _ in probe_batches(data, model.max_len, seed):
        y, seen = batch.targets[batch.targets > 0], seen_before(data, batch); keep = factors.present[y]
        z = model.scores(model.states(batch)[batch.targets > 0])[keep].masked_fill(~factors.present, -torch.inf)
        y, seen, user = y[keep], seen[keep], batch.user[keep]
        own, pool = torch.cat([y[:, None], seen], 1), pool_of(factors.similarity(y), y, seen, 200)
        found = dict(sae=sample(None, y, seen, K, 'sae', context=dict(sae=factors), generator=g)[0], topk=sample(z, y, seen, K, 'topk', generator=g)[0])
        found |= dict(matched=matched(z, own, found['sae'], g), alike=sample(None, y, seen, K, 'topk', pool=pool, generator=g)[0])
        for arm, ids in found.items():
            there = factors.present[ids].all(1); gap = (z.gather(1, y[:, None]) - z.gather(1, ids)).mean(1)
            distance = torch.where(there, spread(v, ids), torch.nan)
            parts.append(pl.DataFrame(dict(user=user.numpy(), arm=[arm]*len(y), distance=distance.numpy(), gap=gap.numpy())))
    return pl.concat(parts)

def interval(rows, seed=0): # of distance(sae) - distance(matched)
    "Mean and 95% interval over users."
    d = rows.pivot(on='arm', index=['seed', 'target'], values='distance').join(rows.select('seed', 'target', 'user').unique(), on=['seed', 'target'])
    each = d.with_columns(d=pl.col('sae') - pl.col('matched')).filter(pl.col('d').is_finite()).group_by('user').agg(pl.col('d').mean())['d'].to_numpy()
    means = [each[rng(seed, 'bootstrap', k).integers(len(each), size=len(each))].mean() for k in range(1000)]
    return each.mean(), *np.quantile(means, [.025, .975]), len(each)

def main(args):
    more = dict(planted_seed=args.planted_seed) if args.source == 'planted' else {}
    data = add_features(load_dataset(args.dataset, source=args.source, **more), progress=False); name = title(args.dataset, args.source, args.planted_seed)
    of = lambda s: one_seed(data, args, s).with_columns(seed=pl.lit(s), target=pl.int_range(pl.len()).over('arm'))
    rows = pl.concat([of(s) for s in args.seeds]); mean, low, high, users = interval(rows)
    known = pl.col('distance').is_finite(); by = ['arm']
    table = rows.filter(known).group_by(by, maintain_order=True).agg(pl.col('distance', 'gap').mean(), targets=pl.len())
    sd = rows.filter(known).group_by('arm', 'seed').agg(pl.col('distance').mean()).group_by('arm').agg(pl.col('distance').std().alias('distance sd'))
    facts = dict(seeds=len(args.seeds), users=users, commit=git_commit(), versions=f'torch {versions()["torch"]}')
    minus = {'minus matched': mean, 'low': low, 'high': high}
    when = lambda v: pl.when(pl.col('arm') == 'sae').then(pl.lit(v))
    table = table.join(sd, on='arm', maintain_order='left').select(pl.lit(name).alias('dataset'), pl.all(), *(when(v).alias(k) for k, v in minus.items()),
        *(pl.lit(v).alias(k) for k, v in facts.items()))
    file = project_root()/'results'/'negatives_diversity.csv'
    if file.exists(): table = pl.concat([pl.read_csv(file, schema_overrides=table.schema).filter(pl.col('dataset') != name), table])
    atomic_write(file, lambda tmp: table.write_csv(tmp, float_precision=5))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=180): print(table.drop('commit', 'versions'))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--dataset', default='toys'); a.add_argument('--source', choices=['raw', 'planted'], help='default: planted for toys, else raw')
    a.add_argument('--planted-seed', type=int, default=1, help='of the generator'); a.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    args = a.parse_args(); args.source = args.source or ('planted' if args.dataset == 'toys' else 'raw'); main(args)
