r"""Which rejected item? SASRec goes on with DPO under each sampling strategy, and with its own loss alone; tables go to results/rodpo_<data set>_*.csv.

    MMREC_DATA=... python benchmarks/study_rodpo.py --dataset toys1k
    MMREC_DATA=... python benchmarks/study_rodpo.py --dataset ml-100k --tuned-on toys1k
    python benchmarks/study_rodpo.py --dataset toys --source planted --planted-seed 1                           # tuned on generator seed 0
    MMREC_DATA=... python benchmarks/study_rodpo.py --dataset toys --tuned-on toys1k --arms control uniform hard topk_20     # all of Toys
    MMREC_DATA=... python benchmarks/study_rodpo.py --dataset toys --tuned-on toys1k --arms topk_5 topk_10 topk_50 topk_100 --seeds 0 --name rodpo_toys_pools

`_tune`: six trials for each strategy, one seed, judged by NDCG@10 on the VALID targets (no test number is read): learning rates .0001 and .001, beta .1, .5 and
1; for the control, which has no beta, six learning rates. All pool sizes take what was chosen for pool 20. `_runs`: a row a run, test at the best valid epoch.
`_summary`: mean and sd over seeds, the base before stage 2 beside. `_tests`: users' NDCG@5 (the paper's metric) averaged over seeds, Wilcoxon signed-rank, Holm
over the arms, against the control, and against pool 20. `_negatives`: what each strategy drew on 2,000 training targets that stay the same: rank, false
negatives (`later`: taken later by the same user, up to the valid target; `planted_false`: the generator's list), and the share of the loss's gradient that
pushes these down; before stage 2 (`epoch` 0: the same scores for all strategies) and over all epochs after it.
Base: SASRec with the settings that tune_recommenders.py chose; stage 2: at most 20 epochs, patience 5, for all. A stopped study goes on where it stopped.
"""
import argparse, json
from itertools import product
import polars as pl
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import load_run
from mmrec_wb.data import load_dataset
from mmrec_wb.training.rodpo import train_rodpo
from mmrec_wb.training.significance import compare
from tune_recommenders import best, title

POOLS = (5, 10, 20, 50, 100)
ARMS = dict(control=dict(loss='none'), **{s: dict(strategy=s) for s in ('uniform', 'popularity', 'hard')},
            **{f'topk_{n}': dict(strategy='topk', pool=n) for n in POOLS}, topk_softmax=dict(strategy='topk_softmax', pool=20))
COLUMNS = [m + h for h in ('', ' masked') for m in ('NDCG@5', 'NDCG@10', 'MRR@5', 'HR@5')]
ROW = ('base', 'control', 'uniform', 'popularity', 'hard', 'topk_20', 'topk_softmax') # columns of the tables in results/README.md
family = lambda arm: 'topk_20' if arm.startswith('topk_') and arm != 'topk_softmax' else arm

def trials(arm):
    "Six settings, named before any was run."
    if arm == 'control': return [dict(lr=lr) for lr in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)]
    return [dict(lr=lr, beta=b) for lr, b in product((1e-4, 1e-3), (.1, .5, 1.))]

class Study:
    "The runs of one data set."
    def __init__(self, args):
        self.args, self.what = args, dict(out_dir=args.out_dir, device='cpu')
        self.base = best(args.dataset, args.source).get('sasrec', {}); self.data = {}
        self.name = args.name or f'rodpo_{args.dataset}{f"_planted_g{args.planted_seed}" if args.source == "planted" else ""}'
    def load(self, planted_seed):
        if planted_seed not in self.data:
            more = dict(planted_seed=planted_seed) if self.args.source == 'planted' else {}
            self.data[planted_seed] = load_dataset(self.args.dataset, source=self.args.source, **more)
        return self.data[planted_seed]
    def run(self, planted_seed, seed, **settings):
        "One recorded run, or None with its line of error."
        base = dict(base_lr=self.base.get('lr', 1e-3), dropout=self.base.get('dropout', .5))
        try: return train_rodpo(self.load(planted_seed), 'sasrec', seed=seed, planted_seed=planted_seed, **base, **settings, **self.what)
        except WorkbenchError as e: print(f'FAILED {settings}, seed {seed}: {e}', flush=True)

def numbers(run, split):
    return {r['name']: r['value'] for r in run.frame('metrics').filter(split=split).to_dicts()}

def origin(run):
    v = run.info['versions']
    return dict(run=run.path.name, commit=run.info['commit'], versions=' '.join(f'{n} {v[n]}' for n in ('torch', 'polars', 'mmrec_wb')))

def tune(study, arms):
    "arm -> settings; the table is kept, and only what it lacks is tried."
    mine = f'{study.args.dataset}{"_planted" if study.args.source == "planted" else ""}'
    file, rows = project_root()/'results'/f'rodpo_{study.args.tuned_on or mine}_tune.csv', []
    if study.args.tuned_on and not file.exists(): raise SystemExit(f'{file.name} is not there: run the study of {study.args.tuned_on} first')
    if file.exists(): rows = pl.read_csv(file).to_dicts()
    for arm in dict.fromkeys(map(family, arms)):
        if any(r['arm'] == arm for r in rows): continue
        found = [(t, study.run(0, 0, **ARMS[arm], **t)) for t in trials(arm)]
        if not all(r for _, r in found): raise SystemExit(f'{arm}: not all trials are done; the same command goes on')
        for t, r in found:
            valid = {'valid NDCG@10': numbers(r, 'valid')['NDCG@10/model']}
            rows.append(dict(dataset=title(study.args.dataset, study.args.source, 0), seed=0, arm=arm, lr=t['lr'], beta=t.get('beta'), **valid,
                best_epoch=r.info['best_epoch'], epochs_run=r.info['epochs_run'], cpu_seconds=r.info['cpu_seconds'], **origin(r)))
            print(f'tune {arm} {t}: valid NDCG@10 {rows[-1]["valid NDCG@10"]:.4f} at epoch {r.info["best_epoch"]} of {r.info["epochs_run"]}', flush=True)
        table = pl.DataFrame(rows, infer_schema_length=None); atomic_write(file, lambda tmp: table.write_csv(tmp, float_precision=5))
    table = pl.DataFrame(rows, infer_schema_length=None).sort('valid NDCG@10', descending=True, maintain_order=True)
    top = {a: table.filter(arm=a).row(0, named=True) for a in table['arm'].unique()}
    return {a: {k: r[k] for k in ('lr', 'beta') if r[k] is not None} for a, r in top.items()}

def readme_row(summary): # one data set
    "Its row in results/README.md: NDCG@5, mean ± sd over the seeds."
    m = {r['arm']: r for r in summary.to_dicts()}; said = lambda r: f"{r['NDCG@5']:.4f}" + (f" ± {r['NDCG@5 sd']:.4f}" if r['NDCG@5 sd'] is not None else '')
    return f"| {summary['dataset'][0]} | {max(r['seeds'] for r in m.values())} | " + ' | '.join(said(m[a]) if a in m else '–' for a in ROW) + ' |'

def negatives_row(negatives): # one data set
    "Its row in the table of false negatives of results/README.md: means over the seeds, before stage 2."
    kinds = [k for k in ('later', 'planted_false') if k in negatives.columns]; f = negatives.filter(when='before').group_by('arm').agg(pl.col(kinds).mean())
    m = {r['arm']: r for r in f.to_dicts()}
    said = lambda r: f"{r['later']:.3f}" + (f", {r['planted_false']:.3f}" if r.get('planted_false') is not None else '')
    return f"| {negatives['dataset'][0]} | " + ' | '.join(said(m[a]) if a in m else '–' for a in ROW[2:]) + ' |'

def drawn(run, arm, seed):
    "What was drawn on the probe, before stage 2 and in it."
    f = run.frame('explain/negatives').with_columns(when=pl.when(pl.col('epoch') == 0).then(pl.lit('before')).otherwise(pl.lit('in stage 2')))
    of = lambda c: [pl.col(c).mean(), (pl.col('mass').filter(pl.col(c)).sum()/pl.col('mass').sum()).alias(f'push on {c}')] if f[c].null_count() == 0 else []
    ranks = pl.col('rank').median().alias('rank (median)')
    g = f.group_by('when', maintain_order=True).agg(ranks, pl.col('gap').mean(), *of('later'), *of('planted_false'), draws=pl.len())
    return [dict(arm=arm, seed=seed, **r) for r in g.to_dicts()]

def main(args):
    study = Study(args); tuned, rows, negatives, frames = tune(study, args.arms), [], [], {}
    for seed in args.seeds:
        for arm in args.arms:
            r = study.run(args.planted_seed, seed, **ARMS[arm], **tuned[family(arm)])
            if not r: raise SystemExit(f'{arm}, seed {seed} failed: no tables; the same command goes on')
            values = numbers(r, 'test'); frames.setdefault(arm, []).append(ranks := r.frame('ranks'))
            if arm == args.arms[0]: frames.setdefault('base', []).append(ranks.select('user', rank='rank_base', rank_masked='rank_base_masked'))
            found = {c: values[f'{c}/model'] for c in COLUMNS} | {f'{c} base': values[f'{c}/base'] for c in COLUMNS}
            about = {k: r.info[k] for k in ('best_epoch', 'epochs_run', 'cpu_seconds')} | origin(r) | dict(params=json.dumps(r.params))
            rows.append(dict(arm=arm, pool=r.params['pool'], seed=seed, **found, **about))
            if arm != 'control': negatives += drawn(r, arm, seed)
            print('{arm} seed {seed}: NDCG@5 {NDCG@5:.4f} (base {NDCG@5 base:.4f}), epoch {best_epoch} of {epochs_run}'.format(**rows[-1]), flush=True)
    head = pl.lit(title(args.dataset, args.source, args.planted_seed)).alias('dataset')
    table = pl.DataFrame(rows, infer_schema_length=None).select(head, pl.all())
    means = {c: pl.col(c).mean() for c in COLUMNS} | {f'{c} sd': pl.col(c).std() for c in COLUMNS}
    summed = lambda t: t.group_by('dataset', 'arm', maintain_order=True).agg(seeds=pl.len(), **means)
    one = table.filter(arm=args.arms[0]).select('dataset', pl.lit('base').alias('arm'), *(pl.col(f'{c} base').alias(c) for c in COLUMNS))
    summary = pl.concat([summed(one), summed(table)])
    tests = [compare({a: [f.select('user', rank=column) for f in frames[a]] for a in [b, *(x for x in frames if x != b)]}, b, 'NDCG@5')
             .select(head, pl.lit(b).alias('baseline'), pl.lit(column == 'rank_masked').alias('history masked'), pl.all())
             for b in ('control', 'topk_20') if b in frames for column in ('rank', 'rank_masked')]
    parts = dict(runs=table, summary=summary, tests=pl.concat(tests) if tests else None,
                 negatives=pl.DataFrame(negatives, infer_schema_length=None).select(head, pl.all()) if negatives else None)
    for part, frame in parts.items():
        if frame is not None: atomic_write(project_root()/'results'/f'{study.name}_{part}.csv', lambda tmp: frame.write_csv(tmp, float_precision=6))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=220, float_precision=4):
        print(summary.select('arm', 'seeds', 'NDCG@5', 'NDCG@5 sd', 'NDCG@10', 'NDCG@5 masked')); print(parts['tests']); print(parts['negatives'])

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--dataset', default='toys1k'); a.add_argument('--source', default='raw', choices=['raw', 'planted'])
    a.add_argument('--planted-seed', type=int, default=0, help='of the generator')
    a.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS)); a.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    a.add_argument('--tuned-on', help='another data set whose _tune table is taken: no trials')
    a.add_argument('--out-dir', default='runs/rodpo'); a.add_argument('--name', help='of the files under results/')
    main(a.parse_args())
