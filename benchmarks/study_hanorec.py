r"""SFT, DPO and HaNoRec (at the default hardness temperature and at the authors' 1.0) with the tiny backbone over seeds, through papermill;
tables go to results/.

    python benchmarks/study_hanorec.py                                   # planted, all users, seeds 0 1 2
    python benchmarks/study_hanorec.py -p planted_seed=1 --out-dir runs/study-g1 --name hanorec_toys_planted_g1     # another generator seed
    python benchmarks/study_hanorec.py --dataset ml-100k --source raw --data-dir "$MMREC_DATA" --max-users 300 -p epochs=5 --arms sft dpo hanorec \
        --out-dir runs/study-ml --name hanorec_ml-100k

The settings of the second stage are those that benchmarks/tune_hanorec.py chose on valid questions of the planted shop (generator seed 0).
A stopped study goes on where it stopped: finished runs are reloaded. One study, one out_dir: runs are told apart by loss and tuned settings, not by other -p.
All arms of one seed share their SFT run. `_runs` has a row a run, `_summary` mean and sd over seeds, `_tests` the paired tests against SFT and against DPO.
"""
import argparse, json, os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import polars as pl
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import load_run, runs_table
from mmrec_wb.training.hanorec import DEFAULTS
from mmrec_wb.training.significance import compare
from tune_hanorec import best

TUNED = best()
ARMS = dict(sft=dict(loss='sft'), dpo=dict(loss='dpo', **TUNED['dpo']), hanorec=dict(loss='hanorec', **TUNED['hanorec']),
            **{'hanorec T=1': dict(loss='hanorec', hard_temp=1., **TUNED['hanorec'])})

def notebook(args, arm, seed):
    "Run train_hanorec once."
    out = project_root()/args.out_dir/f'study-{args.dataset}-{arm.replace(" ", "-")}-s{seed}.ipynb'
    given = dict(dataset=args.dataset, source=args.source, out_dir=args.out_dir, seed=seed, max_users=args.max_users, **ARMS[arm],
                 **dict(p.split('=', 1) for p in args.p), **(dict(data_dir=args.data_dir) if args.data_dir else {}))
    cmd = [Path(sys.executable).parent/'papermill', 'nbs/train_hanorec.ipynb', out, '--inject-paths', '--no-progress-bar',
           *[a for k, v in given.items() for a in ('-p', k, v)]]
    p = subprocess.run(list(map(str, cmd)), cwd=project_root(), capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    print(f'{arm} seed {seed}:', 'done' if p.returncode == 0 else p.stderr.strip().splitlines()[-1], flush=True)

def one_seed(args, seed):
    for arm in args.arms: notebook(args, arm, seed)

def arm_of(run):
    "Which arm a row of `runs_table` belongs to; None if to none."
    params = json.loads(run['params'] or '{}')
    if run['method'] == 'sft': return 'sft'
    for arm, wanted in ARMS.items():
        wanted = dict(hard_temp=DEFAULTS['hard_temp']) | wanted if wanted['loss'] == 'hanorec' else wanted
        if arm != 'sft' and all(params.get(k) == v for k, v in wanted.items()): return arm

def collect(args):
    "One row a finished run of this study."
    table = runs_table(args.out_dir).filter(status='finished', dataset=args.dataset + (' (planted)' if args.source == 'planted' else ''))
    table = table.with_columns(arm=pl.Series([arm_of(r) for r in table.to_dicts()], dtype=pl.String))
    table = table.filter(pl.col('arm').is_in(args.arms), pl.col('seed').is_in(args.seeds))
    infos = [load_run(project_root()/args.out_dir/r).info for r in table['run']]
    generator = pl.Series([i['planted_seed'] for i in infos], dtype=pl.Int64)
    table = table.with_columns(max_users=pl.Series([i['max_users'] for i in infos]), generator=generator).filter(max_users=args.max_users)
    users = [load_run(project_root()/args.out_dir/r).frame('ranks')['user'].n_unique() for r in table['run']]
    name = pl.when(pl.col('generator').is_null()).then('dataset').otherwise(pl.format('{} (planted, generator seed {})', pl.lit(args.dataset), 'generator'))
    numbers = [c for c in table.columns if '/' in c and table[c].null_count() < table.height]
    order = pl.col('arm').replace_strict({a: i for i, a in enumerate(ARMS)}, return_dtype=pl.Int64)
    table = table.with_columns(dataset=name, users=pl.Series(users)).sort(order, 'seed')
    return table.select('dataset', 'users', 'arm', 'seed', *numbers, 'wall_seconds', 'cpu_seconds', 'commit', 'params', 'run')

def tests(args, table):
    "Paired tests of the later arms against SFT and against DPO."
    arms = [a for a in ARMS if a in args.arms]
    folder = project_root()/args.out_dir
    frames = {arm: [load_run(folder/r).frame('ranks') for r in table.filter(arm=arm).sort('seed')['run']] for arm in arms}
    later = {base: {a: frames[a] for a in arms[arms.index(base):]} for base in ('sft', 'dpo') if base in arms[:-1]}
    parts = [compare(those, base, 'auc').with_columns(baseline=pl.lit(base)) for base, those in later.items()]
    return pl.concat(parts).with_columns(dataset=pl.lit(table['dataset'][0])) if parts else None

def readme_row(
    summary: pl.DataFrame # of results/*_summary.csv
) -> str:
    "results/README.md's line for a study: AUC, mean ± sd over seeds."
    m = {r['arm']: r for r in summary.to_dicts()}
    any_ = next(iter(m.values()))
    def auc(r, who):
        if r is None or r.get(f'auc/{who}') is None: return '–'
        return f"{r[f'auc/{who}']:.3f}" + (f" ± {r[f'auc/{who} sd']:.3f}" if r[f'auc/{who} sd'] is not None and who == 'model' else '')
    cells = [any_['dataset'], f"{any_['users']:,}", str(any_['seeds']), *[auc(m.get(k), 'model') for k in ARMS],
             *[auc(any_, k) for k in ('popularity', 'oracle')]]
    return '| ' + ' | '.join(cells) + ' |'

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--dataset', default='toys'); a.add_argument('--source', default='planted')
    a.add_argument('--data-dir'); a.add_argument('--max-users', type=int, default=0)
    a.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2]); a.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS))
    a.add_argument('--out-dir', default='runs/study'); a.add_argument('--workers', type=int, default=2)
    a.add_argument('-p', action='append', default=[], help='name=value of the notebook')
    a.add_argument('--name', help='of the files under results/')
    args = a.parse_args()
    (project_root()/args.out_dir).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.workers) as pool: list(pool.map(lambda s: one_seed(args, s), args.seeds))
    table = collect(args)
    numbers = [c for c in table.columns if '/' in c and not c.startswith('valid/')] + ['wall_seconds', 'cpu_seconds']
    summary = table.group_by('dataset', 'users', 'arm', maintain_order=True).agg(seeds=pl.len(),
        **{n: pl.col(n).mean() for n in numbers}, **{f'{n} sd': pl.col(n).std() for n in numbers})
    name = args.name or f'hanorec_{args.dataset}{"_planted" if args.source == "planted" else ""}'
    differences = tests(args, table)
    for part, frame in (('runs', table), ('summary', summary), ('tests', differences)):
        if frame is not None: atomic_write(project_root()/'results'/f'{name}_{part}.csv', lambda tmp: frame.write_csv(tmp, float_precision=6))
    with pl.Config(tbl_cols=-1, tbl_width_chars=200): print(summary.select('arm', 'seeds', 'auc/model', 'auc/model sd'), differences)
    print(readme_row(summary))
