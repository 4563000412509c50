r"""Does a unit of the sparse autoencoder show one planted factor more purely than a direction that nobody trained for it?

    python benchmarks/truth_sae.py         # generator seed 1, runs with seeds 0 1 2: results/truth_sae.csv (trains what is not there yet; --parts for some)

Plain item vectors (kind=items, full width; pictures for the visual factors, words for the textual ones) and pairs (kind=pairs; `visual` pictures or words).
Against the same number of directions from PCA (128; of the vectors, or of d written out for 20,000 pairs) and of random directions. For each label the unit
(or direction) and its sign are picked on half of the items, and the AUC is that on the other half; a pair counts where both of its items lie in one half.
Questions: `level` (items: has it the level; pairs: has the positive a level that the other item lacks), the mean over the factor's levels; `differs` (pairs:
do the two differ in the factor at all). `probe`: a ridge regression onto the label itself, fitted on the first half: what could be read off the same vectors.
`wins`: the paper's autoencoder (sigmoid, `sae`) lies above both PCA and random; in the rows over all seeds: in each of the seeds. `topk`: the alternative.
The settings are the defaults of `train_sae`; they were fixed on generator seed 0, which shows in no row.
"""
import argparse
import numpy as np, polars as pl, torch
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import git_commit, versions
from mmrec_wb.core.seeds import rng
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.data.planted import FACTORS
from mmrec_wb.training.factors import Pairs, aucs, labels_of, load_factors, planted_levels, train_sae

SAMPLE, ARMS = 20_000, ('sae', 'topk', 'pca', 'random', 'probe')
PARTS = {f'{kind}-{visual}': (kind, visual) for kind in ('items', 'pairs') for visual in ('image', 'text')}

def sample(data, f, kind, seed, n):
    "Vectors as they are read, d written out [n, D], positive and other item."
    if kind == 'items': ids = f.present.nonzero()[:, 0].numpy(); return (f.v[ids], None), f.v[ids].numpy(), ids, None
    x, t, _, positive, other = Pairs(data, f, 200, 8, n//8, seed)(1).rows(0); many = t.repeat_interleave(8, 0)
    return (x, t), (x.flatten(0, 1)[:, :, None]*many[:, None]).flatten(1).numpy(), positive.repeat(8), other.ravel()

@torch.no_grad()
def directions(d, k, seed):
    "Principal and random ones [D, k], from d [n, D]; fewer where the vectors are shorter."
    torch.manual_seed(seed); d = torch.from_numpy(d); V = torch.svd_lowrank(d - d.mean(0), min(k, *d.shape), niter=4)[2]
    return dict(pca=V.numpy(), random=torch.randn(d.shape[1], k).numpy())

def picked(z, y, a, b): # [labels]
    "AUC on b of the unit and the sign that were best on a."
    first, then = aucs(z[a], y[a]) - .5, aucs(z[b], y[b]) - .5; best, label = np.abs(first).argmax(0), np.arange(y.shape[1])
    return .5 + np.sign(first[best, label])*then[best, label]

def probed(d, y, a, b):
    "AUC on b of a ridge regression fitted on a."
    mean = d[a].mean(0); x = torch.from_numpy(d[a] - mean); g = x.T @ x; g.diagonal().add_(3e-3*float(g.diagonal().sum())**.5 + 1e-3*float(g.diagonal().mean()))
    w = torch.linalg.solve(g, x.T @ torch.from_numpy((y[a] - y[a].mean(0)).astype(np.float32))).numpy()
    return np.array([aucs((d[b] - mean) @ w[:, [k]], y[b][:, [k]])[0, 0] for k in range(y.shape[1])])

def part(data, kind, visual, seed, args): # rows
    "One kind, one seed: the AUC of each arm for each factor."
    how = dict(kind=kind, visual=visual, seed=seed, out_dir=args.out_dir, planted_seed=args.planted_seed)
    runs = {arm: train_sae(data, activation=a, **how) for arm, a in (('sae', 'sigmoid'), ('topk', 'topk')) if arm == 'sae' or kind == 'items' or args.topk}
    fs = {arm: load_factors(run, data) for arm, run in runs.items()}
    (x, t), d, positive, other = sample(data, fs['sae'], kind, 1000 + seed, SAMPLE)
    scale = {arm: float(f.v.norm()/fs['sae'].v.norm()) for arm, f in fs.items()}
    with torch.no_grad(): z = {arm: f.sae.encode(x*scale[arm], t).reshape(len(d), -1).numpy() for arm, f in fs.items()}
    learn = d if kind == 'items' else sample(data, fs['sae'], kind, 2000 + seed, SAMPLE)[1]
    z |= {arm: d @ v for arm, v in directions(learn, 128, seed).items()}; rows = []
    half = rng(seed, 'halves').random(data.n_items + 1) < .5
    a, b = (h[positive] if other is None else h[positive] & h[other] for h in (half, ~half))
    for factor, (names, level) in planted_levels(data).items():
        if factor not in FACTORS[visual]: continue
        y = labels_of(level, len(names), positive, other); said = {arm: picked(v, y, a, b) for arm, v in z.items()} | dict(probe=probed(d, y, a, b))
        for question, of in dict(level=slice(1, None), differs=slice(0, 1)).items():
            if question == 'level' or kind == 'pairs':
                row = dict(kind=kind, visual=visual, factor=factor, question=question, seed=str(seed), run=runs['sae'].path.name)
                rows.append(row | {arm: float(v[of].mean()) for arm, v in said.items()})
    return rows

def main(args):
    data = add_features(load_dataset('toys', source='planted', planted_seed=args.planted_seed), progress=False)
    file = project_root()/'results'/(f'truth_sae.csv' if args.planted_seed == 1 else f'truth_sae_s{args.planted_seed}.csv')
    for name in args.parts:
        rows = [row for seed in args.seeds for row in part(data, *PARTS[name], seed, args)]
        table = pl.DataFrame(rows, infer_schema_length=None).with_columns(wins=pl.col('sae') > pl.max_horizontal('pca', 'random'))
        table = table.with_columns(pl.lit(None, pl.Float64).alias(c) for c in ARMS if c not in table.columns); keys = ['kind', 'visual', 'factor', 'question']
        every = table.group_by(keys, maintain_order=True).agg(pl.lit('all').alias('seed'), pl.col(ARMS).mean(), pl.col('wins').all(), pl.lit('').alias('run'))
        table = pl.concat([table, every], how='diagonal').select(*keys, 'seed', *ARMS, 'wins', 'run')
        facts = dict(dataset=f'toys (planted), generator seed {args.planted_seed}', commit=git_commit(), versions=f'torch {versions()["torch"]}')
        table = table.with_columns(pl.lit(v).alias(k) for k, v in facts.items())
        mine = (pl.col('kind') == PARTS[name][0]) & (pl.col('visual') == PARTS[name][1])
        if file.exists(): table = pl.concat([pl.read_csv(file, schema_overrides=table.schema).filter(~mine), table])
        atomic_write(file, lambda tmp: table.write_csv(tmp, float_precision=4))
        with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=160): print(every.drop('run'), flush=True)

def readme_rows(table: pl.DataFrame) -> list: # of results/truth_sae.csv
    "results/README.md's lines: plain item vectors, mean over seeds."
    rows = {r['factor']: r for r in table.filter(seed='all', kind='items').to_dicts()}; order = ('theme', 'material', 'age', 'colour', 'shape', 'pattern')
    called = dict(sae='units of the autoencoder', topk='units with TopK', pca='principal components', random='random directions',
                  probe='a probe that is told (ceiling)')
    return [f'| {name} | ' + ' | '.join(f'{rows[f][c]:.3f}' for f in order) + ' |' for c, name in called.items()]

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--planted-seed', type=int, default=1); a.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    a.add_argument('--parts', nargs='+', default=list(PARTS), choices=list(PARTS)); a.add_argument('--topk', action='store_true', help='topk for pairs, too')
    a.add_argument('--out-dir', default='runs/sae'); main(a.parse_args())
