"What the doc-tests of DuAF-MAT cannot hold: every combination of settings, leaks in training, determinism, resuming, the notebook as a whole."
import json, math, subprocess, sys
from dataclasses import replace
from pathlib import Path
import nbformat, numpy as np, polars as pl, pytest, torch
import torch.nn.functional as F
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run, open_run
from mmrec_wb.data import Feature, load_dataset
from mmrec_wb.data.batches import eval_batches, train_batches
from mmrec_wb.data.features import add_features
from mmrec_wb.models import duaf_mat, explain
from mmrec_wb.models.base import catalogue_ce
from mmrec_wb.models.contrastive import Neighbours, insertion_probabilities, virtual_sequences
from mmrec_wb.models.duaf_mat import DuAFMAT
from mmrec_wb.models.fusion import FUSIONS, DualAwareFusion, masked_softmax
from mmrec_wb.models.generation import Discriminator, MoEGenerator, critic_loss, gradient_penalty
from mmrec_wb.training.fit import fit
from mmrec_wb.training.ranking import rank_all

ROOT = project_root()
TINY = dict(d=16, inner=32, max_len=20)

def small_shop():
    "Small vectors instead of the encoders': quick, and the neighbour tables too."
    data, g = load_dataset('toys', source='planted', planted_users=60, planted_items=60), np.random.default_rng(0)
    there = np.array([p is not None for p in data.catalogue['image']])
    text = g.normal(size=(data.n_items + 1, 12)).astype(np.float32); text[0] = 0
    image = (g.normal(size=(data.n_items + 1, 20)) + 3).astype(np.float32); image[~there] = 0
    data.features = dict(text=Feature(text, np.arange(data.n_items + 1) > 0), image=Feature(image, there))
    return data

@pytest.fixture(scope='module')
def data(): return small_shop()

def model(data, **settings): torch.manual_seed(0); return DuAFMAT(data, **(TINY | settings))
def rows(data, least=6): [b] = eval_batches(data, 'test', 20); return b.map(lambda x: x[b.lengths >= least])
def flat(out): return torch.cat([v.flatten() for v in out])

# ---- every combination ----
@pytest.mark.parametrize('cand', ['mean', 'id', 'user'])
@pytest.mark.parametrize('main_loss', ['ce', 'bce_full', 'bce_sampled'])
def test_each_candidate_rule_with_each_loss(data, cand, main_loss):
    m = model(data, cand=cand, main_loss=main_loss, lambda_1=0., lambda_2=0., dropout=0., ablation='mat_moe'); batch = train_batches(data, 20, 128, 0, 0)[0]
    parts = m(batch); parts['loss'].backward(); assert set(parts) == {'loss', 'main'} and all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())
    assert m.item.weight.grad.abs().sum() > 0 and (m.frozen['text'].W.weight.grad.abs().sum() > 0)
    h, real = m.states(batch), batch.targets > 0; h, y = h[real], batch.targets[real] - 1; t = m.table(); x, there = t.x[1:], t.there[1:, :, None]
    if cand == 'mean': z = h @ ((x*there).sum(1)/there.sum(1)).T
    if cand == 'id': z = h @ m.item.weight[1:].T
    if cand == 'user':                                                                                # sum_m a_m s.x_m, a = softmax_m s.tanh(x_m)
        a = torch.einsum('nd,imd->nim', h, x.tanh()).masked_fill(~there[..., 0], -torch.inf).softmax(-1); z = (a*torch.einsum('nd,imd->nim', h, x)).sum(-1)
    one = F.one_hot(y, z.shape[1]).float()
    if main_loss == 'bce_sampled':
        two = z.gather(1, torch.stack([y, m._negatives - 1], 1))
        whole = F.binary_cross_entropy_with_logits(two, torch.tensor([1., 0.]).expand_as(two))*2
    else: whole = F.cross_entropy(z, y) if main_loss == 'ce' else F.binary_cross_entropy_with_logits(z, one, reduction='sum')/len(y)
    torch.testing.assert_close(parts['main'], whole.detach())

@pytest.mark.parametrize('how', [dict(fusion=f) for f in FUSIONS] + [dict(s0='id'), dict(s0='user'), dict(refine_steps=3), dict(detach_s0=True),
    dict(structural=True), dict(gan='wgan-gp'), dict(gan='printed'), dict(disc='paper'), dict(gen_from_main=False),
    dict(cscl_form='printed', vscl_form='printed'), dict(cscl_form='symmetric'), dict(visual_dropout_p=.5),
    dict(visual_missing_rate=1.), *(dict(visual_fill=f) for f in duaf_mat.FILLS), *(dict(ablation=a) for a in duaf_mat.ABLATIONS)])
def test_a_step_with_every_setting(data, how):
    m = model(data, **how); batch = train_batches(data, 20, 128, 0, 0)[0]
    for player in m.players(): m(batch, player)['loss'].backward()
    parts = m(batch); parts['loss'].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters()) and parts['loss'].isfinite()
    with torch.no_grad(): z = m.eval().scores(m.user_state(rows(data)))
    assert z.shape == (len(rows(data)), data.n_items + 1) and (z[:, 0] == -torch.inf).all() and z[:, 1:].isfinite().all()

def test_the_loss_is_the_sum_of_its_parts(data):
    m, batch = model(data, lambda_1=.7, lambda_2=.3, dropout=0.), train_batches(data, 20, 128, 0, 0)[0]
    parts = m(batch); torch.testing.assert_close(parts['loss'].detach(), parts['main'] + .7*parts['cscl'] + .3*parts['vscl'])

def test_pictures_made_in_parts_are_those_made_at_once(data, monkeypatch):
    "Values and gradients; large catalogues are made a few thousand items at a time."
    found = []
    for rows_ in (8192, 7):
        monkeypatch.setattr(duaf_mat, 'ROWS', rows_); m = model(data, lambda_1=0., lambda_2=0., dropout=0., visual_missing_rate=.3)
        batch = train_batches(data, 20, 128, 0, 0)[0]
        torch.manual_seed(1); parts = m(batch); parts['loss'].backward(); found.append([parts['loss'].detach()] + [p.grad for p in m.parameters()])
    assert sum(g is not None for g in found[0]) > 20 and any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.G.parameters())
    for a, b in zip(*found): assert (a is None) == (b is None); a is None or torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)

def test_without_its_parts_it_is_mean_fusion_before_sasrecs_encoder(data):
    m, batch = model(data, ablation='duaf', visual_fill='none', lambda_1=0., lambda_2=0., dropout=0.), train_batches(data, 20, 128, 0, 0)[0]
    x, there = [f(None) for f in (lambda _: m.item.weight, m.frozen['text'], m.frozen['image'])], m.table().there
    v = sum(x_m*there[:, k, None] for k, x_m in enumerate(x))/there.sum(1, keepdim=True)
    s = m.encoder(v[batch.items] + m.position.weight[:batch.items.shape[1]]); real = batch.targets > 0
    torch.testing.assert_close(m(batch)['loss'], catalogue_ce(s[real], v, batch.targets[real]), rtol=1e-4, atol=1e-5)

# ---- fusion ----
def test_the_weights_of_what_is_alone_alike_and_absent():
    torch.manual_seed(0); fuse, s, e, gaps = DualAwareFusion(8), 5*torch.randn(2, 3, 8), torch.randn(2, 3, 4, 8), 1e6*torch.rand(2, 3)
    all_there = torch.ones(2, 3, 4, dtype=torch.bool)
    same = e[:, :, :1].expand_as(e); torch.testing.assert_close(fuse(s, same, all_there, gaps, gaps/86400)[1], torch.full((2, 3, 4), .25))
    for k in range(4):
        h, w = fuse(s, e, all_there & (torch.arange(4) == k), gaps, gaps/86400)
        torch.testing.assert_close(h, e[:, :, k]); assert (w[..., k] == 1).all()
    order = torch.tensor([2, 0, 3, 1]); h, w = fuse(s, e, all_there, gaps, gaps/86400)
    h2, w2 = fuse(s, e[:, :, order], all_there, gaps, gaps/86400)
    torch.testing.assert_close(h2, h); torch.testing.assert_close(w2, w[..., order])  # their order is free
    three = all_there.clone(); three[..., 3] = False; w3 = fuse(s, e, three, gaps, gaps/86400)[1]
    torch.testing.assert_close(w3[..., :3], w[..., :3]/w[..., :3].sum(-1, keepdim=True))                                 # the ratios among the others stay
    assert torch.equal(masked_softmax(torch.tensor([1e4, -1e4, 0.]), torch.tensor([False, True, False])), torch.tensor([0., 1., 0.]))
    fuse(s, e, three, gaps, gaps/86400)[0].sum().backward(); assert all(p.grad.isfinite().all() and p.grad.any() for p in fuse.time.parameters())

# ---- the leak rule ----
@pytest.mark.parametrize('how', [dict(), dict(fusion='user'), dict(s0='id'), dict(s0='user'), dict(refine_steps=2), dict(cand='user'),
    dict(structural=True), dict(s_at='before')])
def test_a_later_item_or_time_moves_nothing_before_it(data, how):
    m, b = model(data, lambda_2=0., **how).eval(), rows(data)
    with torch.no_grad():
        for t in (1, 3, 5):
            items, times = b.items.clone(), b.times.clone(); items[:, t] = items[:, t] % data.n_items + 1; times[:, t] += 10**7
            for changed in (replace(b, items=items), replace(b, times=times), replace(b, items=items, times=times)):
                torch.testing.assert_close(m.scores(m.states(changed))[:, :t, 1:], m.scores(m.states(b))[:, :t, 1:])
            assert (m.states(replace(b, times=times)) - m.states(b))[:, t].abs().max() > 1e-6 or how.get('fusion') == 'user'

def test_no_gradient_flows_from_a_position_to_what_comes_later(data):
    m, b = model(data, dropout=0., lambda_2=0.), rows(data)
    table = m.table(); x, own = table.x[b.items].detach().requires_grad_(), torch.arange(b.items.numel()).view_as(b.items)
    class Here: # every place has vectors of its own
        row = staticmethod(lambda items: own); there = table.there[b.items].flatten(0, 1)
    Here.x = x.flatten(0, 1); s, _, _ = m._encode(b, Here); (s[:, 3]*torch.randn(16)).sum().backward()
    assert x.grad[:, :4].abs().sum() > 0 and not x.grad[:, 4:].any()

def test_contrastive_states_know_no_target(data, monkeypatch):
    "Another target moves no state of words, pictures or virtual sequences (drawn alike); what these leave out is seen below."
    seen, real = {}, duaf_mat.virtual_sequences
    def watch(name): return lambda a, b, *_: seen.setdefault(name, []).append((a.detach(), b.detach())) or a.sum()*0
    for name in ('cscl', 'vscl'): monkeypatch.setattr(duaf_mat, name, watch(name))
    drawn = lambda *a: real(*a, rate=.6, generator=torch.Generator().manual_seed(0)); longer = []
    monkeypatch.setattr(duaf_mat, 'virtual_sequences', lambda *a: longer.append(drawn(*a)) or longer[-1])
    m, b = model(data, dropout=0., ablation='mat_moe'), rows(data); b = replace(b, targets=torch.where(b.targets > 0, b.targets, 1)*b.mask)
    m(b); before = seen; seen = {}; m(replace(b, targets=b.targets.flip(0)*0 + b.mask*7))
    assert len(seen['cscl']) == 1 and len(seen['vscl']) == 2 and (longer[0] > 0).sum() > b.mask.sum()         # words and pictures; something was inserted
    for name in seen: torch.testing.assert_close(seen[name], before[name], msg=name)

def padding_changes_no_score(m, data):
    m.eval(); [b] = eval_batches(data, 'test', 20)
    with torch.no_grad():
        together = m.scores(m.user_state(b))
        for i in range(0, len(b), 9):
            n = b.lengths[i]; alone = b.map(lambda x: x[i:i + 1] if x.ndim == 1 else x[i:i + 1, :n])
            torch.testing.assert_close(m.scores(m.user_state(alone))[0], together[i], rtol=1e-4, atol=1e-5)

def test_padding_changes_no_score(data): padding_changes_no_score(model(data), data)

# ---- generation ----
def test_evaluation_is_deterministic_and_the_same_for_any_candidates(data):
    m, b = model(data, cand='mean').eval(), rows(data)
    with torch.no_grad():
        torch.manual_seed(1); one = m.scores(m.user_state(b)); m._cached = None; torch.manual_seed(2); assert torch.equal(m.scores(m.user_state(b)), one)
        some = torch.tensor([3, 9, 1]); torch.testing.assert_close(m.scores(m.user_state(b), some), one[:, some]); few = torch.tensor([1, 3, 9])
        torch.testing.assert_close(m.table(few).x, m.table().x[few])                                  # a table of few items holds what the whole one holds
        u = model(data, cand='user').eval(); z, some = u.scores(u.user_state(b)), b.items[:, :5]
        torch.testing.assert_close(u.scores(u.user_state(b), some), z.gather(1, some))
        torch.testing.assert_close(u.scores(u.states(b), torch.tensor([5, 2])), u.scores(u.states(b))[..., [5, 2]])

def test_the_kept_table_is_never_an_old_one(data):
    m, b = model(data, lambda_2=0.).eval(), rows(data); scores = lambda: torch.no_grad()(lambda: m.eval().scores(m.user_state(b)))()
    with torch.no_grad():                                                                             # changed by hand, in evaluation mode
        one = m.scores(m.user_state(b)); m.item.weight.mul_(2); assert not torch.equal(m.scores(m.user_state(b)), one)
    m.train(); one, opt = scores(), torch.optim.Adam(m.parameters(), .1, fused=True)
    m.train()(train_batches(data, 20, 128, 0, 0)[0])['loss'].backward(); opt.step()
    assert m.item.weight._version < 9 and not torch.equal(scores(), one)                              # a fused step leaves `_version` as it was

def test_withheld_pictures_are_the_same_for_a_seed_and_grow_with_the_rate(data):
    has = lambda rate, seed=0: model(data, visual_missing_rate=rate, seed=seed, lambda_2=0.).frozen['image'].has
    assert torch.equal(has(.3), has(.3)) and not torch.equal(has(.3), has(.3, 1)) and (has(.6) <= has(.3)).all() and (has(.3) <= has(0.)).all()
    assert model(data, visual_missing_rate=1.).names == ['id', 'text'] and abs(has(.5).sum()/has(0.).sum() - .5) < .25

def test_no_withheld_picture_is_read(data):
    m = model(data, visual_missing_rate=.5).eval(); hidden = data.features['image'].present & ~m.frozen['image'].has.numpy()
    values = data.features['image'].values.copy(); values[hidden] = 1e3
    other = replace(data, features=dict(data.features, image=Feature(values, data.features['image'].present)))
    n = model(other, visual_missing_rate=.5).eval(); torch.testing.assert_close(n.near['image'].vectors, m.near['image'].vectors)
    with torch.no_grad(): torch.testing.assert_close(n.table().x, m.table().x)

def test_dropped_pictures_come_back_in_evaluation(data):
    m = model(data, visual_dropout_p=.9, visual_fill='zero', lambda_2=0.); has = m.frozen['image'].has
    zero = lambda: (m.table().x[:, 2] == 0).all(1)
    assert zero()[has].float().mean() > .6 and not torch.equal(zero(), zero())
    m.eval(); assert torch.equal(zero(), ~has)

def test_fills(data):
    def look(f): m = model(data, visual_fill=f, lambda_2=0.).eval(); t = m.table(); return t.x[:, 2], t.there[:, 2], ~m.frozen['image'].has
    lacking = {f: look(f) for f in duaf_mat.FILLS}
    x, there, no = lacking['none']; assert torch.equal(there, ~no)
    x, there, no = lacking['zero']; assert there.all() and not x[no].any()
    x, there, no = lacking['mean']; torch.testing.assert_close(x[no][0], x[~no].mean(0), rtol=1e-4, atol=1e-5); assert (x[no] == x[no][0]).all()
    x, there, no = lacking['random']; assert abs(x[no].std() - .02) < .005
    x, there, no = lacking['generated']; assert there.all() and x[no].std(0).min() > 0
    assert all(torch.equal(lacking[f][0][~no], lacking['zero'][0][~no]) for f in duaf_mat.FILLS)                         # present pictures are themselves

def test_the_players_leave_projections_alone_and_the_main_loss_reaches_the_generator(data):
    m, batch = model(data, dropout=0.), train_batches(data, 20, 128, 0, 0)[0]
    for player in ('critic', 'generator'):
        m.zero_grad(); m(batch, player)['loss'].backward(); assert m.frozen['text'].W.weight.grad is None and m.frozen['image'].W.weight.grad is None
    m.zero_grad(); m(batch)['loss'].backward(); assert m.G.out.weight.grad.abs().sum() > 0 and m.D.W_4.weight.grad is None
    m = model(data, gen_from_main=False); m(batch)['loss'].backward(); assert m.G.out.weight.grad is None
    with pytest.raises(WorkbenchError, match='unknown player'): m(batch, 'critik')

def test_gradient_penalty_of_one_item_of_none_and_its_second_derivative():
    torch.manual_seed(0); D, x = Discriminator(4), torch.randn(3, 4)
    gradient_penalty(D, x, x + 1, x - 1).backward(); assert D.W_3.weight.grad.abs().sum() > 0
    out = critic_loss(D, x, x, x + 1, torch.tensor([False, False, True])); assert out['loss'].isfinite() and out['gp'] > 0
    assert critic_loss(D, x, x, x, torch.zeros(3, dtype=torch.bool), 'wgan-gp')['gp'] == 0

# ---- contrast ----
def test_insertions_of_random_shops_keep_order_and_never_add_what_is_owned():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed); n, B, L = 40, 6, 9
        v = F.normalize(torch.randn(n + 1, 5, generator=g), dim=-1); v[0] = 0; v[torch.rand(n + 1, generator=g) < .3] = 0
        best = (v @ v.T).masked_fill(~v.any(1), -2.).fill_diagonal_(-2).topk(6, 1)
        near = Neighbours(best.indices.where((best.values > -2) & v.any(1, keepdim=True), 0), v)
        items = torch.stack([torch.randperm(n, generator=g)[:L] + 1 for _ in range(B)])*(torch.arange(L) < torch.randint(1, L + 1, (B, 1), generator=g))
        owned = torch.randint(1, n + 1, (B, 2), generator=g); out = virtual_sequences(items, near, 18, owned, rate=.6, generator=g)
        assert out.shape[1] <= 18
        assert ((out > 0).int().diff(dim=1) <= 0).all()                                               # padding stays right
        for a, b, own in zip(items.tolist(), out.tolist(), owned.tolist()):
            a, b = [i for i in a if i], [i for i in b if i]; new = [i for i in b if i not in a]
            assert [i for i in b if i in a] == a and not set(new) & set(own) and b[0] == a[0] and b[-1] == a[-1] and all(v[i].any() for i in new)

def test_full_windows_are_lengthened_too_and_lose_their_oldest_items():
    g = torch.Generator().manual_seed(0); n, L = 40, 12; v = F.normalize(torch.randn(n + 1, 5, generator=g), dim=-1); v[0] = 0
    near, changed = Neighbours((v @ v.T).fill_diagonal_(-2).topk(9, 1).indices, v), 0
    for _ in range(20):
        items = torch.stack([torch.randperm(n, generator=g)[:L] + 1 for _ in range(4)]); out = virtual_sequences(items, near, L, rate=.3, generator=g)
        assert out.shape == (4, L)
        for a, b in zip(items.tolist(), out.tolist()):
            old = [i for i in b if i in a]; new = L - len(old); changed += new > 0
            assert old == a[-len(old):] and b[-1] == a[-1] and new <= math.ceil(.6*L)                 # the newest ones, in order
    assert changed > 60                                                                              # of 80

def test_what_a_person_owns_outside_of_the_window_is_not_inserted_either(data, monkeypatch):
    def watch(items, near, max_len, owned, **how):
        for _ in range(20):
            out = virtual_sequences(items, near, max_len, owned, rate=.6)
            for a, b, user in zip(items.tolist(), out.tolist(), users): added.append([i for i in b if i and i not in a]); assert not set(added[-1]) & owns[user]
        return out
    owns, added = [set(data.sequence(u)[0][:-2].tolist()) for u in range(data.n_users)], []; monkeypatch.setattr(duaf_mat, 'virtual_sequences', watch)
    m = model(data, max_len=4)
    for b in train_batches(data, 4, 64, 0, 1): users = b.user.tolist(); m(b)
    assert sum(map(len, added)) > 100 and max(map(len, owns)) > 10                                   # there was something to avoid

def test_insertions_follow_eq_20():
    v = F.normalize(torch.tensor([[0., 0.], [1, 0], [0, 1], [1, .2], [.2, 1], [1, 1]]), dim=-1); near = Neighbours(torch.tensor([[0, 0, 0]] + [[3, 4, 5]]*5), v)
    cand, p = insertion_probabilities(torch.tensor([1]), torch.tensor([2]), torch.tensor([[1, 2]]), near, gamma=.25, temperature=.3)
    wanted = ((.25*v[1] @ v[3:].T + .75*v[2] @ v[3:].T)/.3).softmax(0); torch.testing.assert_close(p[0, :3], wanted); assert not p[0, 3:].any()
    g = torch.Generator().manual_seed(0); how = dict(rate=5., gamma=.25, temperature=.3, generator=g)
    drawn = [virtual_sequences(torch.tensor([[1, 2]]), near, 9, **how) for _ in range(400)]
    found = torch.tensor([d[0, 1].item() for d in drawn if d.shape[1] == 3]); assert len(found) > 300
    torch.testing.assert_close(torch.stack([(found == j).float().mean() for j in (3, 4, 5)]), wanted, atol=.08, rtol=0)

# ---- data without something ----
@pytest.mark.parametrize('kept, off', [(['text'], 'CSCL'), (['image'], 'CSCL'), ([], 'VSCL runs on nothing')])
def test_without_a_modality(data, kept, off):
    other = replace(data, features={m: data.features[m] for m in kept}); m = model(other)
    assert m.names == ['id', *kept] and m.players() == {} and any(off in note for note in m.notes)
    assert set(m(train_batches(data, 20, 128, 0, 0)[0])) <= {'loss', 'main', 'vscl'}
    frames = m.eval().explanations(other); assert set(frames['fusion']['modality'].unique()) == {'id', *kept}

def test_missing_texts_are_masked(data):
    f = data.features['text']; some = f.present.copy(); some[5:30] = False; values = f.values*some[:, None]
    m = model(replace(data, features=dict(data.features, text=Feature(values, some)))).eval(); table = m.table()
    assert not table.there[5:30, 1].any() and torch.equal(table.x[5, 1], m.no_text) and table.there[30:, 1].all()

def test_one_picture_or_many_alike_have_no_size(data):
    f = data.features['image']; first = np.flatnonzero(f.present)[0]; one = np.arange(len(f.present)) == first
    for present, values in ((one, f.values), (f.present, np.where(f.present[:, None], f.values[first], 0))):
        m = model(replace(data, features=dict(data.features, image=Feature(values, present))), lambda_2=0.)
        assert m.frozen['image'].scale == 1 and m.table().x.abs().max() < 1 and m(train_batches(data, 20, 128, 0, 0)[0])['main'] < 6

def test_guesses_are_those_of_whole_tables(data):
    "Category means, nearest texts and the oracle's mean are made without a table of withheld by present pictures: here they are made with it."
    from mmrec_wb.data.planted import CATEGORIES, COLOURS, LOOKS_FROM_WORDS, SHAPES, THEMES
    m = model(data, visual_missing_rate=.4).eval(); own = m.frozen['image'].has.nonzero()[:, 0]; items = (~m.frozen['image'].has).nonzero()[1:, 0]
    with torch.no_grad(): x_own = m.frozen['image'](own); x_true = torch.randn(len(items), 16); found = explain._guesses(m, data, items, x_own, own, x_true)
    kind = np.array(data.catalogue['category'].fill_null('').to_list()); ids = torch.cat([own, items]).numpy(); x = torch.cat([x_own, x_true])
    same = torch.from_numpy(kind[items][:, None] == kind[own][None]).float(); n = same.sum(1, keepdim=True)
    torch.testing.assert_close(found['category_mean'], torch.where(n > 0, same @ x_own/n.clamp_min(1), x_own.mean(0)), rtol=1e-4, atol=1e-6)
    text = data.features['text'].values - data.features['text'].values[own].mean(0); unit = text/np.linalg.norm(text, axis=1, keepdims=True)
    torch.testing.assert_close(found['text_nearest'], x_own[(unit[items] @ unit[own].T).argmax(1)])
    truth = {r['asin']: r for r in data.truth['items'].to_dicts()}; rows = [truth[data.catalogue['raw_id'][int(i)]] for i in ids]
    place = lambda names, r, f: list(names).index(r[f]); alike = [(r['colour'], r['shape']) for r in rows]
    likely = lambda cause, effect, n: (1 - LOOKS_FROM_WORDS)/n + LOOKS_FROM_WORDS*(cause % n == effect)
    w = np.array([[likely(place(THEMES, a, 'theme'), place(COLOURS, b, 'colour'), len(COLOURS))*likely(place(CATEGORIES, a, 'category'),
        place(SHAPES, b, 'shape'), len(SHAPES))/alike.count((b['colour'], b['shape']))*(a is not b) for b in rows] for a in rows])
    torch.testing.assert_close(found['oracle'], torch.from_numpy(w/w.sum(1, keepdims=True)).float()[len(own):] @ x, rtol=1e-4, atol=1e-6)

# ---- training ----
@pytest.mark.parametrize('how', [dict(), dict(gan='wgan-gp'), dict(cand='user'), dict(main_loss='bce_sampled'), dict(cscl_form='printed', vscl_form='printed')])
def test_a_step_in_mixed_precision(data, how):
    m, batch = model(data, **how), train_batches(data, 20, 128, 0, 0)[0]
    for player in (*m.players(), None):
        torch.manual_seed(3); whole = m(batch, player)['loss'].detach(); torch.manual_seed(3)
        with torch.autocast('cpu', torch.bfloat16): loss = m(batch, player)['loss']
        loss.backward(); assert abs(loss.detach() - whole) < .03*abs(whole) + .03
    assert m.size.dtype == m.accept.dtype == torch.float32 and all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())

def contrast_of_a_share(rank, world, folder):
    "One of `world` processes: its rows of a batch; gradients as DistributedDataParallel averages them."
    import torch.distributed as dist
    if world > 1: dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    data = small_shop(); m, b = model(data, dropout=0., ablation='mat_moe'), rows(data, 9); b = b.map(lambda x: x[rank::world])
    table = m.table(); parts = m._contrast(b, table, m._encode(b, table)[2], dict.fromkeys(m.contrasted, b.items.where(b.items > 1, 2*b.mask)))
    sum(parts.values()).backward(); grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
    if world > 1: [dist.all_reduce(g) for g in grads.values()]
    if rank == 0: torch.save(dict(rows=len(b), **{k: v.detach() for k, v in parts.items()}, **{n: g/world for n, g in grads.items()}), f'{folder}/{world}.pt')

def test_two_processes_contrast_with_the_batch_of_both(tmp_path):
    "An odd number of rows, so that the shares differ: losses and gradients are those of one process."
    for world in (1, 2): torch.multiprocessing.spawn(contrast_of_a_share, (world, str(tmp_path)), nprocs=world)
    one, two = (torch.load(tmp_path/f'{n}.pt', weights_only=True) for n in (1, 2)); n, mine = one.pop('rows'), two.pop('rows')
    assert n % 2 and mine == n//2 + 1 and one.keys() == two.keys() and len(one) > 20
    for k in one: torch.testing.assert_close(two[k], one[k], rtol=1e-4, atol=1e-6, msg=k)

def test_resumed_is_uninterrupted(data, tmp_path):
    def go(name, *epochs):
        for e in epochs:
            with open_run('duaf_mat', 'toys', 0, {}, 'x', 'planted', tmp_path/name) as run:
                m = model(data, draws=2); fit(m, data, run, epochs=e, batch_size=128, lr=.01, patience=9)
        return m.state_dict()
    one, two = go('one', 3), go('two', 1, 3); assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)

def papermill(tmp, **params):
    out, args = tmp/'out.ipynb', [a for k, v in {'out_dir': tmp/'runs', **params}.items() for a in ('-p', k, str(v))]
    command = [str(Path(sys.executable).parent/'papermill'), 'nbs/train_duaf_mat.ipynb', str(out), *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300), out

def test_the_notebook(tmp_path):
    small = dict(dataset='toys', source='planted', max_users=60, epochs=2, batch_size=256, d=16, inner=32, device='cpu')
    p, out = papermill(tmp_path, **small); assert p.returncode == 0, p.stderr[-3000:]
    shown = [o for c in nbformat.read(out, 4).cells if c.cell_type == 'code' for o in c.outputs if 'application/vnd.plotly.v1+json' in o.get('data', {})]
    assert len(shown) == 8 and all('planted' in json.dumps(f['data']['application/vnd.plotly.v1+json']['layout']) for f in shown)
    run = load_run(next((tmp_path/'runs').glob('duaf_mat-*'))); assert run.finished and run.frame('ranks').height == 60
    assert {'critic loss', 'generator loss', 'cscl', 'vscl', 'main', 'loss'} <= set(run.frame('metrics').filter(split='train')['name'])
    fusion = run.frame('explain/fusion'); assert fusion['text_attention'].null_count() == 0 and set(fusion['modality'].unique()) == {'id', 'text', 'image'}
    assert set(run.frame('explain/generated')['method'].unique()) == {'generated', 'mean', 'category_mean', 'text_nearest', 'oracle'}
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/'runs').rglob('*') if f.is_file()}
    assert papermill(tmp_path, **small)[0].returncode == 0 and before == {f: f.stat().st_mtime_ns for f in (tmp_path/'runs').rglob('*') if f.is_file()}

def test_the_notebook_stops_at_nonsense(tmp_path):
    p, _ = papermill(tmp_path, source='planted', ablation='moe')
    assert p.returncode == 1 and 'unknown value of ablation' in p.stderr and not (tmp_path/'runs').exists()
