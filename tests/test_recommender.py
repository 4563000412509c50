"Score-based recommenders: batches, ranking, and the baseline notebook from end to end."
import json, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import nbformat, numpy as np, polars as pl, pytest, torch
from hypothesis import given, settings, strategies as st
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run
from mmrec_wb.data import load_dataset
from mmrec_wb.data.batches import Batch, eval_batches, train_batches, train_windows
from mmrec_wb.data.clean import leave_one_out
from mmrec_wb.data.features import add_features
from mmrec_wb.models.base import Recommender
from mmrec_wb.models.sasrec import SASRec
from mmrec_wb.training.ranking import metrics_of, rank_all
from mmrec_wb.training.recommender import load_model, train_recommender

ROOT = project_root()

@pytest.fixture(scope='module')
def data(): return load_dataset('toys', source='planted', planted_users=200, planted_items=150, pictures=False)

@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_windows_hold_each_target_once_with_context(lengths, max_len):
    ends = np.cumsum(lengths); starts = ends - lengths; w = train_windows(starts, ends, max_len)
    seen = [(t, t - a) for a, b, f in zip(w.start, w.stop, w.first) for t in range(a + f + 1, b + 1)]
    assert sorted(t for t, _ in seen) == [t for a, b in zip(starts, ends) for t in range(a + 1, b)]
    first = {t: a for a, b in zip(starts, ends) for t in range(a, b)}
    assert all(n >= min(t - first[t], -(-max_len//2)) for t, n in seen)                                     # items that are seen before the target
    assert len(w.user) == 0 or (w.length.min() >= 1 and w.length.max() <= max_len and (w.start >= starts[w.user]).all())

def test_batches_hold_each_target_once(data):
    for epoch in (1, 2):
        batches = train_batches(data, 8, 300, seed=0, epoch=epoch)
        rows = [(int(u), int(t), int(x)) for b in batches for u, ts, xs in zip(b.user, b.times, b.targets) for t, x in zip(ts, xs) if x]
        want = [(u, int(t), int(x)) for u in range(data.n_users) for t, x in zip(data.train.history(u)[1][:-1], data.train.history(u)[0][1:])]
        assert sorted(rows) == sorted(want)
        assert all(int((b.targets > 0).sum()) <= 308 and b.lengths.max() == b.items.shape[1] for b in batches)
    order = [b.user[0].item() for b in train_batches(data, 8, 300, seed=0, epoch=1)]
    assert order != [b.user[0].item() for b in batches] and order == [b.user[0].item() for b in train_batches(data, 8, 300, seed=0, epoch=1)]

@pytest.fixture(scope='module')
def model(data): torch.manual_seed(0); m = SASRec(data, d=16, heads=2, inner=32, max_len=20); torch.nn.init.normal_(m.item.weight[1:].data); return m.eval()

def test_padding_changes_no_score(data, model):
    b = eval_batches(data, 'test', 20, 64)[1]; alone = model.scores(model.user_state(b))
    wide = lambda x: torch.cat([x, torch.zeros(len(x), 3, dtype=x.dtype)], 1) if x.ndim == 2 else x
    model.encoder.position, kept = torch.nn.Embedding(40, 16), model.encoder.position
    model.encoder.position.weight.data[:20] = kept.weight.data
    padded = model.scores(model.user_state(b.map(wide))); model.encoder.position = kept
    assert torch.allclose(alone, padded, atol=1e-5) and alone[:, 0].eq(-torch.inf).all()
    for i in (0, len(b)//2, len(b) - 1):
        n = int(b.lengths[i]); one = Batch(b.user[i:i + 1], b.items[i:i + 1, :n], b.times[i:i + 1, :n], b.targets[i:i + 1, :n])
        assert torch.allclose(model.scores(model.user_state(one))[0], alone[i], atol=1e-5)

def test_the_next_item_moves_nothing_before_it(data, model):
    b = eval_batches(data, 'test', 20, 64)[2]; x = model.states(b)
    for t in range(1, b.items.shape[1]):
        other = b.items.clone(); other[:, t] = other[:, t] % data.n_items + 1
        y = model.states(Batch(b.user, other, b.times, b.targets))
        assert torch.equal(x[:, :t], y[:, :t]) and (x[:, t] != y[:, t]).any()

def test_training_at_all_positions_is_training_on_prefixes(data, model):
    "One causal pass over a window gives the losses of its prefixes, each in a row of its own."
    model.train(False); b = train_batches(data, 20, 200, 0, 1)[0]; whole = model.loss(b)['loss'].item()
    losses = []
    for u, items, times, targets in zip(b.user, b.items, b.times, b.targets):
        for t in targets.nonzero()[:, 0].tolist():
            x = Batch(u[None], items[None, :t + 1], times[None, :t + 1], targets[None, :t + 1]*(torch.arange(t + 1) == t))
            losses.append(model.loss(x)['loss'].item())
    assert whole == pytest.approx(np.mean(losses), rel=1e-4)

def test_metrics_agree_with_ranx(data, model):
    "An independent implementation, on untied scores."
    import numba; numba.config.DISABLE_JIT = 1                                   # compiling takes a minute, counting 200 users none
    from ranx import Qrels, Run, evaluate
    found = rank_all(model, data, 'test'); names = ('ndcg', 'mrr', 'hit_rate')
    with torch.no_grad(): z = torch.cat([model.scores(model.user_state(b)) for b in eval_batches(data, 'test', 20, 50)])
    users = torch.cat([b.user for b in eval_batches(data, 'test', 20, 50)]).tolist()
    assert all(len(set(row[1:].tolist())) == data.n_items for row in z)
    for tag, masked in (('', False), (' masked', True)):
        scores = {str(u): {str(i): s for i, s in enumerate(row.tolist()) if i and not (masked and i != data.test.targets[u] and i in data.test.history(u)[0])}
                  for u, row in zip(users, z)}
        for k in (5, 10):
            theirs = evaluate(Qrels({str(u): {str(data.test.targets[u]): 1} for u in users}), Run(scores), [f'{n}@{k}' for n in names])
            ours = metrics_of(found)
            for name, n in zip(('NDCG', 'MRR', 'HR'), names): assert ours[f'{name}@{k}{tag}/model'] == pytest.approx(theirs[f'{n}@{k}'], abs=1e-9)
    assert (found['rank_masked'] < found['rank']).any() and (found['rank_masked'] <= found['rank']).all()

class Given(Recommender):
    def __init__(self, z): super().__init__(); self.z, self.max_len = z, 5
    def item_vectors(self): return torch.eye(self.z.shape[1])
    def states(self, b): return self.z[b.user][:, None].expand(-1, b.items.shape[1], -1)

def test_ties_and_masks_by_hand():
    "Six items; histories [1, 2, 3], target 4, and once a target that was had before."
    items, offsets = np.array([1, 2, 3, 4, 1, 4, 2, 4], np.int32), np.array([0, 4, 8])
    toy = SimpleNamespace(title='by hand', n_items=6, items=items, times=np.arange(8), offsets=offsets)
    toy.split = lambda name: leave_one_out(name, offsets, items, toy.times)
    z = torch.tensor([[9, .7, .5, .1, .5, .5, .2], [9, .9, .1, .1, .8, .9, .8]])
    found = rank_all(Given(z), toy)
    # user 0: .7 (had), .5 (had, tied), .5 (tied) before .5: rank 4; without those had: 2.  user 1: .9 (had), .9, .8 (tied): rank 4; without item 1: 3
    assert found['rank'].to_list() == [4, 4] and found['rank_masked'].to_list() == [2, 3]
    assert rank_all(Given(torch.ones(2, 7)), toy)['rank'].to_list() == [6, 6], 'all alike: last of the items, the padding does not count'

def test_chunked_is_whole(data, model):
    whole = rank_all(model, data)
    for cut, users in ((10, 7), (64, 200), (151, 1), (150, 64)):
        found = rank_all(model, data, items_per_part=cut, users_per_batch=users)
        assert found.equals(whole), (cut, users, found.filter(found['rank'] != whole['rank']), whole.filter(found['rank'] != whole['rank']))

def test_memory_does_not_grow_with_users_times_items():
    "10,000 users x 50,000 items: the matrix alone would be 2 GB. A training step and the ranking of all users."
    code = '''
import resource, numpy as np, torch
from types import SimpleNamespace
from mmrec_wb.data.batches import train_batches
from mmrec_wb.data.clean import leave_one_out
from mmrec_wb.data.features import add_features
from mmrec_wb.models.sasrec import SASRec
from mmrec_wb.training.ranking import rank_all
U, I, L = 10_000, 50_000, 5
items, offsets, times = np.random.default_rng(0).integers(1, I + 1, U*L).astype(np.int32), np.arange(0, U*L + 1, L), np.arange(U*L)
data = SimpleNamespace(title='big', n_items=I, items=items, offsets=offsets, times=times, split=lambda n: leave_one_out(n, offsets, items, times))
data.train = data.split('train'); model = SASRec(data, d=8, heads=1, layers=1, inner=8, max_len=5)
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024; before = used()
model.loss(train_batches(data, 5, 2048, 0, 1)[0])['loss'].backward(); rank_all(model, data)
print(used() - before)
'''
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True); assert p.returncode == 0, p.stderr[-2000:]
    assert float(p.stdout) < 250, f'{p.stdout} MB'

def test_what_can_be_learned_is_learned(tmp_path):
    "A ring of items, and both losses: NDCG 1 on unseen positions (sampled: not quite, what a user had is never a negative)."
    g = np.random.default_rng(0); offsets = np.arange(0, 801, 8); times = np.arange(800)
    items = ((g.integers(0, 25, 100)[:, None] + np.arange(8)) % 25 + 1).ravel().astype(np.int32)
    ring = SimpleNamespace(name='ring', source='raw', title='ring', fingerprint='x', n_items=25, n_users=100, items=items, times=times, offsets=offsets)
    from mmrec_wb.models.sasrec import LOSSES
    from mmrec_wb.training.fit import fit
    from mmrec_wb.core.record import open_run
    ring.split = lambda name: leave_one_out(name, offsets, items, times); ring.train = ring.split('train')
    for loss in LOSSES:
        with open_run('sasrec', 'ring', 0, dict(loss=loss), 'x', 'raw', tmp_path) as run:
            torch.manual_seed(0); m = SASRec(ring, d=32, heads=2, layers=1, dropout=0., max_len=8, main_loss=loss)
            fit(m, ring, run, epochs=60, batch_size=100, lr=.01, patience=8)
        assert metrics_of(rank_all(m, ring))['NDCG@10/model'] > dict(ce=.99).get(loss, .7), loss

def test_a_recorded_model_is_built_again(tmp_path):
    "From the registry's name, or for data that are given; other data are refused."
    from mmrec_wb.core.errors import WorkbenchError
    data = load_dataset('toys', source='planted', max_users=50); how = dict(out_dir=tmp_path, epochs=1, d=8, heads=1, layers=1, max_len=9, device='cpu')
    run = train_recommender(data, 'mmrec_wb.models.sasrec:SASRec', max_users=50, **how)
    assert run.path.name.startswith('mmrec_wb.models.sasrec.SASRec-toys')
    again = rank_all(load_run(run.path).model(), data)
    assert again.equals(run.frame('ranks').select(again.columns)) and run.frame('items').height >= 15
    other = load_dataset('toys', source='planted', max_users=40)
    with pytest.raises(WorkbenchError, match='other data'): load_model(run, other)
    run.info['max_users'] = 40
    with pytest.raises(WorkbenchError, match='other data'): run.model()

def papermill(tmp, **params):
    out, runs = tmp/'out.ipynb', tmp/'runs'
    args = [a for k, v in {'out_dir': runs, 'dataset': 'toys', 'source': 'planted', 'max_users': 60, **params}.items() for a in ('-p', k, str(v))]
    p = subprocess.run([str(Path(sys.executable).parent/'papermill'), 'nbs/train_baseline.ipynb', str(out), *args], cwd=ROOT, capture_output=True, text=True,
                       timeout=300)
    return p, out, runs

def figures(notebook):
    return [o for c in nbformat.read(notebook, 4).cells if c.cell_type == 'code' for o in c.outputs if 'application/vnd.plotly.v1+json' in o.get('data', {})]

TINY = dict(d=16, layers=1, max_len=10, epochs=2, batch_size=64)

def test_the_notebook(tmp_path):
    "Whole, the same again, and popularity with the same parameters."
    p, out, runs = papermill(tmp_path, model='sasrec', **TINY); assert p.returncode == 0, p.stderr[-3000:]
    assert len(figures(out)) == 2 and all('planted' in json.dumps(f['data']) for f in figures(out)) and out.stat().st_size < 500_000
    run = load_run(next(runs.glob('sasrec-*'))); names = set(run.frame('metrics').filter(split='test')['name'])
    assert {f'{m}@{k}{tag}/{who}' for m in ('NDCG', 'MRR', 'HR') for k in (5, 10) for tag in ('', ' masked') for who in ('model', 'popularity')} <= names
    assert run.finished and 'NDCG@10/oracle' in names and run.frame('ranks').height == 60 and not list(run.path.glob('checkpoint*'))
    before = {f: f.stat().st_mtime_ns for f in runs.rglob('*') if f.is_file()}
    p, out, _ = papermill(tmp_path, model='sasrec', **TINY); assert p.returncode == 0 and len(figures(out)) == 2
    assert {f: f.stat().st_mtime_ns for f in runs.rglob('*') if f.is_file()} == before
    p, out, _ = papermill(tmp_path, model='pop', **TINY); assert p.returncode == 0 and len(figures(out)) == 1, p.stderr[-3000:]
    pop = load_run(next(runs.glob('pop-*'))); assert pop.params == dict(model='pop')
    assert pop.frame('ranks')['rank'].equals(run.frame('ranks')['rank_popularity'].rename('rank'))

NONSENSE = {'model': (dict(model='sasrek'), 'did you mean sasrec'), 'main_loss': (dict(main_loss='bce'), 'known: bce_sampled, ce'),
            'heads': (dict(heads=3), 'multiple of'),
            'epochs': (dict(epochs=0), 'epochs=0: give at least 1'), 'lr': (dict(lr=-.1), 'lr=-0.1: give 0 to 1'),
            'tracker': (dict(report_to='wandbb'), 'not installed')}

def test_a_changed_fusion_of_ones_own_is_another_run(tmp_path, monkeypatch):
    "And the record names the encoders that the vectors came from."
    import importlib, sys
    monkeypatch.syspath_prepend(str(tmp_path)); file, runs = tmp_path/'myfusion.py', []
    data = load_dataset('toys', source='planted', planted_users=40, planted_items=60)
    vectors = np.random.default_rng(0).normal(size=(data.n_items, 4)).tolist()
    pl.DataFrame(dict(raw_id=data.catalogue['raw_id'][1:], vector=vectors)).write_parquet(tmp_path/'mine.parquet')
    add_features(data, ('text',), encoders=dict(text=tmp_path/'mine.parquet'))
    for base in ('MeanFusion', 'StaticFusion'):
        file.write_text(f'from mmrec_wb.models.fusion import {base} as Base\nclass Mine(Base): pass\n')
        sys.modules.pop('myfusion', None); importlib.invalidate_caches(); small = dict(epochs=1, d=8, inner=16, layers=1, max_len=6, device='cpu')
        runs.append(train_recommender(data, 'duaf_mat', fusion='myfusion:Mine', out_dir=tmp_path/'runs', **small))
    assert runs[0].path != runs[1].path and runs[0].params['fusion_code'] != runs[1].params['fusion_code']
    assert runs[0].info['encoders'] == [str(tmp_path/'mine.parquet'), 'efficientnet-lite0']

@pytest.mark.parametrize('what', NONSENSE)
def test_nonsense_is_one_line_and_leaves_nothing(tmp_path, what):
    params, says = NONSENSE[what]; p, _, runs = papermill(tmp_path, **TINY | params)
    last = p.stderr.strip().splitlines()[-1]
    assert p.returncode != 0 and last.startswith('WorkbenchError: ') and says in last, p.stderr[-1500:]
    assert not list(runs.glob('*'))

def test_two_processes_train_the_same_model(tmp_path):
    "accelerate launch: each takes its rows of a batch and its share of the users to rank; one of them writes."
    def losses(n):
        args = [a for k, v in dict(TINY, dataset='toys', source='planted', max_users=60, dropout=0., device='cpu', out_dir=tmp_path/str(n)).items()
                for a in ('-p', k, str(v))]
        cmd = [Path(sys.executable).parent/'accelerate', 'launch', *(['--multi_gpu'] if n > 1 else []), '--num_processes', n, '--num_machines', 1,
               '--mixed_precision', 'no', '--dynamo_backend', 'no', '-m', 'mmrec_wb.training.launch', 'nbs/train_baseline.ipynb', *args]
        p = subprocess.run(list(map(str, cmd)), cwd=ROOT, capture_output=True, text=True, timeout=300); assert p.returncode == 0, p.stderr[-3000:]
        [path] = (tmp_path/str(n)).iterdir(); run = load_run(path); assert run.info['processes'] == n and run.finished and run.frame('ranks').height == 60
        return np.array(run.frame('metrics').filter(split='train', name='loss')['value'])
    assert np.abs(losses(1)/losses(2) - 1).max() < 2e-3
