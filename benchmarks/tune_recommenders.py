r"""Settings of SASRec and of DuAF-MAT: six trials each, one seed, judged by NDCG@10 on the VALID targets (history not masked). Test numbers are not read.

    MMREC_DATA=... python benchmarks/tune_recommenders.py --dataset toys1k --source raw       # results/tune_recommenders_toys1k.csv
    python benchmarks/tune_recommenders.py --dataset toys --source planted                    # generator seed 0; results/tune_recommenders_toys_planted.csv
    MMREC_DATA=... python benchmarks/tune_recommenders.py --dataset ml-100k --source raw      # results/tune_recommenders_ml-100k.csv

Both learning rates of the paper's grid that lie around the usual one, times three settings that were named before any trial was run: for SASRec dropout .5
(default), .3 and .2; for DuAF-MAT the defaults, dropout .3, and temperature 1.0 (the upper end of the paper's grid: there the contrastive terms pull least).
On ml-100k, where an epoch of DuAF-MAT costs 17 CPU s, both models have two trials only, the learning rates, with the defaults.
All else is at its default; lambda_1 = lambda_2 = .2, the lower end of the paper's grid. Patience 10, at most 200 epochs, for all. A stopped search goes on
where it stopped: each trial is a recorded run in a process of its own. Its ablations run with what is chosen for DuAF-MAT.
"""
import argparse, json, os, subprocess, sys
from itertools import product
import polars as pl
from mmrec_wb.core.paths import atomic_write, project_root

TRIALS = [dict(model='sasrec', lr=lr, dropout=p) for lr, p in product((1e-3, 3e-3), (.5, .3, .2))] + \
         [dict(model='duaf_mat', lr=lr, dropout=p, tau=t) for lr, (p, t) in product((1e-3, 3e-3), ((.5, .2), (.3, .2), (.5, 1.)))]
FEW = [t for t in TRIALS if t['dropout'] == .5 and t.get('tau') != 1.]

def trials(dataset): return FEW if dataset == 'ml-100k' else TRIALS
def title(dataset, source, planted_seed=0): return f'{dataset} (planted, generator seed {planted_seed})' if source == 'planted' else dataset
def tuned_file(dataset, source): return project_root()/'results'/f'tune_recommenders_{dataset}{"_planted" if source == "planted" else ""}.csv'

def run_here(dataset, source, planted_seed, out_dir, seed, model, **settings) -> dict: # what the tables need of it
    "One recorded run; a finished one is reloaded."
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.features import add_features
    from mmrec_wb.training.recommender import known_settings, train_recommender
    planted = dict(planted_seed=planted_seed) if source == 'planted' else {}
    data = load_dataset(dataset, source=source, **planted)
    if model != 'sasrec': add_features(data, progress=False)
    r = train_recommender(data, model, **known_settings(model, settings), seed=seed, out_dir=out_dir, device='cpu', planted_seed=planted_seed)
    pictures, names = data.features['image'].present[1:] if 'image' in data.features else None, ('torch', 'polars', 'mmrec_wb')
    facts = {k: r.info.get(k) for k in ('best_epoch', 'epochs_run', 'wall_seconds', 'cpu_seconds', 'peak_memory_mb', 'commit')}
    return dict(run=r.path.name, pictures='none' if pictures is None else 'all' if pictures.all() else 'some', **facts,
                versions=' '.join(f'{n} {r.info["versions"][n]}' for n in names), params=json.dumps(r.params))

def run(**what) -> dict|None: # as `run_here`; None if it failed
    "One run in its own process; its last line of error is printed."
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    p = subprocess.run([sys.executable, __file__, '--run', json.dumps(what)], cwd=project_root(), capture_output=True, text=True, env=env)
    short = {k: v for k, v in what.items() if k not in ('dataset', 'source', 'planted_seed', 'out_dir')}
    print(short, 'done' if p.returncode == 0 else f'FAILED: {(p.stderr.strip() or "killed").splitlines()[-1][:300]}', flush=True)
    return json.loads(p.stdout.strip().splitlines()[-1]) if p.returncode == 0 else None

def best(dataset, source) -> dict: # model -> the settings of its best trial; nothing where none was made
    "What tuning chose."
    if not (file := tuned_file(dataset, source)).exists(): return {}
    table = pl.read_csv(file).sort('valid NDCG@10', descending=True, maintain_order=True)
    rows = {m: table.filter(model=m).row(0, named=True) for m in table['model'].unique(maintain_order=True)}
    return {m: {k: r[k] for k in ('lr', 'dropout', 'tau') if r[k] is not None} for m, r in rows.items()}

def tune(dataset, source, out_dir, models=('sasrec', 'duaf_mat')):
    "All trials; the table is written when it is complete."
    from mmrec_wb.core.record import load_run
    rows = []
    for trial in (t for t in trials(dataset) if t['model'] in models):
        done = run(dataset=dataset, source=source, planted_seed=0, out_dir=out_dir, seed=0, **trial)
        if done is None: continue
        valid = load_run(project_root()/out_dir/done['run']).frame('metrics').filter(split='valid', name='NDCG@10/model')['value'].item()
        rows.append(dict(dataset=title(dataset, source), seed=0, **{k: trial.get(k) for k in ('model', 'lr', 'dropout', 'tau')}, **{'valid NDCG@10': valid},
                         **{k: v for k, v in done.items() if k not in ('pictures', 'wall_seconds', 'peak_memory_mb')}))
        print(f'   valid NDCG@10 {valid:.4f} at epoch {done["best_epoch"]} of {done["epochs_run"]}, {done["cpu_seconds"]:.0f} CPU s', flush=True)
    if len(rows) < (n := len(trials(dataset))): print(f'{len(rows)} of {n} trials are done; no table is written'); return
    table = pl.DataFrame(rows, infer_schema_length=None)
    atomic_write(tuned_file(dataset, source), lambda tmp: table.write_csv(tmp, float_precision=5)); print(best(dataset, source))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--dataset', default='toys1k'); a.add_argument('--source', default='raw', choices=['raw', 'planted'])
    a.add_argument('--out-dir', default='runs/recommenders'); a.add_argument('--run', help=argparse.SUPPRESS)
    a.add_argument('--models', nargs='+', default=['sasrec', 'duaf_mat'])
    args = a.parse_args()
    if args.run: print(json.dumps(run_here(**json.loads(args.run))))
    else: tune(args.dataset, args.source, args.out_dir, args.models)
