"MISP-DPO: the loss's limits and its estimator, the choice by an autoencoder, and whole runs of recommenders with it."
import itertools, math
import numpy as np, polars as pl, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.record import load_run
from mmrec_wb.data import load_dataset
from mmrec_wb.data.batches import train_batches
from mmrec_wb.data.features import add_features
from mmrec_wb.models.sasrec import SASRec
from mmrec_wb.preference.adaptive import Extras
from mmrec_wb.preference.losses import LOSSES, MODES, dpo, effective_sample_size, gaps, misp, sdpo
from mmrec_wb.preference.negatives import by_logq, sae_pool, sae_proposal, sample, selection_frame
from mmrec_wb.preference.sae import Factors, Sae
from mmrec_wb.preference.selection import effective_support, greedy, proposal, selection_scores
from mmrec_wb.training.rodpo import MISP, PREFERENCE, Preferring, seen_before, settled, train_rodpo

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31 - 1)
def gen(seed=0): return torch.Generator().manual_seed(seed)

def batch(seed, B=4, K=3):
    return (5*torch.randn(2, B, 1 + K, generator=gen(seed), dtype=torch.float64)).unbind()

# ---- the loss ----
@quick
@given(seeds, st.floats(.01, 3.), st.integers(1, 6), st.integers(6, 10_000))
def test_limits(seed, beta, K, N):
    policy, reference = batch(seed, K=K); same, a = torch.testing.assert_close, -beta*gaps(policy, reference)
    same(misp(policy, reference, beta=beta), sdpo(policy, reference, beta=beta))
    same(misp(policy, reference, beta=beta, mode='sampled', logq=torch.full_like(a, -math.log(K))), sdpo(policy, reference, beta=beta))
    for more in ({}, dict(pool_size=N), dict(pool_size=N, clip=1.)):                           # all weights are 1: no clip touches them
        uniform = misp(policy, reference, beta=beta, mode='sampled', logq=torch.full_like(a, -math.log(N)), **more)
        same(uniform, F.softplus(a.logsumexp(1) + math.log(N/K)))
    if K == 1: same(misp(policy, reference, beta=beta), dpo(policy, reference, beta=beta))
    more = uniform - sdpo(policy, reference, beta=beta); assert (more >= -1e-9).all() and (more < math.log(N/K) + 1e-9).all()

def test_uniform_draws_are_not_sdpo_up_to_a_constant():
    policy, reference = batch(0); logq = torch.full((4, 3), -math.log(200.))
    shift = misp(policy, reference, beta=.5, mode='sampled', logq=logq) - sdpo(policy, reference, beta=.5)
    assert shift.max() - shift.min() > 1

@quick
@given(seeds, st.floats(.01, 1.), st.integers(1, 5))
def test_printed_is_the_printed_estimator(seed, beta, K):
    "beta sigma(log sum e^a) sum e^a/q (grad r_i - grad r_p), where grad r is a unit vector; and its value is that of none."
    policy, reference = batch(seed, K=K); policy, logq = policy/5, -3*torch.rand(4, K, generator=gen(seed), dtype=torch.float64); policy.requires_grad_()
    value = misp(policy, reference/5, beta=beta, mode='printed', logq=logq); value.sum().backward()
    a = -beta*gaps(policy.detach(), reference/5); pull = beta*torch.sigmoid(a.logsumexp(1))[:, None]*a.exp()/logq.exp()
    torch.testing.assert_close(policy.grad, torch.cat([-pull.sum(1, keepdim=True), pull], 1))
    torch.testing.assert_close(value.detach(), misp(policy.detach(), reference/5, beta=beta))

def test_the_clip_acts_on_the_relative_weight():
    "By hand: N 100, K 2, 1/(N q) of .02 and 1000."
    policy, reference, q = torch.tensor([[0., 1., 2.]]), torch.zeros(1, 3), torch.tensor([[.5, 1e-5]])
    e = torch.tensor([1., 2.]).mul(.5).exp(); of = lambda w: math.log1p(float((e*torch.tensor(w)).sum())*100/2)
    how = dict(beta=.5, mode='sampled', logq=q.log())
    for more, w in ((dict(pool_size=100), [.02, 10.]), (dict(pool_size=100, clip=50.), [.02, 50.]), (dict(pool_size=100, clip=0), [.02, 1000.]),
                    ({}, [.02, 1000.]), (dict(pool_size=torch.tensor([100])), [.02, 10.]), (dict(pool_size=100, clip=.01), [.01, .01])):
        assert misp(policy, reference, **how, **more).item() == pytest.approx(of(w), rel=1e-4), more
    p = policy.clone().requires_grad_(); misp(p, reference, **how | dict(mode='printed'), pool_size=100).sum().backward()
    assert p.grad[0, 2].item() == pytest.approx(.5*float(torch.sigmoid(e.sum().log())*e[1])*100*10, rel=1e-4)

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('gap', [1e4, -1e4])
@pytest.mark.parametrize('beta', [.1, .5, 10.])
@pytest.mark.parametrize('where', ['policy', 'reference', 'one of three'])
def test_extreme_gaps(mode, dtype, gap, beta, where):
    "Finite in value and gradient, and right: the same in float64."
    far = torch.tensor([[gap, 0., -gap/2, gap] if where == 'one of three' else [gap, 0., 0., 0.], [0., gap, -gap, 1.]], dtype=dtype)
    policy, reference = (far, torch.zeros_like(far)) if where != 'reference' else (torch.zeros_like(far), far)
    logq = torch.tensor([[-.1, -5., -30.], [-2., -2., 0.]], dtype=dtype)
    def run(kind, **how):
        p = policy.detach().clone().to(kind).requires_grad_(); v = misp(p, reference.to(kind), beta=beta, mode=mode, logq=logq.to(kind), **how)
        v.sum().backward(); return v.detach(), p.grad
    for how in ({}, dict(pool_size=200)):
        (value, grad), (exact, slope) = run(dtype, **how), run(torch.float64, **how)
        assert value.dtype == torch.float32 and grad.dtype == dtype and value.isfinite().all() and grad.isfinite().all()
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5); torch.testing.assert_close(grad.double(), slope, rtol=1e-2, atol=1e-5)
    ess = effective_sample_size(policy, reference, beta=beta, mode=mode, logq=logq); assert (ess >= 1 - 1e-5).all() and (ess <= 3 + 1e-5).all()

def test_the_gradient_of_sampled():
    policy, reference = batch(0); policy.requires_grad_(); logq = -4*torch.rand(4, 3, generator=gen(), dtype=torch.float64)
    for more in ({}, dict(pool_size=50, clip=2.)):
        assert torch.autograd.gradcheck(lambda p: misp(p, reference, beta=.3, mode='sampled', logq=logq, **more), policy)

def test_effective_sample_size_by_hand():
    policy, zero = torch.tensor([[0., 0., 0., 0.], [0., 50., 0., 0.], [0., math.log(2.), 0., 0.]], dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    assert effective_sample_size(policy, zero, beta=1.).tolist() == pytest.approx([3, 1, 16/6])
    logq = torch.tensor([[-1., -1., -1.]]*2 + [[math.log(.5), math.log(.25), math.log(.25)]])
    assert effective_sample_size(policy, zero, beta=1., mode='sampled', logq=logq).tolist() == pytest.approx([3, 1, 3])

def test_refusals():
    p, r = batch(0)
    for how, says in ((dict(mode='smapled'), 'did you mean sampled'), (dict(mode='sampled'), 'needs logq'), (dict(mode='printed'), 'needs logq'),
                      (dict(mode='sampled', logq=torch.zeros(4, 2)), 'fits no gaps'),
                      (dict(mode='sampled', logq=torch.zeros(4, 3), pool_size=torch.ones(7)), 'fits no gaps')):
        with pytest.raises(WorkbenchError, match=says) as e: misp(p, r, beta=1., **how)
        assert '\n' not in str(e.value)
    with pytest.raises(WorkbenchError, match='needs logq'): Extras('misp', mode='sampled')(p, r)
    assert Extras('misp').needs == set() and Extras('misp', mode='printed').needs == {'logq'}

# ---- Monte Carlo: what the estimator converges to ----
def pool_gradients(a, ids, **how):
    "Of a pool's a, by the loss of picks ids [R, K]: [R, N]."
    x = a[ids].clone().requires_grad_(); r = torch.cat([0*x[:, :1], x], 1)
    misp(r, torch.zeros_like(r), beta=1., **{k: v[ids] if k == 'logq' else v for k, v in how.items()}).sum().backward()
    return torch.zeros(len(ids), len(a), dtype=a.dtype).scatter_add_(1, ids, x.grad)

def test_sampled_converges_to_the_pool_and_greedy_does_not():
    """Seen (bias, relative to the pool's gradient): sampled .67, .43, .26, .07, .02 for K of 1, 3, 10, 100, 1000; greedy 1.03, 1.46, 1.76, .60 (no chance
    in it, so more repetitions do not help); printed 3.7 for K 3 and 570 for K 100."""
    g = gen(); a = torch.randn(200, generator=g, dtype=torch.float64) - 4; s = .5*(a + 4) + torch.randn(200, generator=g, dtype=torch.float64)
    logq = s.log_softmax(0)
    exact = pool_gradients(a, torch.arange(200)[None])[0]; p = a.softmax(0)
    torch.testing.assert_close(exact, torch.sigmoid(a.logsumexp(0))*p)                         # the paper's Lemma 4.1
    off = lambda got: float((got.mean(0) - exact).norm()/exact.norm())
    bias, noise, greedy_bias, printed = [], [], [], []
    for K in (1, 3, 10, 100, 1000):
        ids = logq.exp().multinomial(3000*K, replacement=True, generator=g).view(3000, K); got = pool_gradients(a, ids, mode='sampled', logq=logq)
        bias.append(off(got)); noise.append(float((got - exact).norm(dim=1).square().mean().sqrt()/exact.norm()))
        printed.append(off(pool_gradients(a, ids, mode='printed', logq=logq)))
        if K < 200: greedy_bias.append(off(pool_gradients(a, s.topk(K).indices[None])))
    assert bias == sorted(bias, reverse=True) and noise == sorted(noise, reverse=True) and bias[-1] < .05 and noise[-1] < .7
    assert min(greedy_bias) > .4 and all(b < .7*g for b, g in zip(bias, greedy_bias)) and printed[-1] > 100 and min(printed[1:]) > 1
    every = torch.arange(200)[None]; assert off(pool_gradients(a, every, mode='none')) < 1e-12           # all of the pool, unweighed: the pool

def test_the_sum_is_unbiased_and_its_clip_is_not():
    "The expectation of sum e^a/(K q) is the sum over the pool; with a clip it is less."
    a, s = torch.randn(200, generator=gen(1), dtype=torch.float64), torch.randn(200, generator=gen(2), dtype=torch.float64); logq = (s/.5).log_softmax(0)
    ids = logq.exp().multinomial(400_000, replacement=True, generator=gen(3)).view(-1, 4)
    x = torch.cat([torch.zeros(len(ids), 1, dtype=torch.float64), a[ids]], 1)
    of = lambda **k: misp(x, torch.zeros_like(x), beta=1., mode='sampled', logq=logq[ids], **k).expm1().mean().item()       # softplus(log S) = log(1 + S)
    assert of() == pytest.approx(a.exp().sum().item(), rel=.03) and of(pool_size=200, clip=0) == pytest.approx(of()) and of(pool_size=200, clip=2.) < .9*of()

# ---- the choice ----
@quick
@given(seeds, st.integers(1, 12), st.integers(1, 6), st.floats(0, 3))
def test_greedy_is_the_rule_one_row_at_a_time(seed, N, k, weight):
    g = gen(seed); z, s = torch.rand(3, N, 4, generator=g, dtype=torch.float64), torch.rand(3, N, generator=g, dtype=torch.float64)
    there = torch.rand(3, N, generator=g) < .7; there[:, 0] = True
    picks, diversity = greedy(s.masked_fill(~there, -torch.inf), z, there, k, weight)
    for r in range(3):
        cos = lambda i, j: float(z[r, i] @ z[r, j]/z[r, i].norm()/z[r, j].norm()); open_, S = [i for i in range(N) if there[r, i]], []
        while open_ and len(S) < k:
            worth = {i: float(s[r, i]) + (weight*min(1 - cos(i, j) for j in S) if S else 0) for i in open_}; S.append(max(open_, key=worth.get))
            open_.remove(S[-1])
        n = len(S); assert picks[r].tolist() == (S*k)[:k]
        for m in range(1, n): assert diversity[r, m].item() == pytest.approx(min(1 - cos(S[m], j) for j in S[:m]), abs=1e-9)
    assert not diversity[:, 0].any()

@quick
@given(seeds, st.integers(1, 20), st.floats(.01, 3))
def test_scores_and_proposal(seed, N, T):
    g = gen(seed); z, error = torch.randn(3, N, 4, generator=g), torch.rand(3, N, generator=g) + .01; there = torch.rand(3, N, generator=g) < .6
    there[:, 0] = True
    s, difficulty, deviation = selection_scores(z, error, there); logq = proposal(s, there, T)
    for r in range(3):
        e, v = error[r][there[r]], z[r].abs().sum(1)[there[r]]; torch.testing.assert_close(s[r][there[r]], e/e.max() + v/v.max())
        torch.testing.assert_close(logq[r][there[r]].exp(), (s[r][there[r]].double()/T).softmax(0))
    assert (s[~there] == -torch.inf).all() and (logq[~there] == -torch.inf).all() and not difficulty[~there].any() and not deviation[~there].any()
    n = effective_support(logq); assert (n >= 1 - 1e-9).all() and (n <= there.sum(1) + 1e-9).all()

def factors(n=40, kind='pairs', seed=0):
    g = gen(seed); v, t = torch.randn(n + 1, 6, generator=g), torch.randn(n + 1, 5, generator=g); v[[0, 9]] = 0; t[0] = 0; torch.manual_seed(seed)
    return Factors(Sae(6, 5 if kind == 'pairs' else 0, 12), v, t if kind == 'pairs' else None)

@pytest.mark.parametrize('kind', ['pairs', 'items'])
@pytest.mark.parametrize('mode', MODES)
def test_with_a_real_autoencoder(kind, mode):
    f, y, history = factors(kind=kind), torch.tensor([3, 9, 21]), torch.tensor([[5, 6, 0], [0, 0, 0], [1, 2, 39]])
    ids, logq = sample(None, y, history, 4, 'sae', pool=10, context=dict(sae=f, mode=mode), generator=gen()); own = torch.cat([y[:, None], history], 1)
    assert not (ids[:, :, None] == own[:, None]).any() and 9 not in ids and ids.min() > 0                 # 9 cannot be seen
    c = sae_pool(own, 10, f); near = f.similarity(y)
    for r in (0, 2):                                                                                      # the ten most similar of those that may be
        may = [i for i in range(1, 41) if i != 9 and i not in own[r]]; assert set(c['ids'][r].tolist()) == set(sorted(may, key=lambda i: -near[r, i])[:10])
    assert (logq == 0).all() == (mode == 'none')
    if mode == 'none': assert all(len(set(row)) == 4 for row in ids.tolist())
    frame = selection_frame(torch.tensor([7, 8, 9]), y, history, 4, dict(sae=f, mode=mode), pool=10, generator=gen())
    assert frame.height == 30 and frame['example'].unique().to_list() == [0, 1, 2]
    picked = frame.filter(pl.col('pick').is_not_null()).sort('example', 'pick')
    if mode == 'none': assert picked['candidate'].to_list() == ids.flatten().tolist() and picked['diversity'].null_count() == 0
    else: assert frame.group_by('example').agg(pl.col('logq').exp().sum())['logq'].to_list() == pytest.approx([1]*3, abs=1e-5)

def test_kept_proposals_are_what_is_drawn_from():
    f, y, history = factors(), torch.tensor([3, 21]), torch.tensor([[5, 6, 0], [1, 2, 39]]); own = torch.cat([y[:, None], history], 1)
    context = dict(sae=f, mode='sampled')
    ids, logq = sae_proposal(own, 10, .1, context, 3)
    fresh = sample(None, y, history, 500, 'sae', pool=10, context=context, generator=gen(1))
    for a, b in zip(by_logq(ids, logq, 500, gen(1)), fresh): torch.testing.assert_close(a, b)
    one = [sae_proposal(own[[r]], 10, .1, context, 3) for r in range(2)]                                   # whoever else is in the chunk
    torch.testing.assert_close(ids, torch.cat([i for i, _ in one])); torch.testing.assert_close(logq, torch.cat([q for _, q in one]))

def test_a_positive_without_a_picture(mode='none'):
    "Its words decide who is in the pool; there is nothing to explain: greedy takes the nearest, a draw any of the pool."
    n, g = 40, torch.Generator().manual_seed(0); v, t = torch.randn(n + 1, 8, generator=g), torch.randn(n + 1, 6, generator=g); v[0] = t[0] = 0; v[7] = 0
    f = Factors(Sae(8, 6, units=8), v, t); own = torch.tensor([[7, 3, 4], [8, 3, 4]])
    words = torch.nn.functional.normalize(t, dim=1); near = [i for i in (words[7] @ words.T).argsort(descending=True).tolist() if i not in (0, 7, 3, 4)]
    ids, _ = sae_proposal(own, 10, .1, dict(sae=f, mode='none'), 3); assert ids[0].tolist() == near[:3]
    ids, logq = sae_proposal(own, 10, .1, dict(sae=f, mode='sampled'), 3); there = logq[0].isfinite()
    assert set(ids[0][there].tolist()) == set(near[:10]) and torch.allclose(logq[0][there].exp(), torch.tensor(.1)) and logq[1][logq[1].isfinite()].std() > .01

def test_x_can_be_given():
    f, y, history = factors(), torch.tensor([3]), torch.tensor([[5, 6, 0]])
    one, other = (dict(sae=f, x=x) for x in (f.histories(history), torch.randn(1, 5, generator=gen())))
    of = lambda c: sample(None, y, history, 3, 'sae', pool=30, context=c)[0].tolist()
    assert of(dict(sae=f)) == of(one) and of(other) != of(one)

# ---- settings and runs ----
def test_settings_that_have_no_part_leave_old_runs_alone():
    for s in (dict(), dict(loss='sdpo', strategy='hard'), dict(strategy='topk_softmax'), dict(loss='none'), dict(strategy='uniform')):
        assert settled(s).keys() == PREFERENCE.keys() and settled(s | dict(misp_mode='sampled', clip=1., div_weight=9.)) == settled(s)
    assert [settled(dict(strategy=s))['pool'] for s in ('topk', 'topk_softmax', 'hard', 'sae')] == [20, 20, None, 200]
    assert [settled(dict(strategy=s))['temperature'] for s in ('topk', 'topk_softmax', 'sae')] == [None, 1., None]
    part = lambda **s: {k for k in settled(s) if k in MISP}
    assert part(loss='misp') == {'misp_mode'} and part(loss='misp', misp_mode='sampled') == {'misp_mode', 'clip'}
    assert part(strategy='sae') == {'misp_mode', 'div_weight'}
    assert part(strategy='sae', loss='misp', misp_mode='sampled') == {'misp_mode', 'clip'} and part(strategy='sae', misp_mode='sampled') == {'misp_mode'}
    for s, says in ((dict(loss='misp', misp_mode='samled'), 'did you mean sampled'), (dict(loss='misp', misp_mode='sampled', strategy='hard'), 'draws nothing'),
                    (dict(loss='misp', clip=-1.), 'clip=-1.0'), (dict(strategy='sae', div_weight=-1.), 'div_weight=-1.0'),
                    (dict(strategy='sae', pool_refresh='epoch'), 'has none')):
        with pytest.raises(WorkbenchError, match=says): settled(s)

@pytest.fixture(scope='module')
def data():
    found = load_dataset('toys', source='planted', planted_users=150, planted_items=120); add_features(found, progress=False); return found

def model(data, **s):
    torch.manual_seed(0); policy = SASRec(data, d=16, heads=1, layers=1, inner=32, dropout=0., max_len=12)
    f = factors(data.n_items); return Preferring(policy, data, settled(s), factors=f).train()

@pytest.mark.parametrize('strategy', ['uniform', 'popularity', 'in_batch', 'topk', 'topk_softmax', 'rank_window', 'sae'])
@pytest.mark.parametrize('mode', ['sampled', 'printed'])
def test_misp_weighs_the_draws_of_every_strategy(data, strategy, mode):
    "Where policy is reference all a are 0: the value follows from the probabilities alone."
    m, b = model(data, loss='misp', strategy=strategy, misp_mode=mode, negatives=3, pool=15, clip=0.), train_batches(data, 12, 200, seed=0, epoch=1)[0]
    torch.manual_seed(5); parts = m.loss(b); parts['loss'].backward(); y = b.targets[b.targets > 0]
    torch.manual_seed(5); _, logq = m.draw(m.states(b)[b.targets > 0].detach(), b, y, seen_before(data, b))
    want = torch.log1p((-logq).exp().mean(1)).mean() if mode == 'sampled' else math.log(4)
    assert float(parts['preference']) == pytest.approx(float(want), rel=1e-4)
    assert 1 <= float(parts['ess']) <= 3 and 1/3 - 1e-4 <= float(parts['weight_max']) <= 1
    assert (mode != 'none' or float(parts['weight_max']) < 1/3 + 1e-4) and all(p.grad.isfinite().all() for p in m.policy.parameters())

def test_kept_for_all_targets_or_drawn_at_every_step(data, monkeypatch):
    "The same picks either way; draws have the same probabilities."
    import mmrec_wb.training.rodpo as rodpo
    b = train_batches(data, 12, 200, seed=0, epoch=1)[0]; real = b.targets > 0; y, seen = b.targets[real], seen_before(data, b)
    for mode in ('none', 'sampled'):
        kept, fresh = (model(data, loss='misp', strategy='sae', misp_mode=mode, negatives=3, pool=15) for _ in range(2)); kept.keep_proposals()
        assert kept.proposals is not None
        def of(m): torch.manual_seed(3); return m.draw(None, b, y, seen)
        (a, p), (c, q) = of(kept), of(fresh); assert torch.equal(a, c); torch.testing.assert_close(p, q)
    monkeypatch.setattr(rodpo, 'KEEP', 10); fresh.keep_proposals(); assert fresh.proposals is None

SMALL = dict(d=16, heads=1, layers=1, inner=32, max_len=12, base_epochs=2, base_lr=.01, epochs=2, batch_size=128, device='cpu', sae_epochs=1, sae_units=16)

@pytest.mark.parametrize('more', [dict(loss='misp', negatives=3), dict(loss='misp', negatives=3, misp_mode='sampled'), dict(loss='sdpo', negatives=2), dict()],
                         ids=['greedy', 'sampled', 'sdpo', 'dpo'])
def test_a_run(data, tmp_path, more):
    run = train_rodpo(data, strategy='sae', out_dir=tmp_path, **SMALL | more); assert run.finished and run.params['sae_hash'] == run.info['sae_run'][-8:]
    assert train_rodpo(data, strategy='sae', sae_run=str(tmp_path/run.info['sae_run']), out_dir=tmp_path, **SMALL | more).path == run.path
    drawn = more.get('misp_mode') == 'sampled'; assert ('effective_support' in run.info) == drawn
    names = set(run.frame('metrics').filter(split='train')['name']); assert ({'ess', 'weight_max'} <= names) == (more.get('loss') == 'misp')
    frame = run.frame('explain/selection'); assert frame['example'].n_unique() == 8 and frame['logq'].is_null().all() == (not drawn)
    K = more.get('negatives', 1); picked = frame.filter(pl.col('pick').is_not_null())
    if not drawn: assert picked.height == 8*K
    shown = set(run.frame('items')['id']); assert set(picked['candidate']) <= shown and set(frame['positive']) <= shown
    near = frame.sort('similarity', descending=True).group_by('example').head(8); assert set(near['candidate']) <= shown
    if not drawn:                                                                             # the probe drew what the frame shows
        probe = run.frame('explain/negatives').filter(epoch=0)
        for r in picked.group_by('user', 'positive').agg('candidate').to_dicts():
            rows = probe.filter(user=r['user'], positive=r['positive'])['negative'].to_list(); assert set(r['candidate']) <= set(rows)

def test_an_autoencoder_that_is_none(data, tmp_path):
    base = train_rodpo(data, out_dir=tmp_path, **SMALL)
    with pytest.raises(WorkbenchError, match='finished run of train_sae'): train_rodpo(data, strategy='sae', sae_run=str(base.path), out_dir=tmp_path, **SMALL)
    bare = load_dataset('toys', source='planted', planted_users=150, planted_items=120, pictures=False); bare.features.clear()
    with pytest.raises(WorkbenchError, match='add_features'): train_rodpo(bare, strategy='sae', out_dir=tmp_path, **SMALL)
    with pytest.raises(WorkbenchError, match='did you mean sae_units'): train_rodpo(data, strategy='sae', sae_unit=3, out_dir=tmp_path, **SMALL)

@pytest.mark.parametrize('mode', ['none', 'sampled'])
def test_a_stopped_run_goes_on_and_ends_the_same(data, tmp_path, monkeypatch, mode):
    "Picks and pools are made again, and are the same; so are the draws."
    how = SMALL | dict(epochs=3, loss='misp', strategy='sae', negatives=2, misp_mode=mode); straight = train_rodpo(data, out_dir=tmp_path/'a', **how)
    whole = Preferring.before_epoch
    def stopped(self, epoch, run):
        if epoch == 3: raise KeyboardInterrupt
        whole(self, epoch, run)
    monkeypatch.setattr(Preferring, 'before_epoch', stopped)
    with pytest.raises(KeyboardInterrupt): train_rodpo(data, out_dir=tmp_path/'b', **how)
    monkeypatch.setattr(Preferring, 'before_epoch', whole); resumed = train_rodpo(data, out_dir=tmp_path/'b', **how)
    assert resumed.finished and (straight.path/'model.safetensors').read_bytes() == (resumed.path/'model.safetensors').read_bytes()
    assert all(straight.frame(f).equals(resumed.frame(f)) for f in ('ranks', 'explain/negatives', 'explain/selection', 'explain/drift'))
