r"""What a preference step costs beside a step of the base's own cross-entropy: SASRec on all of Toys, one thread, the arms take turns batch by batch.

    MMREC_DATA=... python benchmarks/rodpo_step.py           # results/rodpo_step.csv; two minutes

A step: forward, loss, backward, Adam, 2,048 targets. `ratio`: median over the turns of the arm's CPU seconds over the cross-entropy's on the same batch;
`low`, `high`: its quartiles.
"""
import argparse, statistics, time
import polars as pl, torch
from accelerate import Accelerator
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import git_commit, versions
from mmrec_wb.data import load_dataset
from mmrec_wb.data.batches import train_batches
from mmrec_wb.models.sasrec import SASRec
from mmrec_wb.training.fit import optimisers, step
from mmrec_wb.training.rodpo import Preferring, settled

ARMS = dict(cross_entropy=dict(loss='none'), topk=dict(), topk_8_negatives=dict(negatives=8, loss='sdpo'), hard=dict(strategy='hard'),
            uniform=dict(strategy='uniform'), topk_pool_100=dict(pool=100), topk_softmax=dict(strategy='topk_softmax'), topk_epoch=dict(pool_refresh='epoch'))

def main(args):
    torch.set_num_threads(1); data = load_dataset(args.dataset, source='raw'); accelerator = Accelerator(cpu=True); models = {}
    for name, more in ARMS.items():
        torch.manual_seed(0); m = Preferring(SASRec(data), data, settled(more)); models[name] = m.train(), optimisers(m, 1e-4)
        if m.s['pool_refresh'] == 'epoch': m.keep_pools()
    batches, took = train_batches(data, 50, 2048, 0, 1), {name: [] for name in ARMS}
    for turn in range(args.turns + 2):
        for name, (m, by) in models.items():
            start = time.process_time(); step(accelerator, m, batches[turn % len(batches)], by)
            if turn > 1: took[name].append(time.process_time() - start)
    rows = []
    for name, seconds in took.items():
        ratio = sorted(a/b for a, b in zip(seconds, took['cross_entropy'])); n = len(ratio)
        rows.append(dict(dataset=data.title, arm=name, turns=n, cpu_seconds=statistics.median(seconds), ratio=ratio[n//2], low=ratio[n//4], high=ratio[3*n//4],
                         torch=versions()['torch'], commit=git_commit()))
    table = pl.DataFrame(rows); print(table)
    if args.write: atomic_write(project_root()/'results'/'rodpo_step.csv', lambda tmp: table.write_csv(tmp, float_precision=4))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--dataset', default='toys'); a.add_argument('--turns', type=int, default=40)
    a.add_argument('--write', action=argparse.BooleanOptionalAction, default=True)
    main(a.parse_args())
