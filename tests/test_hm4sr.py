"What the doc-tests of HM4SR cannot hold: its limiting cases, leaks, missing modalities, training, the notebook."
import copy, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, polars as pl, pytest, torch
import torch.nn.functional as F
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run, open_run
from mmrec_wb.data import Feature, load_dataset
from mmrec_wb.data.batches import eval_batches, train_batches
from mmrec_wb.data.features import add_features
from mmrec_wb.models import hm4sr
from mmrec_wb.models.base import catalogue_ce
from mmrec_wb.models.hm4sr import HM4SR, Time, info_nce, rivals
from mmrec_wb.models.sasrec import SASRec
from mmrec_wb.training.fit import fit, optimisers
from mmrec_wb.training.ranking import rank_all
from mmrec_wb.training.recommender import load_model, train_recommender
from test_duaf_mat import padding_changes_no_score

ROOT = project_root()
TINY = dict(d=16, inner=32, max_len=20)
OFF = dict(interactive_experts=0, temporal_experts=0, lambda_idcl=0., lambda_cp=0., lambda_pcl=0.)

@pytest.fixture(scope='module')
def data():
    "Small vectors instead of the encoders'; a third of the pictures are missing."
    data, g = load_dataset('toys', source='planted', planted_users=60, planted_items=60, pictures=False), np.random.default_rng(0)
    there = np.arange(data.n_items + 1) > 0; some = there & (g.random(len(there)) < .7)
    vectors = lambda has: Feature((g.normal(size=(len(has), 12))*has[:, None]).astype(np.float32), has)
    data.features = dict(text=vectors(there), image=vectors(some)); return data

def model(data, **settings): torch.manual_seed(0); return HM4SR(data, **(TINY | settings))
def rows(data, least=6): [b] = eval_batches(data, 'test', 20); return b.map(lambda x: x[b.lengths >= least])
def batch_of(data): return train_batches(data, 20, 128, 0, 0)[0]

# ---- limiting cases ----
def test_without_its_own_parts_it_is_the_sum_of_three_sasrecs(data):
    m, b = model(data, dropout=0., **OFF), batch_of(data); v, total = m.item_vectors(), 0; assert m.clock is None and not m.placeholder and m.classify is None
    for k, name in enumerate(m.names):
        one = SASRec(data, **TINY, dropout=0.); one.item.weight.data = v[:, 16*k:16*k + 16].detach().clone()
        one.encoder.position.weight.data = m.position.weight.data
        one.encoder.load_state_dict(m.encoders[name].state_dict(), strict=False); total = total + one.scores(one.states(b))
    torch.testing.assert_close(m.scores(m.states(b)), total); real = b.targets > 0
    torch.testing.assert_close(m(b)['loss'], F.cross_entropy(total[real][:, 1:], b.targets[real] - 1)); assert set(m(b)) == {'loss', 'main'}

def test_mixtures_that_say_nothing_change_nothing(data):
    a, b, batch = model(data, **OFF).eval(), model(data, dropout=0.).eval(), batch_of(data); b.load_state_dict(a.state_dict(), strict=False)
    b.what.weight.data.zero_(); b.when.v.data.fill_(1.); torch.testing.assert_close(a.states(batch), b.states(batch))
    b.when.v.data.normal_(); assert (a.states(batch) - b.states(batch)).abs().max() > 1e-3

def test_the_loss_is_the_weighted_sum_of_its_parts_and_states_can_be_shared(data):
    m, b = model(data, dropout=0., lambda_idcl=.3, lambda_cp=.7, lambda_pcl=.2), batch_of(data); parts = m(b)
    torch.testing.assert_close(parts['loss'].detach(), parts['main'] + .3*parts['idcl'] + .7*parts['cp'] + .2*parts['pcl'])
    m = model(data); torch.manual_seed(5); one = m(b); torch.manual_seed(5); two = m.loss_from(b, m.states(b))
    assert one.keys() == two.keys() and m.shares_states
    for k in one: torch.testing.assert_close(one[k], two[k])
    seen = []; m.loss_from(b, m.states(b), look=lambda a, z: seen.append(len(z))); assert sum(seen) == (b.targets > 0).sum()

@pytest.mark.parametrize('off', ['idcl', 'cp', 'pcl'])
def test_a_weight_of_zero_leaves_its_part_out(data, off):
    m, b = model(data, **{f'lambda_{off}': 0.}), batch_of(data); parts = m(b); parts['loss'].backward()
    assert set(parts) == {'loss', 'main', 'idcl', 'cp', 'pcl'} - {off} and all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())

# ---- contrast ----
def test_info_nce_by_hand():
    torch.manual_seed(0); a, b = torch.randn(5, 4), torch.randn(5, 4); row, y = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([7, 8, 9, 9, 7])
    cos = F.cosine_similarity(a[:, None], b[None], dim=-1)/.2; use = ~((row[:, None] == row) | (y[:, None] == y)) | torch.eye(5, dtype=torch.bool)
    wanted = torch.stack([-(cos[i, i] - cos[i][use[i]].logsumexp(0)) for i in range(5)]).mean()
    nce = lambda a, b, row, y, *how, group=1024: info_nce(a, b, .2, rivals(row, y, group), *how); torch.testing.assert_close(nce(a, b, row, y), wanted)
    slip = torch.where((y[:, None] == y) & ~torch.eye(5, dtype=torch.bool), 0., cos)          # the authors': a logit of 0 stays in the sum
    slip = slip.masked_fill((row[:, None] == row) & ~torch.eye(5, dtype=torch.bool), -torch.inf)
    torch.testing.assert_close(nce(a, b, row, y, 'zero'), (slip.logsumexp(1) - cos.diagonal()).mean())
    assert nce(a, b, torch.zeros(5), y).abs() < 1e-6                                                            # nobody else: nothing to tell apart
    lone = torch.arange(5); parts = sum(n*nce(a[i:i + n], b[i:i + n], lone[:n], lone[:n]) for i, n in ((0, 2), (2, 2), (4, 1)))
    torch.testing.assert_close(nce(a, b, lone, lone, group=2), parts/5)

def test_placeholders_replace_their_share_and_know_only_the_time(data):
    m, b = model(data), rows(data); x, time = m._embed(b); torch.manual_seed(0); placed = m._placed(b, x, time); assert set(placed) == {'text', 'image'}
    for k, name in ((1, 'text'), (2, 'image')):
        new = (placed[name] != x[:, :, k]).any(-1); assert torch.equal(new.sum(1), (b.lengths*.3 + 1e-6).floor().long()) and not new[~b.mask].any()
        torch.testing.assert_close(placed[name][new], m.placeholder[name](time)[new])

# ---- leaks ----
@pytest.mark.parametrize('how', [{}, OFF, dict(ffn_experts=4)])
def test_a_later_item_or_time_moves_nothing_before_it(data, how):
    m, b = model(data, **how).eval(), rows(data)
    if m.when is not None: m.clock.u.weight.data.normal_(); m.when.W.weight.data.normal_()                                # time must matter, to be seen to leak
    with torch.no_grad():
        for t in (1, 3, 5):
            items, times = b.items.clone(), b.times.clone(); items[:, t] = items[:, t] % data.n_items + 1; times[:, t] += 10**7
            for changed in (replace(b, items=items), replace(b, times=times), replace(b, items=items, times=times)):
                torch.testing.assert_close(m.states(changed)[:, :t], m.states(b)[:, :t], rtol=1e-5, atol=1e-6)
            moved = (m.states(replace(b, times=times)) - m.states(b))[:, t].abs().max(); assert moved > 1e-4 if m.when is not None else moved == 0

def test_padding_changes_no_score(data): padding_changes_no_score(model(data), data)

def test_gaps_of_the_test_part_are_unknown_to_the_table(data):
    train = max(int(np.diff(data.train.history(u)[1]).max(initial=0)) for u in range(data.n_users))
    assert model(data).clock.u.num_embeddings == int(np.floor(100*np.log2(train + 1))) + 1
    clock = Time(4, 10.); far = clock(torch.tensor([[11., 1e9]]), torch.zeros(1, 2)); assert torch.equal(far[0, 0], far[0, 1])

# ---- modalities ----
@pytest.mark.parametrize('kept', [['text'], ['image'], []])
def test_without_a_modality(data, kept):
    other = replace(data, features={m: data.features[m] for m in kept}); m = model(other); parts = m(batch_of(data)); parts['loss'].backward()
    assert m.names == ['id', *kept] and ('pcl' in parts) == bool(kept) and any('is off' in n for n in m.notes) and ('ids only' in m.notes) == (not kept)
    assert m.states(batch_of(data)).shape[-1] == 16*len(m.names) and all(p.grad is not None for p in m.parameters())

def test_no_vector_of_an_absent_item_is_read(data):
    f = data.features['image']; values = f.values.copy(); values[~f.present] = 1e3; m = model(data).eval()
    n = model(replace(data, features=dict(data.features, image=Feature(values, f.present)))).eval()
    with torch.no_grad():
        torch.testing.assert_close(m.item_vectors(), n.item_vectors()); lacking = torch.from_numpy(~f.present)
        assert (m.item_vectors()[lacking, 32:] == m.absent['image']).all()
        assert torch.allclose(m._vectors('image', torch.tensor([[3, 5]]))[0], m._vectors('image')[[3, 5]], atol=1e-6)
    assert any('share one learned vector' in note for note in m.notes)

def test_kept_vectors_are_never_old_ones(data):
    m = model(data).eval()
    with torch.no_grad(): one = m.item_vectors(); assert m.item_vectors() is one; m.item.weight.mul_(2); assert not torch.equal(m.item_vectors(), one)
    m.train(); opt = torch.optim.Adam(m.parameters(), .1, fused=True); m(batch_of(data))['loss'].backward()
    with torch.no_grad(): one = m.eval().item_vectors()
    m.train(); opt.step(); m.eval()
    with torch.no_grad(): assert not torch.equal(m.item_vectors(), one)
    copy.deepcopy(m); model(data)(batch_of(data)); copy.deepcopy(model(data))

@pytest.mark.parametrize('bad, said', [(dict(duplicates='zeros'), 'did you mean zero'), (dict(temporal_start='two'), 'temporal_start'),
    (dict(placeholders=2.), 'share'), (dict(d=15), 'multiple')])
def test_wrong_settings_are_one_line(data, bad, said):
    with pytest.raises(WorkbenchError, match=said): model(data, **bad)

# ---- training ----
def test_everything_learns_the_temporal_experts_too_and_it_beats_popularity(tmp_path):
    "The authors' code keeps these experts in a list, where no optimiser finds them."
    data = load_dataset('toys', source='planted', planted_users=800, planted_items=250, pictures=False); g = np.random.default_rng(0)
    kinds = data.catalogue['category'].to_list(); seen = sorted({k for k in kinds if k}); there = np.arange(data.n_items + 1) > 0
    text = np.array([[float(k == s) for s in seen] for k in kinds], np.float32) + .3*g.normal(size=(len(kinds), len(seen))).astype(np.float32); text[0] = 0
    data.features = dict(text=Feature(text, there), image=Feature(text[:, ::-1].copy(), there))
    how = dict(d=16, inner=32, max_len=20, dropout=.2, epochs=10, batch_size=512, lr=.01, out_dir=str(tmp_path), device='cpu')
    run = train_recommender(data, 'hm4sr', **how); net = load_model(run, data)
    found = {r['name']: r['value'] for r in run.frame('metrics').filter(split='test').to_dicts()}
    assert found['NDCG@10/model'] > 1.2*found['NDCG@10/popularity']
    assert 'when.v' in dict(net.named_parameters()) and 'vectors' in run.params and train_recommender(data, 'hm4sr', **how).path == run.path
    fresh = train_recommender(data, 'hm4sr', **how | dict(epochs=1, lr=1e-9)); first = load_model(fresh, data).state_dict()
    for k, p in net.named_parameters(): assert k.startswith('absent') or not torch.equal(p, first[k]), k
    assert (net.when.v - first['when.v']).abs().mean() > .01                                                            # by more than rounding
    assert rank_all(net, data).equals(run.frame('ranks').select('user', 'target', 'rank', 'rank_masked'))

def test_the_optimiser_holds_every_parameter(data):
    m = model(data); held = {id(p) for o in optimisers(m, .01).values() for g in o.param_groups for p in g['params']}
    assert held == {id(p) for p in m.parameters()}
    assert any(p is m.when.v for p in m.parameters()) and 'when.v' in m.state_dict()

def test_resumed_is_uninterrupted(data, tmp_path):
    def go(name, *epochs):
        for e in epochs:
            with open_run('hm4sr', 'toys', 0, {}, 'x', 'planted', tmp_path/name) as run:
                m = model(data, ffn_experts=2); fit(m, data, run, epochs=e, batch_size=128, lr=.01, patience=9)
        return m.state_dict()
    one, two = go('one', 3), go('two', 1, 3); assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)

def test_the_baseline_notebook_trains_it(tmp_path):
    own = dict(model='hm4sr', d=16, layers=1, max_len=10, epochs=2, batch_size=64, ffn_experts=2)
    args = dict(dataset='toys', source='planted', max_users=60, out_dir=tmp_path/'runs', **own)
    command = [str(Path(sys.executable).parent/'papermill'), 'nbs/train_baseline.ipynb', str(tmp_path/'out.ipynb')]
    command += [*(a for k, v in args.items() for a in ('-p', k, str(v)))]
    p = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300); assert p.returncode == 0, p.stderr[-3000:]
    data = load_dataset('toys', source='planted', max_users=60); add_features(data)
    run = load_run(next((tmp_path/'runs').glob('hm4sr-*')))
    assert run.finished and run.info['modalities'] == ['image', 'text'] and run.params['ffn_experts'] == 2
    names = set(run.frame('metrics').filter(split='train')['name']); assert {'main', 'idcl', 'cp', 'pcl', 'balance', 'load layer2 expert1'} <= names
    assert set(run.frame('explain/experts')['layer']) == {0, 1, 2} and any('share one learned vector' in n for n in run.info['notes'])
    assert rank_all(run.model(), data).equals(run.frame('ranks').select('user', 'target', 'rank', 'rank_masked'))
