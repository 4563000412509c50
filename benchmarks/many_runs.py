r"""A study of many small real runs whose processes are killed at random, restarted until it is complete; and how long compare_runs takes over many records.

    python benchmarks/many_runs.py                      # 60 runs of train_baseline on planted toys, 2 workers; or: make bench-runs
    python benchmarks/many_runs.py --seeds 2 --every 8  # a short one (20 runs)

Killed with -9, at exponentially distributed times: a cell's process, its notebook's kernel, or the study itself. The end is asserted: every run is there and
finished, none is there twice, nothing else lies in the folder. The row goes to results/many_runs.csv.
"""
import argparse, random, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, polars as pl, psutil
from mmrec_wb.core.paths import atomic_write, project_root, resolve
from mmrec_wb.core.record import git_commit, open_run, runs_table
from mmrec_wb.training.comparison import choose, summarise, paired_tests
from mmrec_wb.viz.comparison import comparison_html

BIN = Path(sys.executable).parent
FIXED = dict(dataset='toys', source='planted', max_users=60, epochs=2, heads=1, layers=1, batch_size=256)
GRID = ['-g', 'lr', '0.001,0.003,0.01,0.03,0.1', '-g', 'd', '8,16', *[str(x) for k, v in FIXED.items() for x in ('-p', k, v)]]

def synthetic(folder, arms=20, seeds=3, users=2000, dataset='toys', method='rodpo', shift=.02):
    "arms x seeds records with random ranks, each arm a little better than the one before; by hand written, not trained."
    ideal = np.random.default_rng(0).normal(size=users)
    for a in range(arms):
        for s in range(seeds):
            z = ideal + np.random.default_rng([a, s]).normal(size=users)*.5 - shift*a
            frame = pl.DataFrame(dict(user=np.arange(users), target=1, rank=np.exp(3 + z).astype(int) + 1, rank_masked=np.exp(2.9 + z).astype(int) + 1))
            with open_run(method, dataset, s, dict(pool=a + 1, beta=.1, lr=1e-3), 'f00d', 'raw', folder, protocol='all items ranked') as run:
                gain = lambda c, k: float(np.where((r := frame[c].to_numpy()) <= k, 1/np.log2(r + 1), 0).mean())
                run.log(0, 'test', **{f'NDCG@{k}{m}/model': gain(f'rank{m and "_masked"}', k) for k in (5, 10) for m in ('', ' masked')})
                run.save('ranks', frame); run.finish()

def opened(folder, reference, draws=2000):
    "Seconds to read a folder of runs and to draw the tested table."
    start = time.perf_counter()
    runs, lines = choose(folder); summary = summarise(runs); tests, more = paired_tests(runs, reference, folder, draws=draws)
    comparison_html(summary, tests, lines + more)
    assert tests['p_holm'].is_finite().all() and not more, more
    return time.perf_counter() - start, runs.height

def victims(study):
    "Processes that may be killed: the study, its cells, their kernels."
    try: return [('study', study)] + [('kernel' if 'ipykernel' in ' '.join(p.cmdline()) else 'cell', p) for p in study.children(recursive=True)]
    except psutil.Error: return []

def killing(command, every, rng, most):
    "Run a study to its end (status 0), killing what it starts; kills by kind, starts, CPU seconds that were seen."
    kills, starts, cpu, due = dict(cell=0, kernel=0, study=0), 0, {}, time.time() + rng.expovariate(1/every)
    while True:
        starts += 1; assert starts < 60, 'the study does not come to an end'
        study = subprocess.Popen(command, cwd=project_root()); me = psutil.Process(study.pid)
        while study.poll() is None:
            time.sleep(.3)
            there = victims(me)
            for _, p in there:
                try: t = p.cpu_times(); cpu[p.pid, p.create_time()] = t.user + t.system
                except psutil.Error: pass
            if time.time() > due and sum(kills.values()) < most and len(there) > 1:
                kind = rng.choices(['cell', 'kernel', 'study'], [4, 4, 1])[0]; those = [p for k, p in there if k == kind]
                if those: rng.choice(those).send_signal(signal.SIGKILL); kills[kind] += 1; due = time.time() + rng.expovariate(1/every)
        if study.returncode == 0: return kills, starts, sum(cpu.values())
        assert study.returncode in (1, -signal.SIGKILL), f'the study ended with {study.returncode}'

def checked(folder, n):
    "Every run is there once."
    table = runs_table(folder)
    assert table.height == n and (table['status'] == 'finished').all(), table.select('run', 'status')
    assert table.select('params', 'seed').is_duplicated().sum() == 0 and table['NDCG@10/model'].is_finite().all()
    odd = sorted(p.name for p in folder.iterdir() if p.name not in {*table['run'], 'notebooks'})
    assert not odd, f'{folder} also holds {odd}'
    assert len(list((folder/'notebooks').glob('*.ipynb'))) == len(list((folder/'notebooks').glob('train_*.json'))) == n
    return table

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--seeds', type=int, default=6, help='10 runs each'); a.add_argument('--workers', type=int, default=2)
    a.add_argument('--backend', default='processes'); a.add_argument('--most', type=int, default=40, help='kills')
    a.add_argument('--every', type=float, default=20, help='seconds between kills, on average')
    a.add_argument('--out-dir', default='runs/many'); a.add_argument('--seed', type=int, default=0, help='of the kills')
    args = a.parse_args(); folder = resolve(args.out_dir)
    if folder.exists():
        if not (folder/'notebooks'/'study.json').exists(): raise SystemExit(f'{folder} is no study: move it, or give another --out-dir')
        shutil.rmtree(folder)
    command = [str(BIN/'mmrec-wb'), 'study', '--notebook', 'nbs/train_baseline.ipynb', *GRID, '--seeds', *map(str, range(args.seeds)),
        '--workers', str(args.workers), '--backend', args.backend, '--out-dir', str(folder)]
    start = time.time(); kills, starts, cpu = killing(command, args.every, random.Random(args.seed), args.most); wall = time.time() - start
    table = checked(folder, 10*args.seeds)
    with tempfile.TemporaryDirectory() as d:
        synthetic(d, users=19_412); seconds, n = opened(d, 'rodpo pool=1')
    row = dict(runs=table.height, workers=args.workers, backend=args.backend, starts=starts, **{f'{k}_kills': v for k, v in kills.items()},
        wall_seconds=round(wall, 1), cpu_seconds=round(cpu, 1), cpu_seconds_in_runs=round(table['cpu_seconds'].sum(), 1),
        records_opened=n, open_seconds=round(seconds, 2), commit=git_commit())
    atomic_write(project_root()/'results'/'many_runs.csv', pl.DataFrame([row]).write_csv)
    print('\n'.join(f'{k}: {v}' for k, v in row.items()))
