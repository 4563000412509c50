r"""Did DuAF-MAT find what was planted? Attention and withheld pictures, from recorded runs on the planted shop, generator seed 1 (tuned on seed 0).

    python benchmarks/study_recommenders.py --dataset toys --source planted --planted-seed 1      # first: duaf_mat, -CSCL, -VSCL over seeds
    python benchmarks/truth_duaf_mat.py         # results/truth_duaf_mat_attention.csv, results/truth_duaf_mat_pictures.csv

Runs that are missing are made, with the settings that the study has; rows of arms that are not asked for stay. **Attention**: the planted probability of
attending to the words when the item at step i was chosen, against omega_text/(omega_text + omega_image) at i, over items that have a picture, of 2,000 test
users; `pooled` over all rows, `within` the mean over users (at least four such items) of the correlation within a user. Arms: dual (DuAF-MAT), user (no
time), static (one weight a modality for all: it does not move, so there is no correlation), dual and user with the state before item i (`s_at=before`, ours),
dual without CSCL, without VSCL and without both. `oracle`: the
posterior mean of that probability under the true generator, given items 1 to i of the same user with their times: what a causal reader of clicks can know at
best. **Pictures**: vectors for items whose picture was withheld, against the withheld ones, in the model's own visual space: centred cosine (mean fill counts
as 0) and squared error (1 = mean squared distance of a present picture from the mean). `length`: how far from the mean the guesses go, same unit; `scale` is
the one factor on all guesses of a run that would have made their squared error least, and `scaled_error` that error (both in hindsight).
"""
import argparse
import numpy as np, polars as pl, torch
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import load_run
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.data.planted import Oracle
from mmrec_wb.models.explain import attention_found, generated_vectors
from mmrec_wb.training.recommender import load_model
from study_recommenders import arm_of
from tune_recommenders import best, run, title

ARMS = {'dual': {}, '-CSCL': dict(ablation='cscl'), '-VSCL': dict(ablation='vscl'), 'user': dict(fusion='user'), 'static': dict(fusion='static'),
        'dual, state before': dict(s_at='before'), '-CSCL -VSCL': dict(lambda_1=0., lambda_2=0.),
        '-CSCL -VSCL, state before': dict(s_at='before', lambda_1=0., lambda_2=0.), 'user, state before': dict(fusion='user', s_at='before')}
PICTURED = 'dual', '-CSCL', '-VSCL'
STILL, CEILING = 'the share does not move: no correlation', 'ceiling: the same users and items'

@torch.no_grad()
def attention_known(oracle, items, times) -> list: # a number for each item
    "E[attention to the words at item i | items 1 to i], the generator's own filter."
    w, said = oracle.prior[:, None, None].expand(-1, len(oracle.text), len(oracle.image))/(len(oracle.text)*len(oracle.image)), []
    left_t, left_i = torch.ones(len(oracle.text), 1), torch.ones(len(oracle.image), 1)                 # probability mass not yet taken
    for k, i in enumerate(items):
        pt, pi = oracle.text[:, i]/left_t[:, 0], oracle.image[:, i]/left_i[:, 0]
        w = w*(oracle.a[:, None, None]*pt[None, :, None] + (1 - oracle.a)[:, None, None]*pi[None, None, :]); w = w/w.sum()
        said.append(float(w.sum((1, 2)) @ oracle.a))
        if k + 1 < len(items): w = torch.einsum('lxy,lm->mxy', w, oracle._move((times[k + 1] - times[k])/86400))
        left_t, left_i = left_t - oracle.text[:, i, None], left_i - oracle.image[:, i, None]
    return said

def with_oracle(frame, data):
    "The frame of fusion weights, the oracle's text share in place of the model's."
    oracle, shares = Oracle(data.truth['items'], data.catalogue['raw_id'][1:].to_list()), []
    for u in frame['user'].unique().sort():
        items, times = data.test.history(u); share = attention_known(oracle, items, times)
        shares.append(pl.DataFrame(dict(user=[u]*len(share), position=range(len(share)), known=share)))
    rows = frame.join(pl.concat(shares), on=['user', 'position'], how='left', maintain_order='left')
    return rows.with_columns(weight=pl.when(modality='text').then('known').when(modality='image').then(1 - pl.col('known')).otherwise('weight'))

def guesses(run, data) -> list: # a row a method
    "Made again from the recorded weights: how near, how far from the mean, and how near if all were drawn out or in by one factor."
    frame = generated_vectors(load_model(run, data), data)
    t2 = pl.col('squared_error').filter(method='mean').first().over('item')                     # own distance from the mean, squared
    rows = frame.with_columns(t2=t2, dot=(pl.col('length')**2 + t2 - pl.col('squared_error'))/2)
    scale, scaled = pl.col('dot').sum()/(pl.col('length')**2).sum(), pl.col('t2').mean() - pl.col('dot').sum()**2/(pl.col('length')**2).sum()/pl.len()
    moved = pl.col('length').max() > 0
    return rows.group_by('method', maintain_order=True).agg(pl.col('cosine', 'squared_error', 'length').mean(), scale=pl.when(moved).then(scale),
                                                            scaled_error=pl.when(moved).then(scaled), items=pl.len()).to_dicts()

def with_others(name, table, arms):
    "The table, with the rows that the recorded one has of other arms, in the order of ARMS."
    file = project_root()/'results'/f'truth_duaf_mat_{name}.csv'
    others = pl.read_csv(file).filter(~pl.col('arm').is_in([*arms, 'oracle'])) if file.exists() else table.clear()
    place = {arm: k for k, arm in enumerate([*ARMS, 'oracle'])}
    both = pl.concat([t for t in (others, table) if t.height], how='diagonal_relaxed')
    return both.sort(pl.col('arm').replace_strict(place), pl.col('seed'), nulls_last=True, maintain_order=True)

def main(args):
    "Both tables."
    what = dict(dataset='toys', source='planted', planted_seed=args.planted_seed, out_dir=args.out_dir); tuned = best('toys', 'planted').get('duaf_mat', {})
    data = add_features(load_dataset('toys', source='planted', planted_seed=args.planted_seed), progress=False)
    attention, pictures, frame = [], [], None; head = dict(dataset=title('toys', 'planted', args.planted_seed))
    for arm in args.arms:
        for seed in args.seeds:
            if not (done := run(**what, seed=seed, model='duaf_mat', **tuned, **ARMS[arm])): raise SystemExit(f'{arm}, seed {seed} failed: no tables')
            r = load_run(project_root()/args.out_dir/done['run']); origin = {k: done[k] for k in ('commit', 'versions', 'run')}
            frame = r.frame('explain/fusion'); found = attention_found(frame)
            attention.append(dict(**head, arm=arm, seed=seed, **found, note='' if found['pooled'] is not None else STILL, **origin))
            if arm in PICTURED: pictures += [dict(**head, arm=arm, seed=seed, **row, **origin) for row in guesses(r, data)]
    attention.append(dict(**head, arm='oracle', **attention_found(with_oracle(frame, data)), note=CEILING, commit=done['commit']))
    for name, rows in dict(attention=attention, pictures=pictures).items():
        table = with_others(name, pl.DataFrame(rows, infer_schema_length=None), args.arms)
        numbers = ('pooled', 'within', 'cosine', 'squared_error', 'length', 'scaled_error')
        values = [c for c in numbers if c in table.columns]
        atomic_write(project_root()/'results'/f'truth_duaf_mat_{name}.csv', lambda tmp: table.write_csv(tmp, float_precision=4))
        keys = ['arm', *(['method'] if 'method' in table.columns else [])]
        means = table.group_by(keys, maintain_order=True).agg(pl.col(values).mean(), *(pl.col(v).std().alias(f'{v} sd') for v in values))
        with pl.Config(tbl_rows=-1): print(means)

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--planted-seed', type=int, default=1); a.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    a.add_argument('--arms', nargs='+', type=arm_of, default=list(ARMS), choices=list(ARMS)); a.add_argument('--out-dir', default='runs/recommenders')
    main(a.parse_args())
