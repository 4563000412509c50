"Stage 2: facts about the method, resume, and both commands through papermill."
import json, math, signal, subprocess, sys, time
from pathlib import Path
import nbformat, numpy as np, polars as pl, pytest, torch
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run
from mmrec_wb.data import Feature, load_dataset
from mmrec_wb.data.batches import train_batches
from mmrec_wb.data.features import add_features
from mmrec_wb.models.sasrec import SASRec
from mmrec_wb.preference.losses import LOSSES
from mmrec_wb.training.ranking import rank_all
from mmrec_wb.training.recommender import train_recommender
from mmrec_wb.training.rodpo import Preferring, another, load_model, log_partition, seen_before, settled, train_rodpo
ROOT = project_root()

@pytest.fixture(scope='module')
def data(): return load_dataset('toys', source='planted', planted_users=150, planted_items=100, pictures=False)

def model(data, dropout=0., **s):
    torch.manual_seed(0); policy = SASRec(data, d=16, heads=1, layers=1, inner=32, dropout=dropout, max_len=12)
    torch.manual_seed(1); return Preferring(policy, data, settled(s)).train()

def batch(data): return train_batches(data, 12, 200, seed=0, epoch=1)[0]

# ---- the loss ----
@pytest.mark.parametrize('loss', [l for l in LOSSES if l not in ('mdpo', 'hanorec')])
def test_every_loss_where_policy_is_reference(data, loss):
    "All gaps are 0, so the value is known; K = 3."
    ln2 = math.log(2)
    known = dict(dpo=ln2, cdpo=ln2, robust=ln2, hinge=1, ipo=25, sdpo=math.log(4), dmpo=ln2, beta_dpo=None, rosepo=ln2, kto=.5, simpo=None,
        misp=math.log(4))[loss]
    m = model(data, loss=loss, negatives=3); parts = m.loss(batch(data)); parts['loss'].backward()
    if known: assert float(parts['preference']) == pytest.approx(known, rel=1e-4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.policy.parameters()) and float(parts['preference']) > 0
    assert float(parts['loss'].detach()) == pytest.approx(float(parts['preference'] + parts['backbone']), rel=1e-6)

def test_the_control_is_the_base_alone(data):
    m, b = model(data, loss='none'), batch(data)
    assert torch.equal(m.loss(b)['loss'], m.policy.loss(b)['loss']) and m.drawn.sum() == 0

def test_without_lambda_rec_only_pairs_pull(data):
    "The gradient is that of the preference loss, and a step along it widens the gap of every pair's mean."
    m, b = model(data, lambda_rec=0., strategy='uniform', beta=1.), batch(data); torch.manual_seed(3); m.loss(b)['loss'].backward()
    with torch.no_grad():
        for p in m.policy.parameters(): p -= .05*p.grad
    torch.manual_seed(3); after = m.loss(b); assert float(after['margin']) > 0 and float(after['preference']) < math.log(2) and float(after['accuracy']) > .6

def test_the_reference_is_frozen_and_not_saved(data):
    m, b = model(data), batch(data); before = [p.clone() for p in m.reference.parameters()]
    m.loss(b)['loss'].backward(); torch.optim.SGD(m.parameters(), .5).step()
    assert all(torch.equal(a, p) and p.grad is None for a, p in zip(before, m.reference.parameters())) and not any('reference' in k for k in m.state_dict())
    assert any(not torch.equal(a, p) for a, p in zip(before, m.policy.parameters()))

def test_log_partition_in_chunks(data, monkeypatch):
    "Value and gradient equal those over all scores at once."
    import mmrec_wb.training.rodpo as rodpo
    m, b = model(data), batch(data); h = m.states(b)[b.targets > 0].detach().requires_grad_(); monkeypatch.setattr(rodpo, 'rows_of', lambda model, h: 7)
    z = log_partition(m, h); g = torch.autograd.grad(z.square().sum(), [h, m.policy.item.weight])
    whole = m.scores(h).logsumexp(1); w = torch.autograd.grad(whole.square().sum(), [h, m.policy.item.weight])
    assert torch.allclose(z, whole, atol=1e-5) and all(torch.allclose(x, y, atol=1e-4) for x, y in zip(g, w))

def test_with_dropout_policy_and_reference_start_equal(data):
    "The same masks in both: no gap at the start, whatever is drawn; after a step there is one, and the next masks are others."
    m, b = model(data, dropout=.5, strategy='hard'), batch(data); parts = m.loss(b)
    assert float(parts['margin']) == 0 and float(parts['preference']) == pytest.approx(math.log(2), rel=1e-6)
    assert not torch.equal(m.states(b), m.states(b)) and m.reference.training
    parts['loss'].backward(); torch.optim.SGD(m.parameters(), .5).step(); assert float(m.loss(b)['margin']) != 0
    m.eval(); m.probe(0); assert not m.reference.training

# ---- what is drawn ----
@pytest.mark.parametrize('strategy', ['uniform', 'popularity', 'in_batch', 'hard', 'topk', 'topk_softmax', 'rank_window'])
def test_what_was_had_is_never_drawn(data, strategy):
    m, b = model(data, strategy=strategy, negatives=5), batch(data); real = b.targets > 0; y, seen = b.targets[real], seen_before(data, b)
    ids, _ = m.draw(m.states(b)[real].detach(), b, y, seen); assert ids.shape == (len(y), 5) and ids.min() > 0
    assert not (ids[:, :, None] == torch.cat([y[:, None], seen], 1)[:, None]).any()

@pytest.mark.parametrize('strategy', ['hard', 'topk', 'topk_softmax'])
def test_scores_of_cross_entropy_are_as_good_as_ones_own(data, strategy, monkeypatch):
    "Drawn on the way or from scores made again: the same items; cross-entropy is not disturbed."
    import mmrec_wb.models.base as base
    m, b = model(data, strategy=strategy, negatives=3, pool=10), batch(data); real = b.targets > 0
    monkeypatch.setitem(base.CHUNK, 'cpu', 33*101)
    torch.manual_seed(5); shared = m.loss(b); found = m.drawn.clone()
    torch.manual_seed(5); ids, _ = m.draw(m.states(b)[real].detach(), b, b.targets[real], seen_before(data, b))
    assert torch.equal(found, torch.bincount(ids.flatten(), minlength=len(found)))
    assert float(shared['backbone']) == pytest.approx(float(m.policy.loss(b)['loss'].detach()), rel=1e-6)

def test_hard_is_a_pool_of_one(data):
    b = batch(data); losses = [float(model(data, **s).loss(b)['preference']) for s in (dict(strategy='hard'), dict(strategy='topk', pool=1))]
    hard, one = (model(data, **s) for s in (dict(strategy='hard'), dict(strategy='topk', pool=1))); hard.loss(b); one.loss(b)
    assert losses[0] == losses[1] and torch.equal(hard.drawn, one.drawn)

def test_pools_of_an_epoch_stay(data):
    "Kept pools hold the best-scored items of the moment, whatever the policy learns meanwhile."
    m, b = model(data, pool_refresh='epoch', pool=4), batch(data); m.keep_pools(); real = b.targets > 0
    at = (b.start[:, None] + torch.arange(b.items.shape[1]) + 1)[real]; z = m.scores(m.states(b)[real]).detach()
    z.scatter_(1, torch.cat([seen_before(data, b), b.targets[real][:, None]], 1), -torch.inf); best = z.topk(4).indices
    assert torch.equal(m.pools[at].long().sort(1).values, best.sort(1).values)
    with torch.no_grad(): m.policy.item.weight.copy_(m.policy.item.weight.flip(0))
    ids, _ = m.draw(m.states(b)[real].detach(), b, b.targets[real], seen_before(data, b)); assert (ids[:, :, None] == best[:, None]).any(2).all()

def test_the_probe_says_what_it_drew(data):
    "By hand: rank, gap, false negatives, gradient."
    m = model(data, negatives=2, beta=.5); f = m.probe(0); assert f.equals(m.probe(0)) and not f.equals(m.probe(1))
    user = {u: i for i, u in enumerate(data.users)}; item = {a: i for i, a in enumerate(data.catalogue['raw_id'])}
    liked = {(user[u], item[a]) for u, a in data.truth['false_negatives'].select('reviewerID', 'asin').iter_rows() if u in user and a in item}
    assert f['planted_false'].sum() > 0 and f['later'].sum() > 0
    with torch.no_grad():
        for row in f.sample(40, seed=0).to_dicts():
            items = data.items[data.offsets[row['user']]:data.offsets[row['user'] + 1] - 2].tolist(); held = data.items[data.offsets[row['user'] + 1] - 2]
            t = items.index(row['positive']); x = torch.tensor([items[t - row['position'] - 1:t]])
            z = m.scores(m.policy.encoder(m.policy.item(x))[0, -1]); may = [i for i in range(1, data.n_items + 1) if i not in items[:t + 1]]
            assert row['gap'] == pytest.approx(float(z[row['positive']] - z[row['negative']]), abs=1e-5)
            assert row['rank'] == sum(bool(z[i] >= z[row['negative']] - 1e-9) for i in may) and row['negative'] in may
            assert row['later'] == (row['negative'] in [*items[t + 1:], held]) and row['planted_false'] == ((row['user'], row['negative']) in liked)
            assert row['mass'] == pytest.approx(.5*.5/2, rel=1e-4), 'beta sigma(0), shared by two pairs'

# ---- runs ----
def test_a_run_that_was_killed_after_its_last_epoch_is_only_finished(data, tmp_path, monkeypatch):
    "Nothing is trained any more, and all frames are there."
    import mmrec_wb.training.rodpo as rodpo
    straight = train_rodpo(data, out_dir=tmp_path/'a', **SMALL); kept = rodpo.write_ranks
    def killed(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(rodpo, 'write_ranks', killed)
    with pytest.raises(KeyboardInterrupt): train_rodpo(data, out_dir=tmp_path/'b', **SMALL)
    monkeypatch.setattr(rodpo, 'write_ranks', kept); resumed = train_rodpo(data, out_dir=tmp_path/'b', **SMALL)
    assert resumed.finished and all(straight.frame(f).equals(resumed.frame(f)) for f in ('ranks', 'explain/negatives', 'explain/drift'))

def test_hanorec_weighs_pairs_by_their_neighbourhoods(data):
    "The weights are those of preference.hardness, and so is the loss."
    from dataclasses import replace
    from mmrec_wb.data.features import add_features
    from mmrec_wb.preference import hardness
    full = replace(data, features={}); add_features(full, progress=False); m, b = model(full, loss='hanorec', negatives=2), batch(full)
    y = b.targets[b.targets > 0]; items = torch.stack([y, y % 100 + 1, (y + 6) % 100 + 1], 1); policy, reference = torch.randn(2, *items.shape)
    v = hardness.item_vectors(full.features); d = hardness.delta(v, items[:, :1].expand(-1, 2).flatten().numpy(), items[:, 1:].flatten().numpy(), 10, .05)
    w = torch.from_numpy(hardness.weight(d)).view(-1, 2).float()
    beta = hardness.adaptive_beta((policy - reference)[:, :1] - (policy - reference)[:, 1:], w, .1)
    torch.testing.assert_close(m.each(policy, reference, items)[0], LOSSES['hanorec'](policy, reference, beta=beta), rtol=1e-4, atol=1e-6)
    m.loss(b)['loss'].backward()

TRAIN = '''
import sys
from mmrec_wb.data import load_dataset
from mmrec_wb.training.rodpo import train_rodpo
data = load_dataset('toys', source='planted', planted_users=150, planted_items=100, pictures=False)
how = dict(d=16, heads=1, layers=1, max_len=12, base_epochs=2, base_lr=.01, epochs=6, batch_size=64, lr=.003, patience=9, loss='beta_dpo')
print(train_rodpo(data, pool_refresh=sys.argv[2], out_dir=sys.argv[1], device='cpu', **how).path)
'''

@pytest.mark.parametrize('refresh', ['step', 'epoch'])
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, refresh):
    "Weights, numbers, ranks, and the probe's frame; the loss has a running state of its own."
    def go(out, kill_at=None):
        p = subprocess.Popen([sys.executable, '-c', TRAIN, str(out), refresh], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if kill_at is None:
            text, err = p.communicate(timeout=300); assert p.returncode == 0, err[-2000:]; return load_run(text.strip().splitlines()[-1])
        end = time.time() + 300
        while not list(Path(out).glob(f'rodpo-*/checkpoint-{kill_at}/progress.json')):
            assert p.poll() is None and time.time() < end, p.stderr.read()[-2000:]; time.sleep(.005)
        p.send_signal(signal.SIGKILL); p.communicate()
    straight = go(tmp_path/'a'); go(tmp_path/'b', kill_at=2); resumed = go(tmp_path/'b')
    a, b = (r.frame('metrics').filter(~pl.col('name').str.ends_with('seconds')) for r in (straight, resumed))
    assert a.equals(b) and all(straight.frame(f).equals(resumed.frame(f)) for f in ('ranks', 'explain/negatives', 'explain/drift'))
    assert (straight.path/'model.safetensors').read_bytes() == (resumed.path/'model.safetensors').read_bytes()

SMALL = dict(d=16, heads=1, layers=1, inner=32, max_len=12, base_epochs=3, base_lr=.01, epochs=2, batch_size=128, device='cpu')

def test_from_a_recorded_base(data, tmp_path):
    "base_run and base of the same settings are the same run; the base's ranks are recorded beside; another seed is said."
    one = train_rodpo(data, 'sasrec', out_dir=tmp_path, **SMALL); base = load_run(tmp_path/one.info['base_run'])
    assert train_rodpo(data, base_run=str(base.path), out_dir=tmp_path, **SMALL).path == one.path
    assert one.frame('ranks')['rank_base'].equals(base.frame('ranks')['rank'].rename('rank_base')) and 'NDCG@5/base' in one.frame('metrics')['name']
    other = train_rodpo(data, base_run=str(base.path), out_dir=tmp_path, seed=1, **SMALL)
    assert other.params['base_seed'] == 0 and 'base_seed' not in one.params
    assert rank_all(load_model(other, data), data)['rank'].equals(other.frame('ranks')['rank'])
    drift = one.frame('explain/drift'); assert drift.height == data.n_items and drift['drawn'].sum() > 0 and drift['drift'].abs().max() > 0

NONSENSE = {'a base that is not trained': (dict(base='pop'), 'nothing to go on with'), 'a misspelt setting': (dict(strateggy='hard'), 'did you mean strategy'),
            'mdpo': (dict(loss='mdpo'), 'train_hanorec'), 'no such loss': (dict(loss='dpoo'), 'did you mean dpo'),
            'no such strategy': (dict(strategy='topkk'), 'did you mean topk'),
            'a pool that stays of a strategy without one': (dict(strategy='uniform', pool_refresh='epoch'), 'use one of topk, hard'),
            'no such run': (dict(base_run='runs/none'), 'is no run'),
            'a window that is upside down': (dict(strategy='rank_window', window_from=9, window_to=3), 'window'),
            'a reward for the rejected': (dict(beta=-1.), 'beta=-1.0: give at least'), 'no beta': (dict(loss='ipo', beta=0.), 'beta=0'),
            'no epochs': (dict(epochs=0), 'epochs=0: give at least 1'), 'no epochs of the base': (dict(base_epochs=0), 'epochs=0: give at least 1'),
            'no patience': (dict(patience=0), 'patience=0'), 'the wrong way': (dict(lr=-1.), 'lr=-1.0: give 0 to 1')}

@pytest.mark.parametrize('what', NONSENSE)
def test_nonsense_is_one_line(data, tmp_path, what):
    more, says = NONSENSE[what]
    with pytest.raises(WorkbenchError, match=says) as e: train_rodpo(data, out_dir=tmp_path, **SMALL | more)
    assert '\n' not in str(e.value) and not list(tmp_path.glob('rodpo-*'))

def test_other_vectors_are_another_run(tmp_path):
    "What reads vectors has them in its identity; a base on other vectors says so, and one without them what it lacks."
    data = load_dataset('toys', source='planted', planted_users=60, planted_items=80); add_features(data, progress=False)
    at = lambda **more: train_rodpo(data, **dict(out_dir=tmp_path) | SMALL | more)
    one, base = at(loss='hanorec'), at(base='hm4sr'); assert at(loss='hanorec').path == one.path and 'vectors' not in at().params
    stage1 = str(tmp_path/base.info['base_run']); was, order = data.features, np.r_[0, 1 + np.random.default_rng(0).permutation(data.n_items)]
    data.features = {m: Feature(f.values[order], f.present[order]) for m, f in was.items()}
    other = at(loss='hanorec'); assert other.path != one.path and other.params['vectors'] != one.params['vectors']
    with pytest.warns(UserWarning, match='other vectors of items'): assert at(base_run=stage1).path != base.path
    data.features = {}
    with pytest.raises(WorkbenchError, match='reads vectors of image, text, and these data have none: use what add_features'): at(base_run=stage1, lr=1e-3)

def test_kto_compares_with_the_item_of_somebody_else():
    "Each user's rows meet rows of another; every row is met once."
    for counts in ([3, 1, 2, 5, 4], [1, 1], [4, 4], [2, 7, 6]):
        user = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]; found = another(user)
        assert (user[found] != user).all() and found.sort()[0].equal(torch.arange(len(user)))
    assert another(torch.zeros(3, dtype=torch.int64)).tolist() == [0, 1, 2]           # one user alone has nobody else

def test_the_notebook_reads_what_the_base_reads(tmp_path):
    "base_run names an hm4sr; the notebook's `base` is another."
    data = load_dataset('toys', source='planted', max_users=60); add_features(data, progress=False)
    size = {k: SMALL[k] for k in ('d', 'heads', 'layers', 'inner', 'max_len')}
    base = train_recommender(data, 'hm4sr', max_users=60, out_dir=tmp_path/'runs', epochs=2, device='cpu', **size)
    p, out = papermill(tmp_path, base_run=base.path, epochs=1); assert p.returncode == 0, p.stderr[-3000:]
    said = ' '.join(str(c.outputs) for c in nbformat.read(out, 4).cells if c.cell_type == 'code')
    assert 'hm4sr + dpo, topk' in said and 'sasrec + dpo' not in said

def test_two_processes_count_each_others_draws(tmp_path):
    "accelerate launch: what was drawn is the same number, one item a target and epoch, whoever drew it."
    def drawn(n):
        given = dict(SMALL, dataset='toys', source='planted', max_users=60, dropout=0., out_dir=tmp_path/str(n))
        args = [a for k, v in given.items() for a in ('-p', k, str(v))]
        cmd = [Path(sys.executable).parent/'accelerate', 'launch', *(['--multi_gpu'] if n > 1 else []), '--num_processes', n, '--num_machines', 1,
               '--mixed_precision', 'no', '--dynamo_backend', 'no', '-m', 'mmrec_wb.training.launch', 'nbs/train_rodpo.ipynb', *args]
        p = subprocess.run(list(map(str, cmd)), cwd=ROOT, capture_output=True, text=True, timeout=300); assert p.returncode == 0, p.stderr[-3000:]
        [path] = (tmp_path/str(n)).glob('rodpo-*'); run = load_run(path); assert run.info['processes'] == n
        return int(run.frame('explain/drift')['drawn'].sum())/run.info['epochs_run']
    assert drawn(2) == drawn(1) > 0

def papermill(tmp, **params):
    given = {'out_dir': tmp/'runs', 'dataset': 'toys', 'source': 'planted', 'max_users': 60, **params}
    out, args = tmp/'out.ipynb', [a for k, v in given.items() for a in ('-p', k, str(v))]
    command = [str(Path(sys.executable).parent/'papermill'), 'nbs/train_rodpo.ipynb', str(out), *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300), out

def shown(out):
    kind, cells = 'application/vnd.plotly.v1+json', nbformat.read(out, 4).cells
    return [o['data'][kind] for c in cells if c.cell_type == 'code' for o in c.outputs if kind in o.get('data', {})]

RUNS = {'as it comes': dict(), 'sdpo, hard, duaf_mat': dict(loss='sdpo', strategy='hard', base='duaf_mat', negatives=3), 'control': dict(loss='none'),
        'misp, sae': dict(loss='misp', strategy='sae', negatives=3, sae_units=16)}

@pytest.mark.parametrize('more', RUNS.values(), ids=RUNS)
def test_the_notebook(tmp_path, more):
    p, out = papermill(tmp_path, **SMALL | more); assert p.returncode == 0, p.stderr[-3000:]
    figures = shown(out)
    assert len(figures) == {'none': 2, 'misp': 9}.get(more.get('loss'), 7) and all('planted' in json.dumps(f['layout']) for f in figures)
    run = load_run(next((tmp_path/'runs').glob('rodpo-*'))); assert run.finished and run.frame('ranks').height == 60 and not list(run.path.glob('checkpoint*'))
    names = set(run.frame('metrics').filter(split='test')['name']); assert {'NDCG@5/model', 'NDCG@5/base', 'NDCG@5/popularity', 'NDCG@5/oracle'} <= names

def test_the_notebook_stops_at_nonsense(tmp_path):
    p, _ = papermill(tmp_path, loss='dpoo'); assert p.returncode == 1 and 'did you mean dpo' in p.stderr and not (tmp_path/'runs').exists()

def test_code_of_ones_own_is_part_of_the_run(data, tmp_path, monkeypatch):
    "Its settings reach it, and when its module changes it is another run."
    import importlib, sys
    monkeypatch.syspath_prepend(str(tmp_path)); file = tmp_path/'mine.py'; runs = []
    for gamma in ('gamma', '2*gamma'):
        file.write_text('import mmrec_wb.preference.losses as l\n'
                        f'def mine(policy, reference, *, beta, gamma): return l.simpo(policy, reference, beta=beta, gamma={gamma})\n')
        sys.modules.pop('mine', None); importlib.invalidate_caches()
        runs.append(train_rodpo(data, loss='mine:mine', gamma=.5, beta=1., out_dir=tmp_path/'runs', **SMALL))
    assert runs[0].path != runs[1].path and runs[0].params['gamma'] == .5
    with pytest.raises(WorkbenchError, match='gamma'): train_rodpo(data, loss='mine:mine', out_dir=tmp_path/'runs', **SMALL)
