"Sparse mixtures: limiting cases, gradients, what is counted, in each encoder that has them."
import copy
import numpy as np, polars as pl, pytest, torch
import torch.nn.functional as F
from mmrec_wb.core.record import open_run
from mmrec_wb.data import Feature, load_dataset
from mmrec_wb.data.batches import train_batches
from mmrec_wb.models import get_model
from mmrec_wb.models.moe import SparseMoE, active_parameters, expert_load, forget, sparse_layers, total_parameters
from mmrec_wb.models.sasrec import Block, SASRec, SequenceEncoder
from mmrec_wb.training.fit import fit
from mmrec_wb.training.recommender import load_model, own_settings, train_recommender

TINY = dict(d=16, inner=32, max_len=20)

@pytest.fixture(scope='module')
def data():
    data, g = load_dataset('toys', source='planted', planted_users=60, planted_items=60, pictures=False), np.random.default_rng(0)
    there = np.arange(data.n_items + 1) > 0; some = there & (g.random(len(there)) < .7)
    vectors = lambda has: Feature((g.normal(size=(len(has), 12))*has[:, None]).astype(np.float32), has)
    data.features = dict(text=vectors(there), image=vectors(some)); return data

def net(moe, e, x): return F.linear(F.gelu(F.linear(x, moe.up[e], moe.up_bias[e])), moe.down[e], moe.down_bias[e])
def moe(d=8, **more): torch.manual_seed(0); return SparseMoE(d, 16, **more)

# ---- limiting cases ----
def test_one_expert_is_the_dense_net():
    torch.manual_seed(0); dense, sparse = Block(8, 2, 16, 0.), Block(8, 2, 16, 0., experts=1); x, own = torch.randn(3, 5, 8), sparse.moe
    sparse.load_state_dict({k: v for k, v in dense.state_dict().items() if not k.startswith(('up', 'down'))}, strict=False)
    own.up.data[0], own.up_bias.data[0], own.down.data[0], own.down_bias.data[0] = dense.up.weight, dense.up.bias, dense.down.weight, dense.down.bias
    torch.testing.assert_close(sparse(x), dense(x), rtol=0, atol=1e-7); (value, load) = own.balance(); assert value == 1 and load.tolist() == [1.]
    torch.testing.assert_close(own(x), dense.feed(x), rtol=0, atol=1e-7)

def test_all_experts_with_equal_gates_are_their_mean():
    m, x = moe(experts=3, top=3), torch.randn(7, 8); m.router.weight.data.zero_()
    torch.testing.assert_close(m(x), sum(net(m, e, x) for e in range(3))/3)

def test_equal_experts_are_one_of_them_whatever_the_router_says():
    m, x = moe(), torch.randn(7, 8); m.router.weight.data.mul_(100)
    for w in (m.up, m.down, m.up_bias, m.down_bias): w.data[:] = w.data[:1]
    torch.testing.assert_close(m(x), net(m, 0, x))

def test_gates_sum_to_one_and_the_best_are_chosen():
    m, x = moe(experts=5), 10*torch.randn(40, 8); p, chosen, gate = m.route(x)
    torch.testing.assert_close(gate.sum(1), torch.ones(40)); assert chosen.shape == (40, 2) and torch.equal(chosen[:, 0], p.argmax(1))
    z = m.router(x).gather(1, chosen); torch.testing.assert_close(gate, z.softmax(1))                       # renormalised: a softmax over the two

@pytest.mark.parametrize('top', [1, 2])
def test_balance_is_one_when_even_and_n_when_collapsed(top):
    m, z = moe(4, top=top), torch.eye(4)
    m.router.weight.data = 30*torch.eye(4); m(z); assert m.balance()[0].item() == pytest.approx(1, abs=1e-5)
    forget(m); m.router.weight.data = 30*torch.tensor([1., 0, 0, 0])[:, None].expand(4, 4).clone(); m(z)
    assert m.balance()[0].item() == pytest.approx(4, abs=1e-5)
    forget(m); m.router.weight.data.zero_(); m(z); assert m.balance()[0].item() == pytest.approx(1, abs=1e-5)                  # no preference at all

# ---- gradients ----
def test_gradient_reaches_the_router_through_gates_and_through_the_balance():
    m, x = moe(), torch.randn(30, 8)
    m(x).square().sum().backward(); through_gates = m.router.weight.grad.clone(); assert through_gates.abs().sum() > 0
    m.zero_grad(); forget(m); m(x); m.balance()[0].backward(); assert m.router.weight.grad.abs().sum() > 0 and m.up.grad is None

def test_without_padding_or_many_tokens():
    m = moe(); assert m(torch.zeros(0, 8)).shape == (0, 8) and m(torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool)).eq(0).all() and m.balance()[0] == 0

def test_descent_on_the_balance_spreads_a_collapsed_router():
    "With half of the tokens in each of four directions and everything sent to one expert at first."
    m, x = moe(4), torch.eye(4).repeat(8, 1); m.router.weight.data = torch.tensor([[3.], [0], [0], [0]]).expand(4, 4).clone() + .01*torch.randn(4, 4)
    opt = torch.optim.Adam(m.parameters(), .1); values = []
    for _ in range(60): forget(m); m(x); b = m.balance()[0]; values.append(b.item()); opt.zero_grad(); b.backward(); opt.step()
    assert values[0] > 2.5 and min(values[-20:]) < 1.2

def test_an_expert_without_tokens_has_a_gradient_of_zero():
    m, x = moe(4, top=1), torch.eye(4)[:1].expand(6, 4).clone(); m(x).sum().backward()
    used = m.up.grad.flatten(1).abs().sum(1) > 0; assert used.sum() == 1 and m.up.grad.shape == m.up.shape

# ---- padding ----
def test_padding_is_neither_routed_nor_counted():
    torch.manual_seed(0); enc, x = SequenceEncoder(16, inner=32, max_len=9, experts=4, dropout=0.), torch.randn(3, 9, 16)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    forget(enc); y = enc(x, mask); found = [m.balance() for m in sparse_layers(enc)]; assert all(m.seen[0][3] == 14 for m in sparse_layers(enc))
    wild = torch.where(mask[..., None], x, 1e3*torch.randn(3, 9, 16)); forget(enc); z = enc(wild, mask)
    torch.testing.assert_close(z[mask], y[mask]); torch.testing.assert_close([m.balance() for m in sparse_layers(enc)], found)
    for i, n in ((1, 4), (2, 1)): torch.testing.assert_close(enc(x[i:i + 1, :n]), y[i:i + 1, :n], rtol=1e-4, atol=1e-6)

def test_several_passes_count_together_and_a_copy_starts_empty():
    m, a, b = moe(), torch.randn(5, 8), torch.randn(9, 8); m(a); m(b); two = m.balance(); copied = copy.deepcopy(m); assert copied.seen == []
    forget(m); m(torch.cat([a, b])); torch.testing.assert_close(two, m.balance()); assert moe().balance()[0].item() == 0

# ---- in the models ----
@pytest.mark.parametrize('name, layers', [('sasrec', 2), ('hm4sr', 6), ('duaf_mat', 2)])
def test_every_encoder_takes_experts(data, name, layers):
    torch.manual_seed(0); make = lambda **more: get_model(name)(data, **TINY, **more)
    m, dense, batch = make(ffn_experts=4), make(), train_batches(data, 20, 128, 0, 1)[0]; parts = m(batch); parts['loss'].backward()
    assert len(sparse_layers(m)) == layers and sparse_layers(dense) == [] and 'balance' not in dense(batch)
    assert parts['balance'].item() == pytest.approx(.01*layers, rel=.2) and all(l.router.weight.grad.abs().sum() > 0 for l in sparse_layers(m))
    for i in range(layers): assert sum(parts[f'load layer{i} expert{e}'].item() for e in range(4)) == pytest.approx(1)
    net_, router = 16*32*2 + 32 + 16, 4*16
    assert total_parameters(m) == total_parameters(dense) + layers*(3*net_ + router)
    assert active_parameters(m) == total_parameters(dense) + layers*(net_ + router)
    with_none = make(ffn_experts=4, balance=0.); with_none.load_state_dict(m.state_dict())
    torch.manual_seed(1); a = m(batch); torch.manual_seed(1); b = with_none(batch)
    torch.testing.assert_close(a['loss'] - a['balance'], b['loss'])
    frame = m.eval().explanations(data)['experts']; assert set(frame['layer']) == set(range(layers))
    assert frame.group_by('layer', 'category').agg(pl.col('load').sum().round(6))['load'].eq(1).all()
    assert set(frame['category'].drop_nulls()) <= set(data.catalogue['category'].drop_nulls()) and frame['load'].is_between(0, 1).all()

def test_a_sparse_run_is_recorded_and_a_dense_one_is_named_as_ever(data, tmp_path):
    how = dict(d=16, heads=1, layers=1, max_len=20, epochs=1, batch_size=128, out_dir=str(tmp_path), device='cpu')
    dense, same, sparse = (train_recommender(data, 'sasrec', **how, **more) for more in ({}, dict(ffn_experts=0, balance=.01), dict(ffn_experts=4)))
    assert dense.path == same.path != sparse.path and 'ffn_experts' not in dense.params and sparse.params['ffn_experts'] == 4
    names = set(sparse.frame('metrics').filter(split='train')['name']); assert {'balance', 'load layer0 expert0', 'load layer0 expert3'} <= names
    assert sparse.frame('explain/experts').height and not (dense.path/'explain/experts.parquet').exists()
    assert len(sparse_layers(load_model(sparse, data))) == 1 and own_settings('sasrec')['ffn_experts'] == 0
