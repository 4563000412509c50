"""SFT, DPO and HaNoRec with the tiny backbone over seeds, through papermill; the table goes to results/.

    python benchmarks/study_hanorec.py                                   # planted, all users, seeds 0 1 2
    python benchmarks/study_hanorec.py -p planted_seed=1 --out-dir runs/study-g1 --name hanorec_toys_planted_g1     # another generator seed
    python benchmarks/study_hanorec.py --dataset ml-100k --data-dir "$MMREC_DATA" --max-users 150 --seeds 0

A stopped study goes on where it stopped: finished runs are reloaded. Losses of one seed share their SFT run.
"""
import argparse, os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import polars as pl
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import load_run

def notebook(args, loss, seed):
    "Run train_hanorec once; its log."
    out = project_root()/args.out_dir/f'study-{args.dataset}-{loss}-s{seed}.ipynb'
    more = ['-p', 'max_users', str(args.max_users)] + (['-p', 'data_dir', args.data_dir] if args.data_dir else [])
    more += [x for p in args.p for x in ('-p', *p.split('=', 1))]
    cmd = [Path(sys.executable).parent/'papermill', 'nbs/train_hanorec.ipynb', out, '--inject-paths', '--no-progress-bar', '-p', 'dataset', args.dataset, '-p', 'source', args.source, '-p', 'out_dir', args.out_dir, '-p', 'loss', loss, '-p', 'seed', str(seed), *more]
    p = subprocess.run(list(map(str, cmd)), cwd=project_root(), capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    print(f'{loss} seed {seed}:', 'done' if p.returncode == 0 else p.stderr.strip().splitlines()[-1], flush=True)

def one_seed(args, seed):
    for loss in args.losses: notebook(args, loss, seed)

def collect(args):
    "One row a run."
    rows = []
    for folder in sorted((project_root()/args.out_dir).glob('*-s*-*/run.json')):
        try: run = load_run(folder.parent)
        except WorkbenchError as e: print(e); continue
        i = run.info
        if not run.finished or i['dataset'] != args.dataset or i['max_users'] != args.max_users or i['method'] not in args.losses or i['seed'] not in args.seeds: continue
        m = dict(run.frame('metrics').filter(split='test').select('name', 'value').iter_rows())
        rows.append(dict(dataset=i['dataset'] + (f" (planted, generator seed {i['planted_seed']})" if i['source'] == 'planted' else ''), users=run.frame('ranks')['user'].n_unique(), method=i['method'], seed=i['seed'], **m, wall_seconds=i['wall_seconds'], cpu_seconds=i['cpu_seconds'], commit=i['commit'], run=run.path.name))
    return pl.DataFrame(rows).sort('method', 'seed')

def readme_row(
    summary: pl.DataFrame # of results/*_summary.csv
) -> str:
    "The README's line for a study: AUC, mean ± sd over seeds."
    m = {r['method']: r for r in summary.to_dicts()}
    any_ = next(iter(m.values()))
    auc = lambda r, who: '–' if r is None or r.get(f'auc/{who}') is None else f"{r[f'auc/{who}']:.3f}" + (f" ± {r[f'auc/{who} sd']:.3f}" if r[f'auc/{who} sd'] is not None else '')
    cells = [any_['dataset'], f"{any_['users']:,}", str(any_['seeds']), *[auc(m.get(k), 'model') for k in ('sft', 'dpo', 'hanorec')], *[auc(any_, k) for k in ('popularity', 'oracle')]]
    return '| ' + ' | '.join(cells) + ' |'

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--dataset', default='toys'); a.add_argument('--source', default='planted'); a.add_argument('--data-dir'); a.add_argument('--max-users', type=int, default=0)
    a.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2]); a.add_argument('--losses', nargs='+', default=['sft', 'dpo', 'hanorec'])
    a.add_argument('--out-dir', default='runs/study'); a.add_argument('--workers', type=int, default=2); a.add_argument('-p', action='append', default=[], help='name=value of the notebook')
    a.add_argument('--name', help='of the files under results/')
    args = a.parse_args()
    (project_root()/args.out_dir).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.workers) as pool: list(pool.map(lambda s: one_seed(args, s), args.seeds))
    table, numbers = collect(args), ['auc/model', 'auc_hard/model', 'valid_ratio/model', 'auc/popularity', 'auc/random', 'auc/oracle', 'wall_seconds']
    numbers = [n for n in numbers if n in table.columns]
    summary = table.group_by('dataset', 'users', 'method').agg(seeds=pl.len(), **{n: pl.col(n).mean() for n in numbers}, **{f'{n} sd': pl.col(n).std() for n in numbers}).sort('method')
    name = args.name or f'hanorec_{args.dataset}{"_planted" if args.source == "planted" else ""}'
    for part, frame in (('runs', table), ('summary', summary)): atomic_write(project_root()/'results'/f'{name}_{part}.csv', lambda tmp: frame.write_csv(tmp, float_precision=4))
    with pl.Config(tbl_cols=-1, tbl_width_chars=200): print(summary)
    print(readme_row(summary))
