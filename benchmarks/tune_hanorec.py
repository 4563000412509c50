"""The second stage's settings: six trials for DPO and six for HaNoRec, judged by AUC on the VALID questions of the planted shop (generator seed 0).
The test split is not looked at.

    python benchmarks/tune_hanorec.py         # 12 trials on one SFT run, half an hour on two cores; results/tune_hanorec_toys_planted.csv
"""
import os; os.environ.setdefault('OMP_NUM_THREADS', '1')
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
import polars as pl
from mmrec_wb.core.paths import atomic_write, project_root

TRIALS = [dict(loss='dpo', beta=b, preference_lr=lr) for b, lr in product((.1, .5), (1e-4, 3e-4, 1e-3))] + \
         [dict(loss='hanorec', noise=n, preference_lr=lr) for n, lr in product((.05, .01), (1e-4, 3e-4, 1e-3))]
# noise .05 and lr 1e-4 are the authors'; beta .1, theirs too
FILE = project_root()/'results'/'tune_hanorec_toys_planted.csv'

def one(trial):
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.features import add_features
    from mmrec_wb.training.hanorec import train_preference, train_sft
    how = dict(out_dir='runs/tune', seed=0, epochs=5)
    data = add_features(load_dataset('toys', source='planted', max_users=800), progress=False)
    sft = train_sft(data, **how)
    if trial is None: return
    run = train_preference(data, sft, **how, **trial)
    valid = lambda r: r.frame('metrics').filter(split='valid', name='auc/model')['value'].item()
    m = run.frame('metrics').filter(split='preference')
    last = lambda name: m.filter(name=name).sort('step')['value'].tail(3).mean() if name in m['name'] else None
    return dict(dataset='toys (planted)', generator_seed=0, users=800, seed=0, **{k: trial.get(k) for k in ('loss', 'beta', 'noise', 'preference_lr')},
                valid_auc_sft=valid(sft), valid_auc=valid(run),
                accuracy_noisy=last('accuracy'), accuracy_clean=last('accuracy_clean'),
                cpu_seconds=run.info['cpu_seconds'], commit=run.info['commit'], run=run.path.name)

def best(path=FILE) -> dict: # loss -> the settings of its best trial
    "What tuning chose."
    table = pl.read_csv(path)
    rows = {loss: table.filter(loss=loss).sort('valid_auc', descending=True).row(0, named=True) for loss in table['loss'].unique()}
    return {loss: {k: r[k] for k in ('beta', 'noise', 'preference_lr') if r[k] is not None} for loss, r in rows.items()}

if __name__ == '__main__':
    one(None)
    with ProcessPoolExecutor(2, get_context('spawn')) as pool: table = pl.DataFrame(list(pool.map(one, TRIALS))) # spawn: polars does not survive a fork
    atomic_write(FILE, lambda tmp: table.write_csv(tmp, float_precision=5))
    with pl.Config(tbl_rows=-1, tbl_cols=-1): print(table.drop('dataset', 'run', 'commit'))
    print(best())
