r"""NDCG@10 of DuAF-MAT while more and more pictures are withheld, for each way to fill the gap; planted toys, generator seed 1 (tuned on seed 0).

    python benchmarks/missing_rate.py        # results/missing_rate_toys_planted_g1_{runs,tests}.csv; 24 runs of two CPU minutes each

The rates are shares of the pictures that are there (some are missing from the start); the same items for every fill of a seed. Settings: those that tuning
chose for DuAF-MAT (results/tune_recommenders_toys_planted.csv). One seed for every rate and fill, three for `generated` and `mean` at 60%. `error` is the
standard error over users of one run; another seed's weights and withheld items come on top. `_tests`: every fill against `mean` on the same users, Wilcoxon
signed-rank, Holm over the fills of one rate; history not masked. Every run is recorded; a stopped study goes on where it stopped.
"""
import argparse
import polars as pl
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import load_run
from mmrec_wb.training.metrics import ndcg
from mmrec_wb.training.significance import compare
from study_recommenders import values
from tune_recommenders import best, run, title

METRICS, FILLS = ('NDCG@10', 'NDCG@10 masked'), ('generated', 'mean', 'zero', 'random', 'none')
SETS = [(rate, FILLS, (0,)) for rate in (0., .3, .6, .9)] + [(.6, ('generated', 'mean'), (0, 1, 2))]      # rate, fills, seeds

def study(args) -> dict: # (rate, fill, seed) -> a row
    "All runs."
    rows, folder, head = {}, project_root()/args.out_dir, dict(dataset=title('toys', 'planted', 1))
    settings = best('toys', 'planted').get('duaf_mat', {}) | (dict(epochs=args.epochs) if args.epochs else {})
    for key in dict.fromkeys((rate, fill, seed) for rate, fills, seeds in SETS for fill in fills for seed in seeds):
        rate, fill, seed = key
        done = run(dataset='toys', source='planted', planted_seed=1, out_dir=args.out_dir, model='duaf_mat', seed=seed, **settings,
                   visual_missing_rate=rate, visual_fill=fill)
        if not done: raise SystemExit('no tables; the same command goes on')
        each = ndcg(load_run(folder/done['run']).frame('ranks')['rank'].to_torch(), 10)
        rows[key] = dict(**head, missing_rate=rate, fill=fill, seed=seed, error=float(each.std()/len(each)**.5),
                         **{m: values(folder, done['run'])['model'][m] for m in METRICS}, **done)
    return rows

def tested(rows, folder):
    "The other fills against the mean picture."
    parts = []
    for rate, fills, seeds in SETS:
        ranks = {f: [load_run(folder/rows[rate, f, s]['run']).frame('ranks') for s in seeds] for f in fills}
        parts.append(compare(ranks, 'mean', 'NDCG@10').select(pl.lit(rate).alias('missing_rate'), pl.lit('mean').alias('baseline'), pl.all()))
    return pl.concat(parts).with_columns(commit=pl.lit(next(iter(rows.values()))['commit']))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--out-dir', default='runs/recommenders'); a.add_argument('--epochs', type=int, help='fewer, to try it out; no table is written')
    args = a.parse_args(); rows = study(args); table, tests = pl.DataFrame([*rows.values()]), tested(rows, project_root()/args.out_dir)
    for name, frame in dict(runs=table.drop('pictures'), tests=tests).items():
        file = project_root()/'results'/f'missing_rate_toys_planted_g1_{name}.csv'
        if not args.epochs: atomic_write(file, lambda tmp: frame.write_csv(tmp, float_precision=6))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=160): print(table.select('missing_rate', 'fill', 'seed', *METRICS, 'error'), tests)
