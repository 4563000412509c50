"""SASRec beside RecBole 1.2.1's, on the same data, one thread: targets a second, users ranked a second, memory, and time to RecBole's best valid NDCG@10.

    python -m venv recbole && recbole/bin/pip install 'recbole==1.2.1' torch==2.13.0 'numpy<2' 'pandas<2.4' 'scipy<1.14'
    MMREC_DATA=... python benchmarks/sasrec_speed.py rates --recbole recbole/bin/python       # results/sasrec_speed.csv; a quarter of an hour
    MMREC_DATA=... python benchmarks/sasrec_speed.py best --recbole recbole/bin/python        # results/sasrec_to_best.csv; forty minutes a seed

Both get the same users, items and order (data.recbole.write_recbole), d 64, two layers, two heads, L 50, inner 256, dropout .5, Adam 1e-3, 2,048 targets a
batch, cross-entropy over all items, valid targets ranked among all items. `rates` (real Toys): the two take turns, each time in a new process; RecBole trains
`--batches` batches of its epoch, with autograd's anomaly detection off, and as shipped (importing its sequential models switches it on). We train whole epochs.
Medians of the turns; CPU seconds beside wall seconds. `floor_targets_per_s` is what the matrix products of a step would allow at the rate of a 1,024 x 1,024
product on the same thread (CPU seconds). `best` (toys1k): RecBole trains to the end of its patience (10) once for each seed, anomaly detection off; we train
until our valid NDCG@10 reaches RecBole's best of that seed. Training and valid ranking both count. A seed is written when it is done, and not timed again while
its row stands in the table.
"""
import argparse, json, os, platform, resource, statistics, subprocess, sys, tempfile, time

SHAPE = dict(d=64, layers=2, heads=2, inner=256, dropout=.5, max_len=50)
clock = lambda: dict(s=time.perf_counter(), cpu_s=time.process_time())
since = lambda start: {k: v - start[k] for k, v in clock().items()}
peak_mb = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def said(epoch, targets, users, train, valid, ndcg):
    "An epoch, as one line of JSON."
    print(json.dumps(dict(epoch=epoch, targets=targets, users=users, train=train, valid=valid, ndcg=ndcg, peak_mb=peak_mb())), flush=True)

# ---- RecBole, in its own environment ----
class Some:
    "The first batches of a data loader."
    def __init__(self, loader, n): self.loader, self.n = loader, n
    def __getattr__(self, name): return getattr(self.loader, name)
    def __len__(self): return min(self.n, len(self.loader))
    def __iter__(self):
        from itertools import islice
        return islice(iter(self.loader), self.n)

def recbole(folder, name, seed, epochs, batches, anomaly):
    "Train and rank with RecBole; a JSON line for each epoch."
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed
    torch.set_num_threads(1)
    settings = dict(data_path=folder, use_gpu=False, gpu_id='', show_progress=False, checkpoint_dir=tempfile.mkdtemp(), state='WARNING', seed=seed,
        reproducibility=True, load_col={'inter': ['user_id', 'item_id', 'timestamp']}, USER_ID_FIELD='user_id', ITEM_ID_FIELD='item_id', TIME_FIELD='timestamp',
        MAX_ITEM_LIST_LENGTH=SHAPE['max_len'], hidden_size=SHAPE['d'], n_layers=SHAPE['layers'], n_heads=SHAPE['heads'], inner_size=SHAPE['inner'],
        hidden_dropout_prob=SHAPE['dropout'], attn_dropout_prob=SHAPE['dropout'], loss_type='CE', train_neg_sample_args=None, train_batch_size=2048,
        eval_batch_size=4096, learning_rate=1e-3, eval_args={'split': {'LS': 'valid_and_test'}, 'order': 'TO', 'mode': 'full', 'group_by': 'user'},
        metrics=['NDCG'], topk=[10], valid_metric='NDCG@10')
    sys.argv = sys.argv[:1]; config = Config(model='SASRec', dataset=name, config_dict=settings); init_seed(seed, True)
    train, valid, _ = data_preparation(config, create_dataset(config)); init_seed(seed, True)
    model = get_model('SASRec')(config, train.dataset).to('cpu'); trainer = get_trainer(config['MODEL_TYPE'], 'SASRec')(config, model)
    torch.autograd.set_detect_anomaly(anomaly); some, best = Some(train, batches or 10**9), (0, 0)
    for epoch in range(1, epochs + 1):
        start = clock(); trainer._train_epoch(some, epoch, show_progress=False); trained = since(start)
        start = clock(); ndcg, _ = trainer._valid_epoch(valid, show_progress=False); ranked = since(start)
        said(epoch, min(len(some)*2048, len(train.dataset)), len(valid.dataset), trained, ranked, float(ndcg))
        best = max(best, (float(ndcg), -epoch))
        if epoch + best[1] >= 10: break

# ---- ours ----
def ours(dataset, seed, epochs, until):
    "The same with the workbench."
    import torch
    from mmrec_wb.core.seeds import rng, set_seed
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.batches import train_batches
    from mmrec_wb.models.sasrec import SASRec
    from mmrec_wb.training.fit import optimisers
    from mmrec_wb.training.ranking import metrics_of, rank_all
    torch.set_num_threads(1); data, best = load_dataset(dataset, source='raw'), (0, 0)
    set_seed(seed); model = SASRec(data, **SHAPE); optimiser = optimisers(model, 1e-3)['main']
    for epoch in range(1, epochs + 1):
        start = clock(); model.train(); set_seed(int(rng(seed, 'dropout', epoch).integers(2**31))); n = 0
        for batch in train_batches(data, model.max_len, 2048, seed, epoch):
            loss = model(batch)['loss']; optimiser.zero_grad(set_to_none=True); loss.backward(); optimiser.step()
            n += int((batch.targets > 0).sum())
            if not loss.item() < 1e9: raise SystemExit('diverged')
        trained = since(start)
        start = clock(); ndcg = metrics_of(rank_all(model, data, 'valid'))['NDCG@10/model']; ranked = since(start)
        said(epoch, n, data.n_users, trained, ranked, ndcg)
        best = max(best, (ndcg, -epoch))
        if ndcg >= until or epoch + best[1] >= 20: break

def floor(dataset):
    "Floating-point operations of the matrix products of one epoch (forward and twice that backward), and those a second of a large product."
    import numpy as np, torch
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.batches import train_batches
    torch.set_num_threads(1); data, d = load_dataset(dataset, source='raw'), SHAPE['d']; places = square = targets = 0
    for b in train_batches(data, SHAPE['max_len'], 2048, 0, 1):
        B, L = b.items.shape; places += B*L; square += B*L*L; targets += int((b.targets > 0).sum())
    blocks = SHAPE['layers']*(places*2*(4*d*d + 2*d*SHAPE['inner']) + square*2*2*d)
    x = torch.randn(1024, 1024); x @ x; took = []
    for _ in range(9): start = time.process_time(); x @ x; took.append(time.process_time() - start)
    logits = targets*2*d*(data.n_items + 1)
    return dict(flop=3*(blocks + logits), flop_of_logits=3*logits, gflop_per_s=2*1024**3/statistics.median(took)/1e9, targets=targets)

# ---- side by side ----
def lines(python, *args):
    "The epochs that a child prints."
    env = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    with tempfile.TemporaryDirectory() as cwd:                                # RecBole leaves a log_tensorboard where it runs
        p = subprocess.run([python, os.path.abspath(__file__), 'child', *map(str, args)], capture_output=True, text=True, env=env, cwd=cwd)
    if p.returncode: sys.exit(p.stderr[-2000:])
    return [json.loads(l) for l in p.stdout.splitlines() if l.startswith('{')]

def rates(python, folder, turns, batches):
    "Medians over the turns."
    found, theirs = {}, lambda turn, batches, anomaly: (python, 'recbole', folder, 'toys', turn, 1, batches, anomaly)
    for turn in range(turns):
        for who, call in (('mmrec_wb', (sys.executable, 'ours', 'toys', turn, 2, 2)), ('recbole, anomaly detection off', theirs(turn, batches, 0)),
                          ('recbole as shipped', theirs(turn, max(1, batches//2), 1))):
            e = lines(*call)[-1]; print(turn, who, json.dumps(e), flush=True)
            speed = {f'targets_per_{k}': e['targets']/e['train'][k] for k in e['train']} | {f'users_per_{k}': e['users']/e['valid'][k] for k in e['valid']}
            found.setdefault(who, []).append(speed | dict(peak_mb=e['peak_mb']))
    middle = {who: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for who, rows in found.items()}
    f = floor('toys'); per_epoch = f['flop']/f['gflop_per_s']/1e9
    ours_ = middle['mmrec_wb']; rows = []
    for who, m in middle.items():
        ratio = {f'ours_over_{k}': ours_[k]/m[k] for k in m if k != 'peak_mb'}
        rows.append(dict(who=who, turns=turns, **m, **ratio, floor_targets_per_s=f['targets']/per_epoch, gflop_per_s=f['gflop_per_s'],
                         share_of_flop_in_logits=f['flop_of_logits']/f['flop']))
    return rows

def to_best(python, folder, seeds):
    "Seconds of training and ranking until RecBole's best, ours and theirs: a row a seed, as they come."
    spent = lambda es, k: sum(e['train'][k] + e['valid'][k] for e in es)
    for seed in seeds:
        theirs = lines(python, 'recbole', folder, 'toys1k', seed, 200, 0, 0); goal = max(e['ndcg'] for e in theirs)
        at = next(n for n, e in enumerate(theirs, 1) if e['ndcg'] == goal)
        mine = lines(sys.executable, 'ours', 'toys1k', seed, 200, goal); reached = mine[-1]['ndcg'] >= goal
        row = dict(seed=seed, goal=goal, reached=reached, best=max(e['ndcg'] for e in mine), epochs_recbole=at, epochs_ours=len(mine))
        row |= {f'recbole_{k}': spent(theirs[:at], k) for k in ('s', 'cpu_s')} | {f'ours_{k}': spent(mine, k) for k in ('s', 'cpu_s')}
        yield row | {f'share_{k}': row[f'ours_{k}']/row[f'recbole_{k}'] for k in ('s', 'cpu_s')}

def main(a):
    import polars as pl, torch
    from mmrec_wb.core.paths import atomic_write, project_root
    from mmrec_wb.core.record import git_commit
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.recbole import write_recbole
    name, file = ('toys', 'sasrec_speed') if a.what == 'rates' else ('toys1k', 'sasrec_to_best')
    path, origin = project_root()/'results'/f'{file}.csv', dict(torch=torch.__version__, machine=platform.machine(), commit=git_commit())
    def written(rows):
        table = pl.DataFrame(rows); atomic_write(path, lambda tmp: table.write_csv(tmp, float_precision=4))
    with tempfile.TemporaryDirectory() as d:
        write_recbole(load_dataset(name, source='raw'), f'{d}/{name}')
        if a.what == 'rates': return written([r | origin for r in rates(a.recbole, d, a.turns, a.batches)])
        rows = pl.read_csv(path).to_dicts() if path.exists() else []
        for row in to_best(a.recbole, d, [s for s in range(a.seeds) if s not in [r['seed'] for r in rows]]):
            rows.append(row | origin); written(rows); print(json.dumps(row), flush=True)

if __name__ == '__main__':
    if sys.argv[1:2] == ['child']:
        who, *args = sys.argv[2:]
        if who == 'ours': ours(args[0], int(args[1]), int(args[2]), float(args[3]))
        else: recbole(args[0], args[1], *map(int, args[2:5]), anomaly=args[5] == '1')
    else:
        p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        p.add_argument('what', choices=['rates', 'best']); p.add_argument('--recbole', required=True, metavar='PYTHON')
        p.add_argument('--turns', type=int, default=3); p.add_argument('--batches', type=int, default=8); p.add_argument('--seeds', type=int, default=3)
        main(p.parse_args())
