"What a doc-test of the preference room cannot hold: invariances, extreme values, noise under gradient checkpointing."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.preference.hardness import adaptive_beta, delta, item_vectors, neighbour_scores, responsiveness, weight
from mmrec_wb.preference.losses import gaps, hanorec
from mmrec_wb.preference.noise import lora_noise, lora_pairs
from mmrec_wb.training.metrics import auc, auc_hard, hit, mrr, ndcg, ranks

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31 - 1)

# ---- hardness ----
class Feature:
    def __init__(self, values, present): self.values, self.present = values, present

def some_vectors(n=60, d=8, seed=0):
    g = np.random.default_rng(seed)
    return item_vectors(dict(text=Feature(g.normal(size=(n + 1, d)), np.arange(n + 1) > 0), image=Feature(g.normal(size=(n + 1, d)), g.random(n + 1) < .5)))

@quick
@given(st.integers(2, 30), st.integers(1, 12), st.integers(1, 40), seeds)
def test_neighbours_against_a_loop(n, k, chunk, seed):
    v = some_vectors(n, seed=seed); items = np.random.default_rng(seed).integers(1, n + 1, 15)
    got = neighbour_scores(v, items, k, chunk)
    assert got.shape == (15, min(k, n - 1))
    for i, c in zip(items, got):
        others = [j for j in range(1, n + 1) if j != i]
        np.testing.assert_allclose(c, np.sort(v[others] @ v[i])[::-1][:k], atol=1e-6)

def test_vectors_come_in_any_scale_and_odd_storage(tmp_path):
    g = np.random.default_rng(1); values, present = g.normal(size=(21, 6)).astype(np.float32), np.arange(21) % 3 > 0
    np.save(tmp_path/'v.npy', values); mapped = np.load(tmp_path/'v.npy', mmap_mode='r')
    v = item_vectors(dict(text=Feature(values, present)))
    np.testing.assert_allclose(item_vectors(dict(text=Feature(1000*mapped, present))), v, atol=1e-6)
    assert not v[~present].any() and not v[0].any() and np.allclose(np.linalg.norm(v[present], axis=1), 1)
    absent = values.copy(); absent[~present] = np.nan
    assert np.array_equal(item_vectors(dict(text=Feature(absent, present))), v)               # what is absent is not read
    absent[1] = np.inf
    with pytest.raises(WorkbenchError, match='item 1 '), np.errstate(invalid='ignore'): item_vectors(dict(text=Feature(absent, present)))
    v.setflags(write=False); assert neighbour_scores(v, [1, 2], 3).shape == (2, 3)
    assert neighbour_scores(v[:2], [1], 3).shape == (1, 0) and delta(v[:2], [1], [1]).tolist() == [0.]  # a shop of one item

@quick
@given(seeds, st.floats(.01, 2.))
def test_delta_is_a_distance_and_weight_grows_with_it(seed, temperature):
    v = some_vectors(); a, b, c = np.random.default_rng(seed).integers(1, 61, (3, 20))
    d = lambda x, y: delta(v, x, y, temperature=temperature)
    np.testing.assert_allclose(d(a, b), d(b, a), atol=1e-7); np.testing.assert_allclose(d(a, a), 0, atol=1e-7)
    assert (d(a, c) <= d(a, b) + d(b, c) + 1e-6).all() and (d(a, b) <= 2**.5).all()
    w = weight(d(a, b)); assert (np.diff(w[np.argsort(d(a, b))]) >= 0).all() and .5 < w.min() <= 1 <= w.max() < 2

@quick
@given(st.lists(st.floats(-1e4, 1e4), min_size=3, max_size=40), st.floats(.01, 100.))
def test_responsiveness_is_bounded_free_of_order_and_of_scale(g, scale):
    eta = responsiveness(torch.tensor(g, dtype=torch.float64))
    assert 0 <= eta < 1.3680 and responsiveness(torch.tensor(g[::-1], dtype=torch.float64)) == pytest.approx(eta, abs=1e-6)
    if abs(np.mean(g)) > 1e-3: assert responsiveness(scale*torch.tensor(g, dtype=torch.float64)) == pytest.approx(eta, rel=1e-6, abs=1e-9)

@pytest.mark.parametrize('g, eta', [([], 1.), ([3.], 1.), ([3., -9.], 1.), ([0., 0., 0.], 1.), ([2., 2., 2., 2.], 1.), ([1e-9, 2e-9, 3e-9], None),
                                    ([-5., .1, .1, .1], .478736/.731059), ([-.3, .1, .1, .2], None)])
def test_responsiveness_by_hand(g, eta):
    if eta is None: # the formula, written once more
        a = np.array(g); a = a/a.mean() if abs(a.mean()) > 1e-8 else a/max(np.abs(a).mean(), 1e-8)
        s = lambda x: 1/(1 + np.exp(-x)); eta = s(np.sort(a)[1:-1].mean())/s(a.mean())
    assert responsiveness(torch.tensor(g)) == pytest.approx(eta, abs=1e-5)

def test_beta_carries_no_gradient_and_a_harder_pair_gets_less():
    torch.manual_seed(0)                        # of some draws eta is nearly 0, and beta at its floor
    D = torch.randn(6, 2, requires_grad=True); lam = torch.tensor(weight(np.linspace(0, 1, 6)))
    b = adaptive_beta(D, lam, .1)
    assert not b.requires_grad and b.shape == (6, 2) and b.dtype == D.dtype and (b.diff(dim=0) > 0).all()
    torch.testing.assert_close(adaptive_beta(D, lam[:, None].expand(6, 2), .1), b)
    policy = torch.randn(6, 3, requires_grad=True)
    hanorec(policy, torch.zeros(6, 3), beta=adaptive_beta(gaps(policy, torch.zeros(6, 3)), lam, .1)).sum().backward()
    fixed = policy.detach().requires_grad_()
    hanorec(fixed, torch.zeros(6, 3), beta=adaptive_beta(gaps(fixed, torch.zeros(6, 3)), lam, .1).clone()).sum().backward()
    torch.testing.assert_close(policy.grad, fixed.grad)

# ---- noise ----
class Block(nn.Module):
    def __init__(self):
        super().__init__(); self.up, self.drop, self.down = nn.Linear(6, 9), nn.Dropout(.2), nn.Linear(9, 6)
    def forward(self, x): return x + self.down(self.drop(torch.tanh(self.up(x))))

class Net(nn.Module):
    "Calls its blocks as transformers' GradientCheckpointingLayer does."
    def __init__(self, function=None):
        super().__init__(); self.blocks = nn.ModuleList([Block() for _ in range(3)])
        for b in self.blocks:
            if function: b._gradient_checkpointing_func = function
    def forward(self, x):
        for b in self.blocks: x = b._gradient_checkpointing_func(b.__call__, x) if hasattr(b, '_gradient_checkpointing_func') else b(x)
        return x

def adapted(function=None, dropout=.3):
    torch.manual_seed(0)
    return get_peft_model(Net(function), LoraConfig(r=2, lora_alpha=8, lora_dropout=dropout, target_modules=['up', 'down'])).train()

def gradients(net, generator, inside=False, noise_free=False, times=1):
    torch.manual_seed(1); x = torch.randn(5, 6, requires_grad=True); total = 0
    with lora_noise(net, .2, generator):
        for _ in range(times): total = total + net(x).square().sum()
        if inside: total.backward()
    if noise_free: total = total + net(x).square().sum()
    if not inside: total.backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None} | dict(x=x.grad.clone(), after=torch.rand(1))

@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('own', [False, True])
@pytest.mark.parametrize('how', [dict(), dict(inside=True), dict(noise_free=True), dict(times=3), dict(times=2, inside=True)])
def test_a_checkpointed_backward_sees_the_noise_of_its_forward(reentrant, own, how):
    "Inside the context and after it; several forwards, with dropout, and a forward without noise between."
    generator = lambda: torch.Generator().manual_seed(3) if own else None
    plain, g = gradients(adapted(), g1 := generator(), **how), adapted(lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant))
    again = gradients(g, g2 := generator(), **how)
    assert plain.keys() == again.keys() and len(plain) == 14
    for n in plain: torch.testing.assert_close(again[n], plain[n], msg=n)
    if own: assert torch.equal(g1.get_state(), g2.get_state())                                # the recomputation leaves no trace
    assert not any(m._forward_hooks for m in g.modules())

def test_transformers_own_checkpointing():
    from transformers import LlamaConfig, LlamaForCausalLM
    def run(on):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
        model = LlamaForCausalLM(config)
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, lora_dropout=.1, target_modules='all-linear')).train()
        if on: model.enable_input_require_grads(); model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=on == 'reentrant'))
        ids, calls = torch.arange(20).reshape(2, 10), []; lora_pairs(model)[0][0].register_forward_hook(lambda *a: calls.append(1)); torch.manual_seed(1)
        with lora_noise(model, .05): loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward(); assert len(lora_pairs(model)) == 14 and len(calls) == (2 if on else 1) # recomputed, or not
        return [loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad]
    plain = run(None)
    for on in ('reentrant', 'not'):
        for a, b in zip(plain, run(on), strict=True): torch.testing.assert_close(a, b)

def test_the_gradient_against_finite_differences():
    net = adapted(dropout=0.).double().eval(); x = torch.randn(3, 6, dtype=torch.float64)
    def value():
        with lora_noise(net, .2, torch.Generator().manual_seed(5)): return net(x).square().sum()
    value().backward()
    for A, B in lora_pairs(net)[:2]:
        for p in (A.weight, B.weight):
            with torch.no_grad():
                p[1, 1] += 1e-6; up = value(); p[1, 1] -= 2e-6; down = value(); p[1, 1] += 1e-6
            assert float(p.grad[1, 1]) == pytest.approx(float((up - down)/2e-6), rel=1e-5, abs=1e-6) and p.grad[1, 1] != 0

def test_noise_is_normal_unscaled_and_gone_after_an_error():
    net = get_peft_model(nn.Sequential(nn.Linear(40, 30, bias=False)), LoraConfig(r=20, lora_alpha=40, target_modules=['0'])); A, B = lora_pairs(net)[0]
    with lora_noise(net, .3, torch.Generator().manual_seed(0)), torch.no_grad():
        draws = torch.cat([torch.cat([(A(torch.eye(40)) - A.weight.T).flatten(), B(torch.eye(20)).flatten()]) for _ in range(10)])   # eps_A, eps_B (B is 0)
    assert abs(draws.std() - .3) < .01 and abs(draws.mean()) < .01 and abs((draws.abs() > .588).float().mean() - .05) < .01
    with pytest.raises(ZeroDivisionError), lora_noise(net, .3): 1/0
    assert not A._forward_hooks and not B._forward_hooks

def test_only_active_adapters_get_noise():
    net = adapted(); net.add_adapter('other', LoraConfig(r=2, target_modules=['up'])); x = torch.randn(2, 6)
    assert len(lora_pairs(net)) == 6
    net.set_adapter('other'); assert len(lora_pairs(net)) == 3
    layer = net.base_model.model.blocks[0].up
    with lora_noise(net, .1): assert layer.lora_A['other']._forward_hooks and not layer.lora_A['default']._forward_hooks
    for sigma in (-1., float('nan'), float('inf')):
        with pytest.raises(WorkbenchError, match='standard deviation'), lora_noise(net, sigma): pass

# ---- metrics ----
@quick
@given(st.integers(1, 8), st.integers(1, 20), seeds)
def test_ranks_against_sorting(B, C, seed):
    g = torch.Generator().manual_seed(seed); s, t = torch.randint(0, 6, (B, C), generator=g).float(), torch.randint(0, C, (B,), generator=g)
    r = ranks(s, t)
    for row, i, rank in zip(s.tolist(), t.tolist(), r.tolist()):
        assert sorted(row, reverse=True)[rank - 1] == row[i] and (rank == C or sorted(row, reverse=True)[rank] < row[i]) # the last of its equals
    for k in (1, 3, 10): assert (mrr(r, k) <= ndcg(r, k)).all() and (ndcg(r, k) <= hit(r, k)).all()
    assert torch.equal(ranks(3*s + 1, t), r) and torch.equal(ranks(s, t.int()), r)

@quick
@given(seeds)
def test_auc_against_counting_and_balanced_accuracy(seed):
    g = np.random.default_rng(seed); s, y = g.integers(0, 5, 30), np.append(g.integers(0, 2, 28), [0, 1])
    a, b = s[y == 1][:, None], s[y == 0][None]
    assert auc(s, y) == pytest.approx(((a > b) + .5*(a == b)).mean()) and auc(np.exp(s), y) == pytest.approx(auc(s, y))
    yes = g.integers(0, 2, 30).astype(bool); answers = np.where(yes, 'Yes', 'No').tolist()
    assert auc_hard(answers, y) == pytest.approx((yes[y == 1].mean() + (~yes)[y == 0].mean())/2)
    assert auc_hard([*answers, 'maybe', ''], [*y, 1, 0]) == pytest.approx(auc_hard(answers, y))
