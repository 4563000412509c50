"""Does the model use the pictures? Test AUC of recorded SFT runs as they are, and with every picture taken out of the test prompts.

    python benchmarks/without_pictures.py        # after make study
"""
import polars as pl
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import load_run
from mmrec_wb.data import load_dataset
from mmrec_wb.mllm.tasks import examples
from mmrec_wb.mllm.scoring import score_yes_no
from mmrec_wb.training.metrics import auc

rows = []
for folder in sorted((project_root()/'runs'/'study-g1').glob('sft-toys-*')):
    run = load_run(folder); seed, generator = run.info['seed'], run.info['planted_seed']
    data = load_dataset('toys', source='planted', planted_seed=generator, max_users=run.info['max_users'])
    test = examples(data, 'yes_no', 'test', run.params['pair_seed']); label = test['label'].to_numpy()
    with_pictures = auc(run.frame('ranks')['log_odds'].to_numpy(), label)
    data.image_problems.update({i: 'taken out' for i in range(1, data.n_items + 1)})
    without = auc(score_yes_no(*run.model(), data, test)['log_odds'].to_numpy(), label)
    rows.append({'dataset': f'toys (planted, generator seed {generator})', 'seed': seed, 'auc': with_pictures, 'auc without pictures': without})
table = pl.DataFrame(rows)
atomic_write(project_root()/'results'/'pictures_toys_planted_g1.csv', lambda tmp: table.write_csv(tmp, float_precision=4)); print(table)
