"The sparse autoencoder: its limits, its stream, killed and resumed, and given nonsense."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, polars as pl, pytest, torch
from hypothesis import given, settings, strategies as st
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run
from mmrec_wb.data import Feature, load_dataset
from mmrec_wb.preference.sae import ACTIVATIONS, Factors, Sae, fit_sae, kl, projection
from mmrec_wb.training.factors import Pairs, labels_of, load_factors, planted_levels, train_sae

MADE_UP = '''
import numpy as np
from mmrec_wb.data import Feature, load_dataset
def shop():
    data = load_dataset('toys', source='planted', planted_users=300, planted_items=200, pictures=False); g = np.random.default_rng(0)
    for m, d in (('text', 20), ('image', 30)):
        v = g.normal(size=(data.n_items + 1, d)).astype(np.float32); there = g.random(len(v)) < (.7 if m == 'image' else 1.); there[0] = False; v[~there] = 0
        data.features[m] = Feature(v, there)
    return data
'''
exec(MADE_UP)
SMALL = dict(units=16, d=8, epochs=3, batch_size=64, pairs_per_target=4, device='cpu', progress=False)

@pytest.fixture(scope='module')
def data(): return shop()

def materialised(sae, x, t):
    "z and error with d written out."
    d = (x[..., :, None]*t[..., None, None, :]).flatten(2); y = d @ sae.encoder.flatten(1).T + sae.threshold
    z = y.sigmoid() if sae.activation == 'sigmoid' else torch.zeros_like(y).scatter(-1, (best := y.topk(sae.active, -1)).indices, best.values)
    return z, (d - z @ sae.decoder.flatten(1) - sae.centre.flatten()).square().sum(-1)

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.integers(1, 7), st.sampled_from(ACTIVATIONS), st.integers(0, 99))
def test_the_same_as_with_d_written_out(B, N, d_v, d_t, activation, seed):
    torch.manual_seed(seed); sae = Sae(d_v, d_t, units=6, activation=activation, active=2).double(); sae.centre.data.normal_(); sae.threshold.data.normal_()
    x, t = torch.randn(B, N, d_v).double(), torch.randn(B, d_t).double(); z, error = materialised(sae, x, t); own = sae.encode(x, t)
    assert torch.allclose(own, z, atol=1e-10) and torch.allclose(sae.error(x, t, own), error, atol=1e-9)
    one = sae.encode(x[:, 0], t); assert torch.allclose(one, z[:, 0], atol=1e-10) and torch.allclose(sae.error(x[:, 0], t, one), error[:, 0], atol=1e-9)
    weights = lambda e: torch.autograd.grad(e.mean(), list(sae.parameters()), retain_graph=True)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(weights(sae.error(x, t, own)), weights(error)))

def test_single_precision_keeps_small_errors():
    "The error is a difference of larger numbers; what is lost is rounding of those."
    torch.manual_seed(0); sae = Sae(32, 16, units=8); x, t = torch.randn(4, 5, 32), torch.randn(4, 16); z = sae.encode(x, t)
    exact = sae.double().error(x.double(), t.double(), z.double()); assert torch.allclose(sae.float().error(x, t, z).double(), exact, rtol=1e-4)

def test_plain_vectors_are_pairs_whose_words_are_one():
    torch.manual_seed(0); plain = Sae(7, units=5).double(); pair = Sae(7, 1, units=5).double(); pair.load_state_dict(plain.state_dict())
    x = torch.randn(6, 7).double(); t = torch.ones(6, 1).double(); z = plain.encode(x)
    assert torch.allclose(z, pair.encode(x, t)) and torch.allclose(plain.error(x, None, z), pair.error(x, t, z)) and torch.allclose(plain.encode(x[None])[0], z)

def test_all_units_active_is_a_linear_autoencoder():
    torch.manual_seed(0); sae = Sae(6, units=4, activation='topk', active=4).double(); x = torch.randn(50, 6).double()
    by_hand = (x - (x @ sae.encoder[..., 0].T + sae.threshold) @ sae.decoder[..., 0] - sae.centre[:, 0]).square().sum(1).mean()
    assert torch.allclose(sae.loss(x)['loss'], by_hand) and float(sae.loss(x)['sparsity']) == 0

def test_exactly_k_are_active_and_only_they_learn():
    torch.manual_seed(0); sae = Sae(6, 3, units=12, activation='topk', active=3); x, t = torch.randn(1, 6), torch.randn(1, 3)
    many = sae.encode(torch.randn(40, 6), torch.randn(40, 3)); assert (sae.on(many).sum(-1) == 3).all()
    z = sae.encode(x, t); sae.loss(x, t)['loss'].backward()
    assert ((sae.encoder.grad.flatten(1).abs().sum(1) > 0) == sae.on(z)[0]).all() and ((sae.decoder.grad.flatten(1).abs().sum(1) > 0) == sae.on(z)[0]).all()

def test_the_divergence_and_its_slope_are_zero_at_rho():
    mean = torch.tensor([.05, .05, .3], dtype=torch.float64, requires_grad=True); each = kl(mean, .05); each.sum().backward()
    assert torch.allclose(each[:2], torch.zeros(2).double(), atol=1e-12) and each[2] > 0 and mean.grad[0].abs() < 1e-12 < mean.grad[2]
    assert torch.allclose(each[2].detach(), torch.tensor(.05*np.log(.05/.3) + .95*np.log(.95/.7)))
    assert torch.isfinite(kl(torch.tensor([0., 1.]), .05)).all()
    torch.manual_seed(0); x = torch.randn(9, 4); free, bound = Sae(4, gamma=0., units=3), Sae(4, gamma=2., units=3); bound.load_state_dict(free.state_dict())
    a, b = free.loss(x), bound.loss(x); assert a['loss'] == a['reconstruction'] and torch.allclose(b['loss'], a['loss'] + 2*b['sparsity'])

def test_d_is_never_written_out():
    "64 x 64 pairs of 512-d vectors: d would be 4.3 GB, W for 4 units is 4 MB."
    code = '''
import resource, torch
from mmrec_wb.preference.sae import Sae
sae = Sae(512, 512, units=4); x, t = torch.randn(64, 64, 512), torch.randn(64, 512); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sae.loss(x, t)['loss'].backward(); print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)//1024)
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=project_root()); assert out.returncode == 0, out.stderr[-2000:]
    assert int(out.stdout) < 300                                                           # MB

def test_dead_units_are_revived():
    "Units that nothing can wake but a new start."
    g = torch.Generator().manual_seed(0); x = torch.randn(20, 64, 16, generator=g)
    class Killing(list):
        def __getitem__(self, i):
            if not killed: killed.append(1); return super().__getitem__(i)                 # the look at the first batch, for first weights
            if len(killed) == 1: sae.encoder.data[:4] = 0; sae.threshold.data[:4] = -50; killed.append(2)
            return super().__getitem__(i)
    killed, sae = [], Sae(16, units=8, rho=.2); said = fit_sae(sae, lambda epoch: Killing([(5*b, None) for b in x]), epochs=6, lr=.01, progress=False)
    assert said[0]['dead'] >= .5 and said[0]['revived'] >= 4 and said[-1]['revived'] == 0 and said[-1]['dead'] < .5

def test_pairs_are_the_users_own_training_targets(data):
    f = Factors(Sae(30, 20), *(torch.from_numpy(data.features[m].values.copy()) for m in ('image', 'text'))); stream = Pairs(data, f, 30, 4, 50, 0); seen = []
    for i in range(len(stream(1))):
        x, t, user, positive, other = stream(1).rows(i)
        for b in range(len(user)):
            items = data.train.history(user[b])[0].tolist(); at = items.index(positive[b]); seen.append((user[b], at))
            assert at > 0 and not set(other[b]) & set(items)
            assert torch.allclose(t[b], f.t[items[:at]].mean(0), atol=1e-6) and torch.allclose(x[b], f.v[positive[b]] - f.v[other[b]])
        assert f.present[positive].all() and f.present[other].all() and set(other[0]) <= set(stream.near[positive[0]])
        assert all(torch.equal(a, b) for a, b in zip(stream(1)[i], (x, t)))                # made alone, the same again
    want = [(u, k) for u in range(data.n_users) for k, item in enumerate(data.train.history(u)[0]) if k and f.present[item]]
    assert sorted(seen) == want and not torch.equal(stream(1)[0][0][:4], stream(2)[0][0][:4])
    nothing_left = Pairs(data, f, 1, 4, 50, 0); nothing_left.own = np.arange(data.n_users*stream.base) # every item is everybody's
    x, *_, positive, other = nothing_left(1).rows(0); assert (other == positive[:, None]).all() and not x.any()

def test_a_run_reloads_and_tells(data, tmp_path, capsys):
    run = train_sae(data, out_dir=tmp_path, **SMALL); f = load_factors(run, data)
    frames = {k: run.frame(f'explain/{k}') for k in ('factors', 'factor_pairs', 'factor_histogram', 'factor_truth')}
    assert train_sae(data, out_dir=tmp_path, active=3, **SMALL).path == run.path           # without a part, so no other run
    assert train_sae(data, out_dir=tmp_path, **SMALL | dict(rho=.1)).path != run.path and not list(run.path.glob('*.checkpoint'))
    planted = ['planted_factor', 'planted_level', 'planted_auc']
    assert frames['factors'].columns == ['unit', 'mean', 'share', 'highest', 'dead', 'norm', 'x', 'y', 'words', *planted]
    assert frames['factors']['unit'].to_list() == list(range(16)) and frames['factor_histogram'].height == 16*20 and frames['factor_pairs'].height == 16*8
    assert frames['factor_truth'].height == 16*sum(1 + len(names) for names, _ in planted_levels(data).values())
    for unit, place, user, positive, negative, z in frames['factor_pairs'].filter(unit=3).rows():
        history = data.train.history(user)[0]; before = history[:history.tolist().index(positive)]
        x = f.histories(torch.from_numpy(before.astype(np.int64))[None]); said, _ = f.of(torch.tensor([positive]), x, torch.tensor([[negative]]))
        assert abs(float(said[0, 0, 3]) - z) < 1e-4
    assert {*frames['factor_pairs']['positive'], *frames['factor_pairs']['negative']} == {*run.frame('items')['id']}
    batches = [Pairs(data, f, 200, 4, 64, 0)(1)[i] for i in range(3)]
    energy = torch.cat([(x.square().sum(-1)*t.square().sum(-1, keepdim=True)).flatten() for x, t in batches]).mean()
    assert abs(float(energy)/30 - 1) < .2 and run.frame('metrics').filter(split='train', name='explained_variance').height == 3

KINDS = [dict(activation='topk'), dict(kind='items'), dict(kind='items', activation='topk', visual='text'), dict(visual='text', d=0, pool=0)]

@pytest.mark.parametrize('how', KINDS, ids=str)
def test_every_kind_trains(data, tmp_path, how):
    run = train_sae(data, out_dir=tmp_path, **SMALL | how); f = load_factors(run, data); said = run.frame('metrics').filter(step=3)
    assert said['value'].is_finite().all() and f.sae.d_t == (0 if how.get('kind') == 'items' else 20 if how.get('d') == 0 else 8)
    if how.get('activation') == 'topk':
        assert said.filter(name='L0')['value'].item() == 8 and torch.allclose(f.sae.decoder.flatten(1).norm(dim=1), torch.ones(16))
    if how.get('kind') == 'items': assert run.frame('explain/factor_pairs')['negative'].null_count() == run.frame('explain/factor_pairs').height

def test_a_shop_without_pictures(data, tmp_path):
    from dataclasses import replace
    bare = replace(data, features=dict(text=data.features['text']), truth=None)
    with pytest.raises(WorkbenchError, match='no image vectors.*use visual=text'): train_sae(bare, out_dir=tmp_path, **SMALL)
    run = train_sae(bare, out_dir=tmp_path, **SMALL | dict(visual='text')); f = load_factors(run, bare)
    assert run.frame('explain/factors')['planted_auc'].null_count() == 16
    assert not (run.path/'explain/factor_truth.parquet').exists()
    assert torch.allclose(f.v/f.v.norm(), f.t/f.t.norm(), atol=1e-6)                       # the words stand for the picture
    z, error = f.of(torch.tensor([1, 2]), f.histories(torch.tensor([[3, 4], [5, 0]])), torch.tensor([[6], [7]]))
    assert z.shape == (2, 1, 16) and error.min() > 0

def test_nonsense_is_one_line(data, tmp_path):
    from dataclasses import replace
    def features(**f): return replace(data, features=data.features | f)
    holes = data.features['image'].values.copy(); i = int(np.flatnonzero(data.features['image'].present)[3]); holes[i, 2] = np.nan
    train = lambda d, **how: train_sae(d, out_dir=tmp_path, **SMALL | how); present = data.features['image'].present
    with pytest.raises(WorkbenchError, match=f'vector {i} of .* has NaN or inf'): train(features(image=Feature(holes, present)))
    with pytest.raises(WorkbenchError, match='no text vectors'): train(replace(data, features=dict(image=data.features['image'])))
    with pytest.raises(WorkbenchError, match='do not fit'): train(features(text=Feature(np.ones((3, 2), np.float32), np.ones(3, bool))))
    nobody = Feature(np.zeros_like(holes), np.zeros(len(holes), bool))
    with pytest.raises(WorkbenchError, match='no training target'): train_sae(features(image=nobody), out_dir=tmp_path, **SMALL)
    same = Feature(np.ones_like(holes)*data.features['image'].present[:, None], data.features['image'].present)
    with pytest.raises(WorkbenchError, match='the same'): train_sae(features(image=same), out_dir=tmp_path, **SMALL)
    for how, what in ((dict(units=0), 'units=0'), (dict(rho=1.), 'rho=1'), (dict(activation='topk', active=17), 'active=17'), (dict(lr=float('nan')), 'lr=nan'),
                      (dict(activation='relu'), 'unknown activation'), (dict(pool=-1), 'pool=-1'), (dict(d=-2), 'd=-2'),
                      (dict(visual='sound'), 'unknown visual'), (dict(device='cuda:9'), 'device=cuda:9')):
        with pytest.raises(WorkbenchError, match=what): train_sae(data, out_dir=tmp_path, **SMALL | how)
    x = torch.randn(5, 8); x[2, 1] = float('inf')
    batches = lambda epoch: [(torch.randn(5, 8), None), (x, None)]
    with pytest.raises(WorkbenchError, match='error of reconstruction became'): fit_sae(Sae(8, units=4), batches, epochs=1, progress=False)
    with pytest.raises(WorkbenchError, match='no batch'): fit_sae(Sae(8, units=4), lambda epoch: [], epochs=1, progress=False)
    run = train_sae(data, out_dir=tmp_path, **SMALL); (run.path/'sae.safetensors').write_bytes(b'nonsense')
    with pytest.raises(WorkbenchError, match='run again with resume=False'): load_factors(run, data)
    (tmp_path/'sae.checkpoint').write_bytes(b'nonsense')
    with pytest.raises(WorkbenchError, match='sae.checkpoint cannot be read'): fit_sae(Sae(8, units=4), batches, folder=tmp_path, progress=False)

TRAIN = MADE_UP + '''
import sys
from mmrec_wb.training import factors
fit, factors.fit_sae = factors.fit_sae, lambda *a, **k: fit(*a, every=7, **k)      # checkpoints within an epoch, too
print(factors.train_sae(shop(), out_dir=sys.argv[1], units=32, d=16, epochs=6, batch_size=32, pairs_per_target=4, device='cpu', progress=False).path)
'''

def train(out, kill_at=None):
    "Train; kill -9 once the checkpoint has come to (epoch, step)."
    from safetensors import safe_open
    p = subprocess.Popen([sys.executable, '-c', TRAIN, str(out)], cwd=project_root(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if kill_at is None:
        text, err = p.communicate(timeout=300); assert p.returncode == 0, err[-2000:]
        return load_run(text.strip().splitlines()[-1])
    def at():
        for file in Path(out).glob('sae-*/sae.checkpoint'):
            with safe_open(file, 'pt') as f: said = json.loads(f.metadata()['progress']); return said['epoch'], said['step']
        return 0, 0
    end = time.time() + 300
    while at() < kill_at: assert p.poll() is None and time.time() < end, p.stderr.read()[-2000:]; time.sleep(.002)
    p.send_signal(signal.SIGKILL); p.communicate()

def test_a_killed_run_goes_on_and_ends_the_same(tmp_path):
    straight = train(tmp_path/'straight')
    for at in ((1, 14), (4, 0)): train(tmp_path/'killed', at)
    assert json.loads(next((tmp_path/'killed').glob('*/run.json')).read_text())['status'] == 'running'
    resumed = train(tmp_path/'killed'); assert resumed.path.name == straight.path.name and straight.frame('metrics').equals(resumed.frame('metrics'))
    assert (straight.path/'sae.safetensors').read_bytes() == (resumed.path/'sae.safetensors').read_bytes()
    for name in ('factors', 'factor_pairs', 'factor_truth'): assert straight.frame(f'explain/{name}').equals(resumed.frame(f'explain/{name}'))
