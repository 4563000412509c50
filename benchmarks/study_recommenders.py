r"""SASRec, DuAF-MAT and its ablations over seeds; the tables go to results/recommenders_<data set>_{runs,summary,tests}.csv.

    MMREC_DATA=... python benchmarks/study_recommenders.py --dataset toys1k --source raw
    python benchmarks/study_recommenders.py --dataset toys --source planted --planted-seed 1           # tuned on generator seed 0
    MMREC_DATA=... python benchmarks/study_recommenders.py --dataset toys --source raw --arms sasrec   # SASRec on all of Toys
    MMREC_DATA=... python benchmarks/study_recommenders.py --dataset toys --source raw --arms sasrec duaf_mat --seeds 0 --name recommenders_toys_duaf
    MMREC_DATA=... python benchmarks/study_recommenders.py --dataset ml-100k --source raw --arms sasrec duaf_mat

Settings: what tune_recommenders.py chose on valid targets (results/tune_recommenders_<data set>.csv; where there is none, the defaults); an ablation runs
with DuAF-MAT's. The four ablations take one part out; `features only` takes out all four: id, words and picture weighed alike, nothing generated, no contrast.
`state before` is the whole model whose item i is weighed by the state before it (added when its weights had been seen to follow the planted attention better).
Every run is recorded, in a process of its own; a stopped study goes on where it stopped, a failed run does not stop the others, and tables
are written when all runs are there. An arm that would be DuAF-MAT itself on these data (no pictures: -MAT-MoE and -CSCL; no item without one: -MAT-MoE) is
not run; its row in `_summary` says why. `_runs` has a row a run, `_summary` mean and sd over seeds, popularity and (planted) the oracle beside; an owned item
has no chance with the oracle, so its figure is the same masked or not. `_tests`: users' NDCG@10 averaged over seeds, Wilcoxon signed-rank, Holm over the arms
of one baseline. Leave-one-out, all items ranked, test at the best valid epoch.
"""
import argparse, json
import polars as pl
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import load_run
from mmrec_wb.training.significance import compare
from tune_recommenders import best, run, title

ABLATIONS = {'-DuAF': 'duaf', '-MAT-MoE': 'mat_moe', '-CSCL': 'cscl', '-VSCL': 'vscl'}
ARMS = dict(sasrec=dict(model='sasrec'), duaf_mat=dict(model='duaf_mat'), **{k: dict(model='duaf_mat', ablation=v) for k, v in ABLATIONS.items()},
            **{'features only': dict(model='duaf_mat', fusion='mean', visual_fill='none', lambda_1=0., lambda_2=0.),
               'state before': dict(model='duaf_mat', s_at='before')})
METRICS = ('NDCG@10', 'NDCG@5', 'MRR@10', 'HR@10'); COLUMNS = [m + h for h in ('', ' masked') for m in METRICS]
def arm_of(word): return '-' + word[3:] if word.startswith('no-') else word # argparse takes a leading '-' for an option

def left_out(arm, pictures): # pictures: of `run`
    "Why an arm is not run on such data, or None."
    if pictures == 'none' and arm in ('-MAT-MoE', '-CSCL'): return 'not run: no pictures, so it is duaf_mat itself'
    if pictures == 'all' and arm == '-MAT-MoE': return 'not run: every item has a picture, so it is duaf_mat itself'

def values(folder, name): # -> who -> column -> value
    "Test metrics of a run: its own, popularity's, the oracle's."
    m = {r['name']: r['value'] for r in load_run(folder/name).frame('metrics').filter(split='test').to_dicts()}
    out = {who: {c: m[f'{c}/{who}'] for c in COLUMNS if f'{c}/{who}' in m} for who in ('model', 'popularity')}
    if 'NDCG@10/oracle' in m: out['oracle'] = {m_ + h: m[f'{m_}/oracle'] for h in ('', ' masked') for m_ in METRICS}
    return out

def study(args):
    "All runs; then a row each, and why some arms are left out."
    tuned, rows, why, pictures = best(args.dataset, args.source), [], {}, None
    for arm in args.arms:
        for seed in args.seeds:
            if pictures and (reason := left_out(arm, pictures)): why[arm] = reason; continue
            settings = ARMS[arm] | tuned.get(ARMS[arm]['model'], {})
            done = run(dataset=args.dataset, source=args.source, planted_seed=args.planted_seed, out_dir=args.out_dir, seed=seed, **settings)
            if done and arm == 'duaf_mat': pictures = done['pictures']
            if not done: continue
            scores = values(project_root()/args.out_dir, done['run'])['model']
            rows.append(dict(dataset=title(args.dataset, args.source, args.planted_seed), arm=arm, seed=seed, **scores, **done))
    return rows, why, len(rows) == sum(arm not in why for arm in args.arms)*len(args.seeds)

def summarised(table, why, folder):
    "Mean and sd over seeds, arms left out, what needs no training."
    s = table.group_by('dataset', 'arm', maintain_order=True).agg(seeds=pl.len(),
        **{c: pl.col(c).mean() for c in COLUMNS}, **{f'{c} sd': pl.col(c).std() for c in COLUMNS},
        **{c: pl.col(c).mean() for c in ('best_epoch', 'cpu_seconds')}, commit=pl.col('commit').first(), versions=pl.col('versions').first())
    dataset, beside = table['dataset'][0], values(folder, table['run'][0])
    more = [dict(dataset=dataset, arm=a, note=r) for a, r in why.items()] + [dict(dataset=dataset, arm=w, **v) for w, v in beside.items() if w != 'model']
    return pl.concat([s, pl.DataFrame(more, infer_schema_length=None)], how='diagonal_relaxed')

def tested(table, folder):
    "Every arm against SASRec, and DuAF-MAT's ablations against DuAF-MAT; history not masked, and masked."
    arms, parts = list(dict.fromkeys(table['arm'])), []
    frames = {a: [load_run(folder/r).frame('ranks') for r in table.filter(arm=a).sort('seed')['run']] for a in arms}
    for base in (b for b in ('sasrec', 'duaf_mat') if b in arms[:-1]):
        for masked in (False, True):
            ranks = {a: [f.select('user', rank='rank_masked' if masked else 'rank') for f in frames[a]] for a in arms[arms.index(base):]}
            said = {'dataset': table['dataset'][0], 'baseline': base, 'history masked': masked}
            parts.append(compare(ranks, base, 'NDCG@10').select(*(pl.lit(v).alias(k) for k, v in said.items()), pl.all()))
    return pl.concat(parts).with_columns(commit=pl.lit(table['commit'][0]), versions=pl.lit(table['versions'][0])) if parts else None

def readme_rows(
    summaries: list # frames of results/recommenders_*_summary.csv, of one data set
) -> list: # two lines
    "results/README.md's lines for a data set: NDCG@10, mean ± sd over seeds, history not masked and masked."
    rows = sorted((r for s in summaries for r in s.to_dicts()), key=lambda r: r['seeds'] or 0); m = {r['arm']: r for r in rows}   # most seeds last
    def cell(arm, column):
        r = m.get(arm)
        if r is None or r[column] is None: return '–'
        spread = r.get(f'{column} sd'); one = ' (1 seed)' if r['seeds'] == 1 else ''
        return f'{r[column]:.4f}' + (f' ± {spread:.4f}' if spread is not None else one)
    return ['| ' + ' | '.join([rows[0]['dataset'] + said, *(cell(a, f'NDCG@10{said and " masked"}') for a in (*ARMS, 'popularity', 'oracle'))]) + ' |'
            for said in ('', ', masked')]

def short(x, digits=4): return f'{x:.{digits}f}'.replace('0.', '.', 1)

def difference(tests, baseline, arm, masked): # of results/recommenders_*_tests.csv
    "What results/README.md says of a difference: .0045 (95% .0015 to .0077, p .03), p after Holm."
    r = tests.filter(baseline=baseline, arm=arm, **{'history masked': masked}).row(0, named=True); p = r['p_holm']
    how_sure = '< .001' if p < .001 else '1' if p > .995 else short(p, 3 if p < .01 else 2)
    return f"{short(r['difference'])} (95% {short(r['low'])} to {short(r['high'])}, p {how_sure})"

def difference_row(tests):
    "DuAF-MAT minus SASRec: results/README.md's line for a data set."
    one = " (1 seed)"*(tests['seeds'][0] == 1); both = (difference(tests, 'sasrec', 'duaf_mat', masked) for masked in (False, True))
    return '| ' + ' | '.join([tests['dataset'][0] + one, *both]) + ' |'

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--dataset', default='toys1k'); a.add_argument('--source', default='raw', choices=['raw', 'planted'])
    a.add_argument('--planted-seed', type=int, default=0, help='of the generator')
    a.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    a.add_argument('--arms', nargs='+', type=arm_of, default=list(ARMS), choices=list(ARMS), help='an ablation is written no-DuAF')
    a.add_argument('--out-dir', default='runs/recommenders'); a.add_argument('--name', help='of the files under results/')
    args = a.parse_args(); folder = project_root()/args.out_dir
    rows, why, complete = study(args); table = pl.DataFrame(rows, infer_schema_length=None)
    if not complete: raise SystemExit(f'{len(rows)} runs are done, others are not: no tables are written; the same command goes on')
    summary, differences = summarised(table, why, folder), tested(table, folder)
    name = args.name or f'recommenders_{args.dataset}{f"_planted_g{args.planted_seed}" if args.source == "planted" else ""}'
    for part, frame in (('runs', table.drop('pictures')), ('summary', summary), ('tests', differences)):
        if frame is not None: atomic_write(project_root()/'results'/f'{name}_{part}.csv', lambda tmp: frame.write_csv(tmp, float_precision=6))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200, float_precision=4):
        print(summary.select('arm', 'seeds', 'NDCG@10', 'NDCG@10 sd', 'NDCG@10 masked', 'NDCG@10 masked sd'))
        if differences is not None: print(differences.drop('dataset', 'commit', 'versions'))
