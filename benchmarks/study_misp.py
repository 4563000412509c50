r"""MISP-DPO (K = 1, 3, 5) against S-DPO with random negatives, DPO and SFT, on the multimodal language model; tables go to results/misp_<data set>_*.csv.

    python benchmarks/study_misp.py --tune                                             # planted, generator seed 0; results/misp_toys_planted_tune.csv
    python benchmarks/study_misp.py --planted-seed 1                                   # planted, 2,000 users
    MMREC_DATA=... python benchmarks/study_misp.py --dataset ml-100k --max-users 150 --epochs 5   # posters

`--tune`: six trials each for MISP-DPO (K = 3) and S-DPO, judged by AUC on the VALID questions of 800 planted users, one seed, after 5 epochs of SFT (the
planted table: 3): beta .1 and .5, learning rates .0001, .0003 and .001; K = 1 and K = 5 take what was chosen for K = 3. DPO has had the same six trials on
the same questions (tune_hanorec.py). All data sets use what was chosen on the planted shop. All arms of a seed share their SFT run; the second stage of MISP-
DPO and S-DPO sees, once, the training questions whose item has a picture; DPO's, once, all of them. S-DPO: the same loss between items and the same text
side, negatives drawn uniformly among items with a picture.
`_runs`: a row a run. `_summary`: mean and sd over seeds. `_tests`: AUC averaged over seeds, paired bootstrap over test users, Holm over the arms; against SFT,
DPO and S-DPO. A stopped study goes on where it stopped.
"""
import os; os.environ.setdefault('OMP_NUM_THREADS', '1')
import argparse, json
from itertools import product
import polars as pl
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.training.hanorec import train_preference, train_sft
from mmrec_wb.training.misp import train_misp
from mmrec_wb.training.significance import compare
from tune_hanorec import best as best_dpo

GRID = [dict(beta=b, preference_lr=lr) for b, lr in product((.1, .5), (1e-4, 3e-4, 1e-3))]
SDPO = dict(loss='sdpo', strategy='uniform', negatives=3)
ARMS = dict(sft={}, dpo={}, sdpo=SDPO, **{f'misp_{k}': dict(negatives=k) for k in (1, 3, 5)})
FILE = project_root()/'results'/'misp_toys_planted_tune.csv'

def value(run, split, name='auc/model'): return run.frame('metrics').filter(split=split, name=name)['value'].item()
def origin(run):
    v = run.info['versions']
    return dict(run=run.path.name, commit=run.info['commit'], versions=' '.join(f'{n} {v[n]}' for n in ('torch', 'transformers', 'trl')))

def tune(out_dir):
    "Six trials an arm; what is there is reloaded."
    data = add_features(load_dataset('toys', source='planted', max_users=800), progress=False)
    rows, how = [], dict(out_dir=out_dir, seed=0, epochs=5, max_users=800); sft = train_sft(data, **how)
    for arm in ('sdpo', 'misp_3'):
        for trial in GRID:
            r = train_misp(data, sft, **how, **ARMS[arm], **trial)
            rows.append(dict(dataset='toys (planted)', generator_seed=0, users=800, seed=0, arm=arm, **trial, valid_auc_sft=value(sft, 'valid'),
                             valid_auc=value(r, 'valid'), cpu_seconds=r.info['cpu_seconds'], **origin(r)))
            print(arm, trial, f'valid AUC {rows[-1]["valid_auc"]:.4f} (SFT {rows[-1]["valid_auc_sft"]:.4f})', flush=True)
    atomic_write(FILE, lambda tmp: pl.DataFrame(rows).write_csv(tmp, float_precision=5))

def best() -> dict: # arm -> settings
    "What tuning chose."
    table = pl.read_csv(FILE).sort('valid_auc', descending=True, maintain_order=True)
    of = lambda arm: {k: table.filter(arm=arm).row(0, named=True)[k] for k in ('beta', 'preference_lr')}
    return dict(sft={}, dpo=best_dpo()['dpo'], sdpo=of('sdpo'), **{f'misp_{k}': of('misp_3') for k in (1, 3, 5)})

def run(data, arm, seed, tuned, how):
    sft = train_sft(data, seed=seed, **how)
    if arm == 'sft': return sft
    if arm == 'dpo': return train_preference(data, sft, seed=seed, loss='dpo', **how, **tuned)
    return train_misp(data, sft, seed=seed, **how, **ARMS[arm], **tuned)

def main(args):
    planted = args.source == 'planted'; more = dict(planted_seed=args.planted_seed) if planted else {}
    name = args.name or f'misp_{args.dataset}' + (f'_planted_g{args.planted_seed}' if planted else '')
    title = f'{args.dataset} (planted, generator seed {args.planted_seed})' if planted else args.dataset
    data = add_features(load_dataset(args.dataset, source=args.source, max_users=args.max_users, **more), progress=False)
    how, tuned, rows, frames = dict(out_dir=args.out_dir, max_users=args.max_users, epochs=args.epochs, device='cpu', **more), best(), [], {}
    for seed in args.seeds:
        for arm in args.arms:
            try: r = run(data, arm, seed, tuned[arm], how)
            except WorkbenchError as e: raise SystemExit(f'{arm}, seed {seed}: {e}; the same command goes on')
            frames.setdefault(arm, []).append(ranks := r.frame('ranks'))
            scores = {k.replace('/', '_').removesuffix('_model'): value(r, 'test', k) for k in ('auc/model', 'auc_hard/model', 'auc/popularity')}
            about = tuned[arm] | dict(cpu_seconds=r.info['cpu_seconds']) | origin(r) | dict(params=json.dumps(r.params))
            rows.append(dict(dataset=title, users=ranks['user'].n_unique(), arm=arm, seed=seed, **scores, **about))
            print(f'{arm} seed {seed}: AUC {rows[-1]["auc"]:.4f}', flush=True)
    table = pl.DataFrame(rows, infer_schema_length=None); means = ('auc', 'auc_hard', 'auc_popularity', 'cpu_seconds')
    mean_of = dict(seeds=pl.len(), **{c: pl.col(c).mean() for c in means}, auc_sd=pl.col('auc').std())
    summary = table.group_by('dataset', 'users', 'arm', maintain_order=True).agg(**mean_of)
    bases = [b for b in ('sft', 'dpo', 'sdpo') if b in args.arms[:-1]]; after = lambda b: args.arms[args.arms.index(b):]
    tests = [compare({a: frames[a] for a in after(b)}, b, 'auc').select(pl.lit(title).alias('dataset'), pl.lit(b).alias('baseline'), pl.all()) for b in bases]
    for part, frame in dict(runs=table, summary=summary, tests=pl.concat(tests)).items():
        atomic_write(project_root()/'results'/f'{name}_{part}.csv', lambda tmp: frame.write_csv(tmp, float_precision=6))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200, float_precision=4): print(summary); print(pl.concat(tests))

def readme_row(
    summary: pl.DataFrame # of results/misp_*_summary.csv
) -> str:
    "results/README.md's line for a study: AUC, mean ± sd over seeds."
    m = {r['arm']: r for r in summary.to_dicts()}; one = summary.row(0, named=True)
    said = lambda r: '–' if r is None else f"{r['auc']:.3f}" + (f" ± {r['auc_sd']:.3f}" if r['auc_sd'] is not None else '')
    return f"| {one['dataset']} | {one['users']:,} | " + ' | '.join(said(m.get(a)) for a in ARMS) + ' |'

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--dataset', default='toys'); a.add_argument('--source', choices=['raw', 'planted'], help='default: planted for toys, else raw')
    a.add_argument('--planted-seed', type=int, default=1, help='of the generator'); a.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    a.add_argument('--max-users', type=int, default=2000); a.add_argument('--epochs', type=int, default=3, help='of SFT')
    a.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS)); a.add_argument('--out-dir', help='default: runs/misp, of --tune runs/tune')
    a.add_argument('--name', help='of the files under results/'); a.add_argument('--tune', action='store_true')
    args = a.parse_args(); args.source = args.source or ('planted' if args.dataset == 'toys' else 'raw')
    args.out_dir = args.out_dir or ('runs/tune' if args.tune else 'runs/misp')
    tune(args.out_dir) if args.tune else main(args)
