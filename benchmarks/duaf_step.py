r"""A whole training step of DuAF-MAT (critic, generator, recommender) beside one of SASRec on the same batches, one thread, CPU seconds.

    MMREC_DATA=... python benchmarks/duaf_step.py         # results/duaf_step.csv; five minutes

Two data sets: planted toys (words and pictures: all parts are on) and the real Toys (words only: no players, no CSCL, virtual sequences of one modality). All
settings at their defaults, 2,048 targets a batch. Each arm has a process of its own, and they take turns step by step on the same batches, so that a busy
moment meets all alike. Medians over `--steps` steps after three that do not count; `times_sasrec` is the median of the ratios step by step. `-VSCL`, `-CSCL`,
`-MAT-MoE` and `-DuAF` say what a part costs.
"""
import argparse, json, os, resource, statistics, subprocess, sys, time

ARMS = dict(sasrec=('sasrec', 'none'), duaf_mat=('duaf_mat', 'none'), **{'-VSCL': ('duaf_mat', 'vscl'), '-CSCL': ('duaf_mat', 'cscl'),
            '-MAT-MoE': ('duaf_mat', 'mat_moe'), '-DuAF': ('duaf_mat', 'duaf')})
NOT_THERE = dict(raw=('-CSCL', '-MAT-MoE'), planted=())        # without pictures they are DuAF-MAT itself

def child(source, model, ablation, seed):
    "One step, and a line of JSON, for every line that is read."
    import torch
    from accelerate import Accelerator
    from mmrec_wb.core.seeds import set_seed
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.batches import train_batches
    from mmrec_wb.data.features import add_features
    from mmrec_wb.models import get_model
    from mmrec_wb.training.fit import optimisers, step
    torch.set_num_threads(1); data = load_dataset('toys', source=source); set_seed(seed)
    if model != 'sasrec': add_features(data, progress=False)
    net = get_model(model)(data, **({} if model == 'sasrec' else dict(ablation=ablation))).train(); by, a = optimisers(net, 1e-3), Accelerator(cpu=True)
    batches = list(train_batches(data, net.max_len, 2048, seed, 0))
    for i, _ in enumerate(sys.stdin):
        b = batches[i % len(batches)]; start = time.process_time(), time.perf_counter(); step(a, net, b, by)
        took = dict(cpu_s=time.process_time() - start[0], wall_s=time.perf_counter() - start[1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
        print(json.dumps(took | dict(targets=int((b.targets > 0).sum()), peak_mb=peak, players=len(by) - 1, items=data.n_items)), flush=True)

def side_by_side(source, steps, seed=0) -> dict: # arm -> what each step took
    "All arms, a step each in turn."
    env, found = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1'), {}
    start = lambda arm: subprocess.Popen([sys.executable, __file__, '--child', source, *ARMS[arm], str(seed)], text=True, env=env,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    def ask(p):
        p.stdin.write('go\n'); p.stdin.flush()
        for line in p.stdout:                                     # what else is said is not for us
            if line.startswith('{'): return json.loads(line)
        sys.exit(f'a process ended: {" ".join(p.args[1:])}')
    processes = {arm: start(arm) for arm in ARMS if arm not in NOT_THERE[source]}
    try:
        for i in range(-3, steps):
            for arm, p in processes.items(): said = ask(p); found.setdefault(arm, []).extend([said]*(i >= 0))
    finally:
        for p in processes.values(): p.kill(); p.wait()
    return found

def main(args):
    import polars as pl
    from mmrec_wb.core.paths import atomic_write, project_root
    from mmrec_wb.core.record import git_commit, versions
    rows = []
    for source in args.sources:
        found = side_by_side(source, args.steps)
        for arm, all_steps in found.items():
            middle = {k: statistics.median(s[k] for s in all_steps) for k in all_steps[0]}
            ratio = statistics.median(s['cpu_s']/t['cpu_s'] for s, t in zip(all_steps, found['sasrec']))
            rows.append(dict(dataset='toys' + ' (planted)'*(source == 'planted'), arm=arm, steps=args.steps, **middle, times_sasrec=ratio,
                             threads=1, commit=git_commit(), versions=f'torch {versions()["torch"]}'))
    table = pl.DataFrame(rows); atomic_write(project_root()/'results'/'duaf_step.csv', lambda tmp: table.write_csv(tmp, float_precision=4))
    with pl.Config(tbl_rows=-1, tbl_cols=-1): print(table.select('dataset', 'arm', 'cpu_s', 'wall_s', 'times_sasrec', 'peak_mb'))

if __name__ == '__main__':
    if sys.argv[1:2] == ['--child']: child(*sys.argv[2:5], int(sys.argv[5]))
    else:
        a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); a.add_argument('--steps', type=int, default=30)
        a.add_argument('--sources', nargs='+', default=['planted', 'raw'], choices=['planted', 'raw']); main(a.parse_args())
