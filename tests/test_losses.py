"Every preference loss against its formula, its limits, extreme values and TRL; what the losses need; and whole runs of the MLLM with each."
import itertools, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.preference.adaptive import Extras, kept
from mmrec_wb.preference.hardness import adaptive_beta
from mmrec_wb.preference.losses import DEFAULTS, DIFFERENCES_ONLY, LOSSES, against_margin, dpo, gaps, get_loss, hanorec

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31 - 1)
every = pytest.mark.parametrize('name', LOSSES)

def batch(seed, B=4, K=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (5*torch.randn(2, B, 1 + K, generator=g, dtype=torch.float64)).to(dtype).unbind()

def keywords(name, B=4, K=3, seed=0, dtype=torch.float64):
    "What a loss takes besides beta."
    g = torch.Generator().manual_seed(seed); of = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype)
    lengths = torch.randint(1, 9, (B, 1 + K), generator=g)
    return dict(cdpo=dict(eps=.1), robust=dict(eps=.1), ipo=dict(lengths=lengths), simpo=dict(gamma=1., lengths=lengths), hanorec=dict(eps=.05),
        kto=dict(z=.3, desirable=1.2, undesirable=.7), rosepo=dict(eps=of(B, K)), beta_dpo=dict(keep=of(B) < .7),
        mdpo=dict(uncond=(-5*of(B), -5*of(B)), anchor=.2)).get(name, {})

def by_hand(name, policy, reference, beta, **k):
    "The formulas of ALGORITHMS.md, section 5, once more, one example and pair at a time."
    nll, s, out = lambda z: np.logaddexp(0, -z), lambda z: 1/(1 + np.exp(-z)), []
    for b, (p, r) in enumerate(zip(policy.tolist(), reference.tolist())):
        p, r = np.array(p), np.array(r); x = p - r; D = x[0] - x[1:]; eps = k.get('eps', 0.); eps = eps[b].numpy() if torch.is_tensor(eps) else eps
        if name in ('dpo', 'beta_dpo'): v = nll(beta*D).mean()
        elif name in ('cdpo', 'rosepo', 'hanorec'): v = ((1 - eps)*nll(beta*D) + eps*nll(-beta*D)).mean()
        elif name == 'robust': v = ((1 - eps)*nll(beta*D) - eps*nll(-beta*D)).mean()/(1 - 2*eps)
        elif name == 'hinge': v = np.maximum(0, 1 - beta*D).mean()
        elif name == 'ipo': y = x/k['lengths'][b].numpy(); v = ((y[0] - y[1:] - 1/(2*beta))**2).mean()
        elif name == 'simpo': y = p/k['lengths'][b].numpy(); v = nll(beta*(y[0] - y[1:]) - k['gamma']).mean()
        elif name == 'kto': v = np.mean([k['desirable']*(1 - s(beta*(x[0] - k['z']))), *k['undesirable']*(1 - s(beta*(k['z'] - x[1:])))])
        elif name in ('sdpo', 'misp'): v = nll(-np.log(np.exp(-beta*D).sum()))
        elif name == 'dmpo': v = nll(beta*x[0] - beta*x[1:].mean())
        elif name == 'mdpo':
            u = k['uncond'][0][b].item() - k['uncond'][1][b].item()
            v = nll(beta*D).mean() + nll(beta*(x[0] - u)) + nll(beta*x[0] - k['anchor'])
        if name == 'beta_dpo': v = v*k['keep'][b].item()/k['keep'].double().mean().item()
        out.append(v)
    return torch.tensor(out, dtype=torch.float64)

@every
@quick
@given(seeds, st.floats(.01, 2.), st.integers(1, 5))
def test_the_formula(name, seed, beta, K):
    policy, reference = batch(seed, K=K); k = keywords(name, K=K, seed=seed)
    if name == 'beta_dpo' and not k['keep'].any(): k['keep'][0] = True
    torch.testing.assert_close(LOSSES[name](policy, reference, beta=beta, **k), by_hand(name, policy, reference, beta, **k))

pair, many = ([[-4., -6.]], [[-5., -5.5]]), ([[-4., -6., -5., -7.]], [[-5., -5.5, -5.2, -6.]])
GOLDEN = [('dpo', pair, {}, .620957), ('cdpo', pair, dict(eps=.1), .635957), ('robust', pair, dict(eps=.1), .602207), ('hinge', pair, {}, .85),
    ('ipo', pair, dict(lengths=torch.tensor([[4, 6]])), 21.7778), ('ipo', pair, {}, 12.25), ('rosepo', pair, dict(eps=torch.tensor([[.1]])), .635957),
    ('simpo', pair, dict(beta=2., gamma=1., lengths=torch.tensor([[4, 6]])), 1.313262), ('kto', pair, dict(z=.2), (.480011 + .482507)/2),
    ('sdpo', many, {}, 1.281643), ('misp', many, {}, 1.281643), ('dmpo', many, {}, .624046),
    ('mdpo', pair, dict(uncond=(torch.tensor([-4.5]), torch.tensor([-5.1]))), 1.938701),
    ('hanorec', pair, dict(eps=.1), .635957), ('beta_dpo', pair, {}, .620957)]

@pytest.mark.parametrize('name, numbers, how, value', GOLDEN)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_golden_values(name, numbers, how, value, dtype):
    policy, reference = (torch.tensor(x, dtype=dtype) for x in numbers)
    if dtype == torch.bfloat16 and numbers is many: reference[0, 2] = -5.1875     # -5.2 is no number of bfloat16
    assert LOSSES[name](policy, reference, **dict(beta=.1) | how).item() == pytest.approx(value, rel=1e-3 if dtype == torch.bfloat16 else 3e-6)

@quick
@given(seeds, st.floats(.01, 5.), st.integers(1, 5))
def test_limits(seed, beta, K):
    policy, reference = batch(seed, K=K); plain, same = dpo(policy, reference, beta=beta), torch.testing.assert_close
    of = lambda name, **k: LOSSES[name](policy, reference, beta=beta, **k)
    for name in ('cdpo', 'robust', 'rosepo', 'hanorec'): same(of(name, eps=0.), plain)
    same(of('rosepo', eps=torch.full((4, K), .2)), of('cdpo', eps=.2)); same(of('hanorec', eps=.2), of('cdpo', eps=.2))
    same(of('rosepo', eps=torch.full((4,), .2)), of('cdpo', eps=.2)); same(of('cdpo', eps=.5), (plain + LOSSES['dpo'](-policy, -reference, beta=beta))/2)
    same(of('beta_dpo', keep=torch.ones(4, dtype=torch.bool)), plain); same(of('beta_dpo'), plain)
    out = Extras('beta_dpo', beta, rho=0., alpha=0.)(policy, reference); same(LOSSES['beta_dpo'](policy, reference, **out), plain, rtol=1e-5, atol=1e-6)
    same(of('dmpo', dmpo_ref_bug=True), LOSSES['simpo'](policy, reference, beta=beta, gamma=0.))          # neither has a reference
    same(of('mdpo', uncond=(policy[:, 0], reference[:, 0]), anchor=-1e9), plain + math.log(2))            # no picture seen, no anchor: DPO and a constant
    same(of('misp'), of('sdpo'))
    if K == 1: same(of('sdpo'), plain); same(of('dmpo'), plain)
    else: assert (of('dmpo') <= plain + 1e-12).all() and (of('sdpo') >= plain - 1e-12).all()
    same(of('ipo', lengths=torch.ones(4, 1 + K)), of('ipo')); same(of('simpo', gamma=1., lengths=torch.ones(4, 1 + K)), of('simpo', gamma=1.))

@every
@quick
@given(seeds, st.floats(.01, 2.), st.integers(1, 4))
def test_what_every_answer_shares_cancels_or_it_does_not(name, seed, beta, K):
    "Raw scores of a recommender will do where only differences count, and only there."
    policy, reference = batch(seed, K=K); k = keywords(name, K=K, seed=seed); k.pop('lengths', None)
    shift = torch.randn(4, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*10 + 1
    value = LOSSES[name](policy, reference, beta=beta, **k)
    assert value.shape == (4,)
    same = lambda p, r: torch.allclose(LOSSES[name](p, r, beta=beta, **k), value, rtol=1e-9, atol=1e-9)
    if name in DIFFERENCES_ONLY: assert same(policy + shift, reference - 3*shift) and same(policy.log_softmax(1), reference.log_softmax(1))
    else:                                                                                  # near the reference, where nothing is saturated
        near = reference + .1*policy; value = LOSSES[name](near, reference, beta=beta, **k)
        assert not same(near + 1, reference) and not same(near, reference + 1)

def test_the_two_that_need_log_probabilities(): assert set(LOSSES) - DIFFERENCES_ONLY == {'kto', 'mdpo'}

@every
@quick
@given(seeds, st.permutations(range(1, 4)))
def test_the_order_of_rejected_answers_and_of_examples_is_free(name, seed, order):
    policy, reference = batch(seed); g = torch.Generator().manual_seed(seed); k, columns, pairs = keywords(name, seed=seed), [0, *order], [o - 1 for o in order]
    beta = .1 + torch.rand(4, *([] if name == 'kto' else [3]), dtype=torch.float64, generator=g)
    value = LOSSES[name](policy, reference, beta=beta, **k)
    of_pairs = lambda x: x[:, pairs] if torch.is_tensor(x) and x.ndim == 2 and x.shape[1] == 3 else x[:, columns] if torch.is_tensor(x) and x.ndim == 2 else x
    moved = {n: of_pairs(x) for n, x in k.items()}
    torch.testing.assert_close(LOSSES[name](policy[:, columns], reference[:, columns], beta=of_pairs(beta), **moved), value)
    turned = {n: tuple(y.flip(0) for y in x) if isinstance(x, tuple) else x.flip(0) if torch.is_tensor(x) else x for n, x in k.items()}
    torch.testing.assert_close(LOSSES[name](policy.flip(0), reference.flip(0), beta=beta.flip(0), **turned), value.flip(0))

@every
@quick
@given(seeds, st.floats(.01, 2.))
def test_beta_of_any_shape(name, seed, beta):
    policy, reference = batch(seed); k = keywords(name, seed=seed); value = LOSSES[name](policy, reference, beta=beta, **k)
    for b in [torch.tensor(beta, dtype=torch.float64), torch.full((4,), beta, dtype=torch.float64), torch.full((4, 3), beta, dtype=torch.float64)]:
        if name == 'kto' and b.ndim == 2: continue                                         # answer by answer there are no pairs
        torch.testing.assert_close(LOSSES[name](policy, reference, beta=b, **k), value)

@every
def test_the_gradient(name):
    "Against finite differences; and at the reference every loss raises the chosen and lowers the rejected."
    policy, reference = batch(0); policy.requires_grad_(); k = keywords(name)
    if name == 'beta_dpo': k['keep'][:2] = True
    assert torch.autograd.gradcheck(lambda p: LOSSES[name](p, reference, beta=.3, **k), policy)
    p = reference.log_softmax(1).requires_grad_(); k = k | (dict(eps=.1) if 'eps' in k else {}) | (dict(uncond=(p[:, 0].detach(),)*2) if name == 'mdpo' else {})
    LOSSES[name](p, p.detach(), beta=.3, **k | (dict(keep=None) if name == 'beta_dpo' else {})).sum().backward()
    assert (p.grad[:, 0] < 0).all() and (p.grad[:, 1:] > 0).all()
    if name == 'mdpo':                                                                     # less likely without the picture
        u = torch.zeros(4, dtype=torch.float64, requires_grad=True); LOSSES[name](policy, reference, beta=.3, uncond=(u, k['uncond'][1])).sum().backward()
        assert (u.grad > 0).all()

def test_the_gradient_is_the_one_of_the_paper():
    policy, reference = batch(0); policy.requires_grad_(); beta = torch.rand(4, 3, dtype=torch.float64)
    dpo(policy, reference, beta=beta).sum().backward()
    slope = beta*torch.sigmoid(-beta*gaps(policy.detach(), reference))/3      # beta sigma(-beta Delta), mean of 3 pairs
    torch.testing.assert_close(policy.grad, torch.cat([-slope.sum(1, keepdim=True), slope], 1))

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('gap', [1e4, -1e4, 3e4, 0., 88.8, -88.8, 1e-30])
@pytest.mark.parametrize('beta', [1e-6, .1, 1.])
def test_extreme_gaps_of_dpo(dtype, gap, beta):
    policy = torch.tensor([[gap, 0., -gap/2]], dtype=dtype, requires_grad=True)
    value = dpo(policy, torch.zeros_like(policy), beta=beta); value.sum().backward()
    assert value.dtype == torch.float32 and policy.grad.dtype == dtype and value.isfinite().all() and policy.grad.isfinite().all()
    assert (policy.grad[0, 0] <= 0) and (policy.grad[0, 1:] >= 0).all()
    exact = np.mean([np.logaddexp(0, -beta*d) for d in gaps(policy.detach(), torch.zeros_like(policy))[0].tolist()])
    assert value.item() == pytest.approx(exact, rel=1e-5, abs=1e-30)

@every
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('gap', [1e4, -1e4])
@pytest.mark.parametrize('beta', [.1, 1., 10.])
@pytest.mark.parametrize('where', ['policy', 'reference', 'one of three'])
def test_extreme_gaps(name, dtype, gap, beta, where):
    "Finite in value and gradient, and right: the same in float64."
    far = torch.tensor([[gap, 0., -gap/2, gap] if where == 'one of three' else [gap, 0., 0., 0.], [0., gap, -gap, 1.]], dtype=dtype)
    policy, reference = (far, torch.zeros_like(far)) if where != 'reference' else (torch.zeros_like(far), far)
    k = keywords(name, B=2, dtype=dtype) | (dict(uncond=(far[:, 1], far[:, 2])) if name == 'mdpo' else {}) | (dict(keep=None) if name == 'beta_dpo' else {})
    def run(kind):
        p = policy.detach().clone().to(kind).requires_grad_(); of = lambda x: x.to(kind) if torch.is_tensor(x) and x.is_floating_point() else x
        v = LOSSES[name](p, reference.to(kind), beta=beta, **{n: tuple(map(of, x)) if isinstance(x, tuple) else of(x) for n, x in k.items()})
        v.sum().backward(); return v.detach(), p.grad
    (value, grad), (exact, slope) = run(dtype), run(torch.float64)
    assert value.dtype == torch.float32 and grad.dtype == dtype and value.isfinite().all() and grad.isfinite().all()
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-2, atol=1e-5)

@every
@pytest.mark.parametrize('policy, reference, beta', [((4, 2), (4, 3), .1), ((4, 1), (4, 1), .1), ((4,), (4,), .1), ((4, 2, 2), (4, 2, 2), .1),
    ((4, 3), (4, 3), (3,)), ((4, 3), (4, 3), (4, 3)), ((4, 3), (4, 3), (4, 1)), ((1, 3), (1, 3), (5,)), ((1, 3), (1, 3), (5, 2))])
def test_shapes_that_do_not_fit_are_refused_not_broadcast(name, policy, reference, beta):
    if name == 'kto' and beta == (4, 1): pytest.skip('one for each example')
    beta = beta if isinstance(beta, float) else torch.ones(beta)
    k = keywords(name, B=policy[0], K=policy[-1] - 1) | (dict(keep=None) if name == 'beta_dpo' else {})
    with pytest.raises(WorkbenchError): LOSSES[name](torch.zeros(policy), torch.zeros(reference), beta=beta, **k)

def test_what_does_not_fit_the_answers_is_refused():
    p, r = batch(0)
    for how in (lambda: LOSSES['ipo'](p, r, beta=1., lengths=torch.ones(4, 3)), lambda: LOSSES['simpo'](p, r, beta=1., gamma=0., lengths=torch.zeros(4, 4)),
                lambda: LOSSES['rosepo'](p, r, beta=1., eps=torch.ones(4, 4)), lambda: LOSSES['cdpo'](p, r, beta=1., eps=-.1),
                lambda: LOSSES['robust'](p, r, beta=1., eps=.5), lambda: LOSSES['mdpo'](p, r, beta=1., uncond=(p, r))):
        with pytest.raises(WorkbenchError) as e: how()
        assert '\n' not in str(e.value)

def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    (tmp_path/'my_losses.py').write_text('def hinge(policy, reference, *, beta):\n    d = policy - reference\n'
        '    return (1 - beta*(d[:, 0] - d[:, 1])).clamp(min=0)\nnumber = 3\n'
        'def more(policy, reference, *, beta, lengths, tilt=1., **rest): return tilt*beta*lengths[:, 0]\n')
    monkeypatch.syspath_prepend(tmp_path); p, r = torch.tensor(pair[0]), torch.tensor(pair[1])
    assert float(get_loss('my_losses:hinge')(p, r, beta=.1)) == pytest.approx(.85)
    for name in ('dp', 'my_losses', 'my_losses:hing', 'my_losses:number', 'no_such_module:f', ':f', 'my_losses:', ''):
        with pytest.raises(WorkbenchError) as e: get_loss(name)
        assert '\n' not in str(e.value)
    e, n = Extras('my_losses:more', tilt=3.), torch.tensor([[2, 5]])
    assert e.takes == ('lengths',) and float(get_loss('my_losses:more')(p, r, **e(p, r, lengths=n, weight=torch.ones(1)))) == pytest.approx(.6)
    assert Extras('my_losses:hinge')(p, r, lengths=n) == dict(beta=.1)
    with pytest.raises(WorkbenchError, match='tilt'): Extras('my_losses:more', tlt=3.)

# ---- what losses need ----
def test_usual_settings_make_every_loss_work():
    policy, reference = batch(0)
    context = dict(lengths=torch.ones(4, 4), weight=torch.ones(4, 3), mismatched=(policy, reference),
                   oracle_gap=torch.randn(4, 3), uncond=(policy[:, 0], reference[:, 0]), logq=-torch.ones(4, 3), pool_size=9)
    for name in LOSSES:
        e = Extras(name); out = e(policy, reference, **context)
        assert LOSSES[name](policy, reference, **out).isfinite().all() and e.beta == DEFAULTS[name]['beta'] and e.needs <= set(e.takes)
        for k in e.needs:
            with pytest.raises(WorkbenchError, match=k): e(policy, reference, **{n: x for n, x in context.items() if n != k})
    with pytest.raises(WorkbenchError, match='did you mean weight'): Extras('dpo')(policy, reference, weigt=1)

def test_hanorec_is_adaptive_beta():
    policy, reference = batch(1); lam = torch.rand(4, 3) + .5; over = torch.randn(9, 3, dtype=torch.float64)
    for more in ({}, dict(over=over)):
        out = Extras('hanorec', .2, eps=.1)(policy, reference, weight=lam, **more)
        assert torch.equal(out['beta'], adaptive_beta(gaps(policy, reference), lam.double(), .2, **more)) and out['eps'] == .1
    assert (hanorec(policy, reference, **out) > 0).all()

def test_z_is_what_the_mismatched_answers_say():
    a, b = torch.tensor([[2., 1.]], requires_grad=True), torch.tensor([[0., 1.5]])
    z = Extras('kto')(a, b, mismatched=(a, b))['z']
    assert z.item() == .75 and not z.requires_grad and Extras('kto')(a, b, mismatched=(b, a))['z'] == 0

def test_beta_dpo_remembers_through_a_state_dict():
    e, other = Extras('beta_dpo'), Extras('beta_dpo'); mean = std = 0.
    for seed in range(5):
        policy, reference = batch(seed, B=10); M = gaps(policy, reference).mean(1); mean, std = .9*mean + .1*M.mean().item(), .9*std + .1*M.std().item()
        out = e(policy, reference)
        assert e.mean.item() == pytest.approx(mean, rel=1e-5) and e.std.item() == pytest.approx(std, rel=1e-5) and out['keep'].sum() == 8
        assert out['beta'].item() == pytest.approx(max(1e-3, .1*(1 + .6*(M[out['keep']].mean().item() - mean))), rel=1e-5)
    assert set(e.state_dict()) == {'mean', 'std'}
    other.load_state_dict(e.state_dict()); torch.manual_seed(3); a = e(*batch(9)); torch.manual_seed(3); b = other(*batch(9))
    assert torch.equal(a['beta'], b['beta']) and torch.equal(a['keep'], b['keep'])

@pytest.mark.parametrize('mean, std', [(0., 0.), (1e4, 1e-8), (0., 1e30)])
def test_the_draw_survives_any_statistics(mean, std):
    for M in (torch.zeros(8), torch.randn(8)*1e4, torch.full((8,), 3.)): assert kept(M, mean, std, .25).sum() == 6

# ---- the picture's numbers ----
def test_against_margin():
    import polars as pl
    frame = against_margin([-3., 0., 1.5]); sigma = lambda z: 1/(1 + math.exp(-z))
    assert set(frame['loss']) == set(LOSSES) and frame['pull'].is_finite().all()
    at = lambda label, m: frame.filter(pl.col('label').str.starts_with(label), margin=m).row(0, named=True)
    for m in (-3., 0., 1.5):
        assert at('dpo', m)['pull'] == pytest.approx(sigma(-m)) and at('dpo', m)['value'] == pytest.approx(math.log1p(math.exp(-m)))
        assert at('cdpo', m)['pull'] == pytest.approx(.9*sigma(-m) - .1*sigma(m)) and at('hinge', m)['value'] == max(0, 1 - m)
        assert at('robust', m)['pull'] == pytest.approx((.9*sigma(-m) + .1*sigma(m))/.8) and at('ipo', m)['value'] == pytest.approx((m - .5)**2)
        assert at('simpo', m)['pull'] == pytest.approx(sigma(1 - m)) and at('kto', m)['value'] == pytest.approx(sigma(-m/2))
        assert at('sdpo', m)['pull'] == pytest.approx(math.exp(-m)/(3 + math.exp(-m))) and at('dmpo', m)['pull'] == pytest.approx(sigma(-m/3)/3)
        assert at('mdpo', m)['value'] == pytest.approx(math.log1p(math.exp(-m)) + 2*math.log1p(math.exp(-m/2)))
        assert at('hanorec', m)['pull'] == pytest.approx(1.3*sigma(-1.3*m)) and at('beta_dpo', m)['pull'] == pytest.approx(.5*sigma(-m/2))

def test_the_picture_draws_them():
    from mmrec_wb.viz.losses import loss_shapes
    frame = against_margin(); fig = loss_shapes(frame, 'made <up>')
    shown = [t.name for t in fig.data]; lines = frame.select('panel', 'label').unique()
    assert len(shown) == 2*len(lines) and set(shown) == set(frame['label']) and fig.layout.title.subtitle.text == 'made &lt;up&gt;'
    for n, (label,) in enumerate(frame.select('panel', 'label').unique(maintain_order=True).select('label').iter_rows()):
        assert shown.count(label) == 2*(lines['label'] == label).sum()
    hinge = [t for t in fig.data if t.name == 'hinge']; m = np.array(hinge[0].x)
    np.testing.assert_allclose(hinge[0].y, np.maximum(0, 1 - m), atol=1e-4); assert set(hinge[1].y) == {0., 1.}

# ---- TRL ----
@pytest.fixture(scope='module')
def shop():
    from mmrec_wb.data import load_dataset
    from mmrec_wb.mllm.backbones import load_backbone
    from mmrec_wb.mllm.tasks import examples
    data = load_dataset('toys', source='planted', planted_users=40, planted_items=60)
    titles = data.catalogue['title'].to_list(); _, processor = load_backbone('tiny', titles, seed=0)
    rows = examples(data, 'pick_one', 'train', 0, per_user=1).head(4).to_dicts()           # answers of different lengths
    return data, processor, rows, lambda: load_backbone('tiny', titles, seed=0)[0]

def moved(model):
    "Away from the start, where the LoRA is zero and so are all gaps; in float64, but for what TRL computes in float32."
    g = torch.Generator().manual_seed(0)
    for n, p in model.named_parameters():
        if 'lora_' in n: p.data = .2*torch.randn(p.shape, generator=g)
    return model.double().train()

def ours(shop, folder, rows, loss, beta, blind=False, **how):
    from trl import DPOConfig
    from mmrec_wb.mllm.backbones import lora_config
    from mmrec_wb.mllm.prompts import Collator
    from mmrec_wb.training.trl_trainers import PreferenceTrainer, as_dataset, trainer_args
    data, processor, _, model = shop; collate = Collator(data, processor, 'all', blind=blind)
    t = PreferenceTrainer(model(), args=trainer_args(DPOConfig, folder, 100, per_device_train_batch_size=4, report_to='none'), train_dataset=as_dataset(rows),
        processing_class=processor, data_collator=collate, peft_config=lora_config(dropout=0.), loss=loss, beta=beta, settings=how)
    return t, collate(rows)

def value_and_gradient(trainer, compute):
    loss = compute(moved(trainer.model)); loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}

def same(a, b, start):
    (a, ga), (b, gb) = a, b
    assert a == pytest.approx(b, abs=1e-6) and abs(a - start) > 1e-3, (a, b)
    assert ga.keys() == gb.keys() and len(ga) >= 14 and max(g.abs().max() for g in gb.values()) > 1e-4
    for n in ga: torch.testing.assert_close(ga[n], gb[n], rtol=1e-5, atol=5e-6)

@pytest.mark.parametrize('loss, theirs, how, n', [('dpo', dict(loss_type=['sigmoid']), {}, 4), ('hinge', dict(loss_type=['hinge']), {}, 4),
    ('ipo', dict(loss_type=['ipo']), {}, 4), ('robust', dict(loss_type=['robust'], label_smoothing=.2), dict(eps=.2), 4),
    ('cdpo', dict(loss_type=['aot'], label_smoothing=.2), dict(eps=.2), 1)])                # aot sorts the batch; of one example it is cDPO
def test_trl_dpo_trainer(shop, tmp_path, loss, theirs, how, n):
    from trl import DPOConfig, DPOTrainer
    from mmrec_wb.mllm.backbones import lora_config
    from mmrec_wb.mllm.prompts import Collator
    from mmrec_wb.training.trl_trainers import as_dataset, trainer_args
    data, processor, rows, model = shop; rows = rows[:n]
    mine, batch = ours(shop, tmp_path, rows, loss, .3, **how)
    trl = DPOTrainer(model(), args=trainer_args(DPOConfig, tmp_path, 100, per_device_train_batch_size=4, report_to='none', beta=.3, **theirs),
        train_dataset=as_dataset(rows), processing_class=processor, peft_config=lora_config(dropout=0.),
        data_collator=(pairs := Collator(data, processor, 'pair')))
    a = value_and_gradient(mine, lambda m: mine._compute_loss(m, batch, False)); b = value_and_gradient(trl, lambda m: trl._compute_loss(m, pairs(rows), False))
    same(a, b, LOSSES[loss](torch.zeros(1, 2), torch.zeros(1, 2), beta=.3, **how).item())

def test_trl_kto_trainer(shop, tmp_path):
    "Its rows are single answers; the mismatched ones are ours: every prompt with its neighbour's answers."
    from trl import KTOConfig, KTOTrainer
    from mmrec_wb.mllm.backbones import lora_config
    from mmrec_wb.mllm.prompts import Collator, answers_of
    from mmrec_wb.training.trl_trainers import as_dataset, trainer_args
    data, processor, rows, model = shop; collate = Collator(data, processor, 'none')
    mine, batch = ours(shop, tmp_path, rows, 'kto', 1., desirable=1.1, undesirable=.9)
    args = trainer_args(KTOConfig, tmp_path, 100, per_device_train_batch_size=4, report_to='none', beta=1., desirable_weight=1.1, undesirable_weight=.9,
                        train_sampling_strategy='sequential')
    trl = KTOTrainer(model(), args=args, train_dataset=as_dataset([dict(prompt='a', completion='b', label=True)]*4), processing_class=processor,
                     data_collator=collate, peft_config=lora_config(dropout=0.))
    tails = [[collate.tail(answers_of(e)[k]) for e in rows] for k in (0, 1)]
    x, other = collate.batch(rows, tails), collate.batch(rows, [t[-1:] + t[:-1] for t in tails])
    x |= {f'KL_{k}': other[k] for k in other if k not in ('pixel_values', 'image_grid_thw')} | dict(label=torch.tensor([True]*4 + [False]*4))
    a = value_and_gradient(mine, lambda m: mine._compute_loss(m, batch, False)); b = value_and_gradient(trl, lambda m: trl._compute_loss(m, x, False))
    same(a, b, .5); assert trl._metrics['train']['kl'][-1] == pytest.approx(mine._metrics['train']['z'][-1], abs=1e-5)

@pytest.mark.parametrize('loss, theirs, how', [('simpo', dict(loss_type='simpo', simpo_gamma=.7), dict(gamma=.7)),
    ('cdpo', dict(loss_type='sigmoid', label_smoothing=.2), dict(eps=.2))])
def test_trl_cpo_trainer(shop, tmp_path, loss, theirs, how):
    "It has no reference and takes no pictures: prompts without them; ours has a reference of zeros."
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from mmrec_wb.mllm.backbones import lora_config
    from mmrec_wb.mllm.prompts import Collator, answers_of
    from mmrec_wb.training.trl_trainers import trainer_args
    data, processor, rows, model = shop; rows = [e | dict(blind=True) for e in rows]
    mine, batch = ours(shop, tmp_path, rows, loss, 1.5, **how); mine.reference_log_probs = lambda m, x: torch.zeros(4, 2)
    args = trainer_args(CPOConfig, tmp_path, 100, per_device_train_batch_size=4, report_to='none', beta=1.5, cpo_alpha=0., **theirs); args.max_length = 512
    text = Dataset.from_list([dict(prompt='a', chosen='b', rejected='c')])
    trl = CPOTrainer(model(), args=args, train_dataset=text, processing_class=processor.tokenizer, peft_config=lora_config(dropout=0.))
    x, collate = {}, Collator(data, processor, 'none')
    for k, side in enumerate(('chosen', 'rejected')):
        one = collate.batch(rows, [[collate.tail(answers_of(e)[k]) for e in rows]])
        x |= {f'{side}_input_ids': one['input_ids'], f'{side}_attention_mask': one['attention_mask'],
              f'{side}_labels': one['input_ids'].masked_fill(one['completion_mask'] == 0, -100)}
    a = value_and_gradient(mine, lambda m: mine._compute_loss(m, batch, False)); b = value_and_gradient(trl, lambda m: trl.get_batch_loss_metrics(m, x)[0])
    same(a, b, LOSSES[loss](torch.zeros(1, 2), torch.zeros(1, 2), beta=1.5, **how).item())

# ---- the MLLM's trainer ----
def test_without_its_pictures_a_prompt_is_the_prompt_of_a_shop_without_pictures(shop, tmp_path):
    mine, batch = ours(shop, tmp_path, shop[2], 'mdpo', .5, blind=True); other, plain = ours(shop, tmp_path, [e | dict(blind=True) for e in shop[2]], 'dpo', .5)
    moved(mine.model); uncond = mine._context(mine.model, batch)['uncond']; moved(other.model)
    torch.testing.assert_close(uncond[0], other.policy_log_probs(other.model, plain)[:, 0])
    torch.testing.assert_close(uncond[1], other.frozen_log_probs(other.model, plain)[:, 0])
    assert uncond[0].requires_grad and not uncond[1].requires_grad
    assert (uncond[1] - mine.frozen_log_probs(mine.model, batch)[:, 0]).abs().max() > 1e-4

def test_what_beta_dpo_remembers_is_in_the_checkpoint(shop, tmp_path):
    from trl import DPOConfig
    from mmrec_wb.mllm.backbones import lora_config
    from mmrec_wb.mllm.prompts import Collator
    from mmrec_wb.training.trl_trainers import PreferenceTrainer, as_dataset, quiet, trainer_args
    data, processor, rows, model = shop
    def train(**k):
        args = trainer_args(DPOConfig, tmp_path, 3, per_device_train_batch_size=2, max_steps=6, learning_rate=1e-2, seed=0, report_to='none')
        args.save_total_limit = None; torch.manual_seed(0)
        t = quiet(PreferenceTrainer(model(), args=args, train_dataset=as_dataset(rows), processing_class=processor,
                                    data_collator=Collator(data, processor, 'all'), peft_config=lora_config(dropout=0.),
                                    loss='beta_dpo', settings=dict(rho=.5)))
        t.train(**k); return t
    straight = train(); resumed = train(resume_from_checkpoint=str(tmp_path/'checkpoint-3'))
    assert (tmp_path/'checkpoint-3'/'extras.safetensors').exists() and straight.extras.std > 0
    torch.testing.assert_close(resumed.extras.state_dict(), straight.extras.state_dict())
    a, b = ([l['beta_mean'] for l in t.state.log_history if 'beta_mean' in l][-3:] for t in (straight, resumed)); assert a == pytest.approx(b, abs=1e-7)

@pytest.fixture(scope='module')
def stage_one(tmp_path_factory):
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.features import add_features
    from mmrec_wb.training.hanorec import train_sft
    data, out = add_features(load_dataset('toys', source='planted', planted_users=24, planted_items=60), progress=False), tmp_path_factory.mktemp('runs')
    how = dict(out_dir=out, epochs=1, batch_size=16, examples_per_user=1, task='pick_one', candidates=5, negatives=3)
    return data, train_sft(data, **how), how

@every
def test_whole_runs(stage_one, name):
    from mmrec_wb.training.hanorec import train_preference
    data, sft, how = stage_one; run = train_preference(data, sft, loss=name, **how)
    curves = run.frame('metrics').filter(split='preference'); names = set(curves['name'])
    assert run.finished and run.path.name.startswith(f'{name}-toys') and {'loss', 'margin', 'accuracy', 'beta_mean'} <= names
    assert curves['value'].is_finite().all()
    assert ('z' in names) == (name == 'kto') and ('keep' in names) == (name == 'beta_dpo') and ('responsiveness' in names) == (name == 'hanorec')
    assert run.params['beta'] == DEFAULTS[name]['beta'] and run.frame('ranks')['rank'].is_between(1, 5).all()

def test_settings_without_a_part_do_not_tell_runs_apart():
    from mmrec_wb.training.hanorec import PREFERENCE_SETTINGS, SOMETIMES, settled
    of = lambda **k: {n: v for n, v in settled(k).items() if n in PREFERENCE_SETTINGS + SOMETIMES}
    assert of(loss='dpo', label_smoothing=.1, noise=.3, strategy='uniform') == of(loss='dpo') == of(loss='dpo', beta=.1)
    assert of() == of(label_smoothing=0., beta=.1) != of(label_smoothing=.1) and of(loss='simpo') == of(loss='simpo', loss_settings='gamma=1.0')
    assert of(loss='simpo')['loss_settings'] == dict(gamma=1.) and of(loss='simpo')['beta'] == 2. and of(loss='dpo')['loss_settings'] is None
    assert of(loss='beta_dpo', loss_settings='rho=.1, alpha=.3')['loss_settings'] == dict(alpha=.3, rho=.1, momentum=.9)
    assert of(loss='cdpo')['label_smoothing'] == .1 and of(loss='rosepo')['label_smoothing'] is None and of(strategy='popularity')['strategy'] == 'popularity'

@pytest.mark.parametrize('settings, says', [(dict(strategy='hard'), 'use uniform or popularity'), (dict(strategy='popularty'), 'did you mean popularity'),
    (dict(strategy='my.module:f'), 'use uniform or popularity'), (dict(loss='kto', batch_size=1), 'batch_size of 2'),
    (dict(loss='dpo', loss_settings='gamma=1'), 'unknown setting of dpo'), (dict(loss='simpo', loss_settings='gama=1'), 'did you mean gamma'),
    (dict(loss='beta_dpo', loss_settings='rho .1'), 'give name=value'),
    (dict(loss='robust', label_smoothing=.5), 'below .5'), (dict(loss='dpoo'), 'did you mean dpo'),
    (dict(epoch=1), 'did you mean epochs'), (dict(noise_on='lgits'), 'did you mean logits'), (dict(eta_over='stp'), 'did you mean step'),
    (dict(hardness_from='backbon'), 'did you mean backbone'), (dict(decoding='gready:x'), 'did you mean greedy')])
def test_what_makes_no_sense_is_one_line(settings, says):
    from mmrec_wb.training.hanorec import settled
    with pytest.raises(WorkbenchError, match=says) as e: settled(settings)
    assert '\n' not in str(e.value)

def test_mdpo_without_pictures_is_refused_before_anything_is_trained(tmp_path):
    from mmrec_wb.data import load_dataset
    from mmrec_wb.training.hanorec import train_sft
    data = load_dataset('toys', source='planted', planted_users=30, planted_items=60, pictures=False)
    with pytest.raises(WorkbenchError, match='has no pictures'): train_sft(data, loss='mdpo', out_dir=tmp_path/'runs')
    assert not (tmp_path/'runs').exists()

def test_popularity_draws_what_the_recommenders_strategy_draws(stage_one):
    "The same distribution as preference.negatives; the test questions stay as they were."
    from mmrec_wb.mllm.tasks import _drawer
    from mmrec_wb.preference.negatives import sample
    from mmrec_wb.training.hanorec import questions, settled, training_counts
    data, _, how = stage_one; counts = data.counts(); draw = _drawer(np.random.default_rng(0), data.n_items, counts)
    share = np.bincount([draw() for _ in range(20_000)], minlength=data.n_items + 1)/20_000
    _, logq = sample(None, torch.tensor([1]), torch.zeros(1, 1, dtype=torch.long), 1, 'popularity', context=dict(counts=torch.tensor(counts)))
    assert abs(share - counts/counts.sum()).max() < .01 and share[0] == 0 and np.isfinite(logq.numpy()).all()
    for task in ('yes_no', 'pick_one', 'top3'):
        s = settled({**how, 'task': task, 'strategy': 'popularity', 'negatives': 1})
        a, b = (questions(data, 'train', s, strategy=x) for x in (None, 'popularity')); c = training_counts(data, s)
        mean = [np.mean([c[i] for row in x['negative'].to_list() for i in row]) for x in (a, b)]
        assert mean[1] > mean[0] and all(c[i] for row in b['negative'].to_list() for i in row)
        assert a['positive'].equals(b['positive']) and questions(data, 'test', s).equals(questions(data, 'test', s | dict(strategy=None)))

def test_the_oracle_is_popularity(stage_one):
    from mmrec_wb.training.hanorec import oracle_gaps, questions, settled, training_counts
    data, _, how = stage_one; s = settled({**how, 'loss': 'rosepo'}); train = questions(data, 'train', s, negatives=3); c = training_counts(data, s) + 1
    gap = torch.tensor(oracle_gaps(data, train, s)); assert gap.shape == (len(train), 3)
    eps = Extras('rosepo')(*batch(0, B=len(train)), oracle_gap=gap)['eps']; e = train.row(0, named=True)
    assert eps[0].tolist() == pytest.approx([c[i]/(c[i] + c[e['positive'][0]]) for i in e['negative']], abs=1e-6)      # Bradley and Terry, strengths 1 + count
    top = settled(dict(task='top3', negatives=2)); train = questions(data, 'train', top, negatives=2)
    assert np.shape(oracle_gaps(data, train, top)) == (len(train), 2)
