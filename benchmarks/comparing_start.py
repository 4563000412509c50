"""What the start of `tiny` is worth: SFT with and without `comparing_start`, AUC on the valid questions of the planted shop.

    python benchmarks/comparing_start.py         # 2 starts x 2 seeds, about ten minutes on two cores
"""
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
import polars as pl
from mmrec_wb.core.paths import atomic_write, project_root

def one(start, seed):
    import torch; torch.set_num_threads(1)
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.features import add_features
    from mmrec_wb.mllm import backbones
    from mmrec_wb.mllm.tasks import yes_no_examples
    from mmrec_wb.mllm.scoring import score_yes_no
    from mmrec_wb.training.hanorec import train_sft
    from mmrec_wb.training.metrics import auc
    if not start: backbones.comparing_start = lambda *a, **k: None
    data = load_dataset('toys', source='planted', max_users=800); valid = yes_no_examples(data, 'valid', seed)
    add_features(data, progress=False)
    with tempfile.TemporaryDirectory() as d:
        run = train_sft(data, out_dir=d, seed=seed, pair_seed=seed, epochs=5)
        steps = int(run.frame('metrics').filter(split='sft')['step'].max())
        log_odds = score_yes_no(*run.model(), data, valid, progress=False)['log_odds'].to_numpy()
        return dict(dataset='toys (planted)', users=800, start='comparing' if start else 'usual', seed=seed, steps=steps,
                    valid_auc=auc(log_odds, valid['label'].to_numpy()))

if __name__ == '__main__':
    arms = list(product((True, False), (0, 1)))
    with ProcessPoolExecutor(2) as pool: table = pl.DataFrame(list(pool.map(one, *zip(*arms))))
    atomic_write(project_root()/'results'/'comparing_start_toys_planted.csv', lambda tmp: table.write_csv(tmp, float_precision=4)); print(table)
