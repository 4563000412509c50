"Significance tests against simulation, scipy, closed forms, and themselves in another order."
import time
import numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import norm, wilcoxon
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.training.metrics import auc
from mmrec_wb.training.significance import bootstrap_p, compare, holm, signed_rank, weighted_auc

def answers(g, users, signal, seeds=1, easy=None, labels=None):
    "yes/no tables; the true AUC is Phi(2*signal/sqrt(2*1.49)), whatever the user effect `easy` is shared with."
    easy = g.normal(size=users) if easy is None else easy
    labels = [g.integers(0, 2, users) for _ in range(seeds)] if labels is None else labels
    return [pl.DataFrame(dict(user=np.arange(users), label=y, log_odds=signal*(2*y - 1) + .7*easy + g.normal(size=users))) for y in labels]

def true_auc(signal): return norm.cdf(2*signal/np.sqrt(2*1.49))

def two_arms(g, users, a, b, seeds=1):
    easy, labels = g.normal(size=users), [g.integers(0, 2, users) for _ in range(seeds)]
    return dict(a=answers(g, users, a, easy=easy, labels=labels), b=answers(g, users, b, easy=easy, labels=labels))

@pytest.mark.slow
def test_interval_covers_95_percent():
    "Of 400 worlds with a known difference of AUC, the interval holds it in about 95%."
    g, truth, inside, wide = np.random.default_rng(1), true_auc(.6) - true_auc(.4), 0, []
    for i in range(400):
        r = compare(two_arms(g, 200, .4, .6), 'a', draws=400, seed=i).row(0, named=True)
        inside += r['low'] <= truth <= r['high']; wide.append(r['high'] - r['low'])
    assert .92 <= inside/400 <= .98, inside/400       # two standard errors of a share of 400 are .022
    assert np.mean(wide) < .25

@pytest.mark.slow
def test_interval_is_as_wide_as_the_world_varies():
    "Many worlds of two arms and three seeds each: the spread of the difference is what one world's interval says."
    g = np.random.default_rng(2); rows = [compare(two_arms(g, 300, .5, .5, seeds=3), 'a', draws=200, seed=i).row(0, named=True) for i in range(200)]
    spread, said = np.std([r['difference'] for r in rows]), np.mean([r['high'] - r['low'] for r in rows])/(2*norm.ppf(.975))
    assert abs(said/spread - 1) < .15, (said, spread)
    alarms = np.mean([r['p'] < .05 for r in rows])
    assert .01 <= alarms <= .1, alarms                # equal arms: about 5% false alarms

def test_signed_rank_gives_few_false_alarms():
    g = np.random.default_rng(3); p = []
    for i in range(200):
        a, b = ([pl.DataFrame(dict(user=np.arange(80), rank=g.integers(1, 8, 80))) for _ in range(3)] for _ in 'ab')
        p.append(compare(dict(a=a, b=b), 'a', 'NDCG@3', draws=100)['p'][0])
    assert .01 <= np.mean(np.array(p) < .05) <= .1

@pytest.mark.parametrize('metric, gain', [('HR@3', lambda r: (r <= 3)*1.), ('MRR@5', lambda r: (r <= 5)/r), ('ndcg@3', lambda r: (r <= 3)/np.log2(r + 1))])
def test_wilcoxon_is_scipys_on_values_averaged_over_seeds(metric, gain):
    g = np.random.default_rng(4); ranks = {a: g.integers(1, 8 - k, (3, 150)) for k, a in enumerate('ab')}
    r = compare({a: [pl.DataFrame(dict(user=np.arange(150), rank=x)) for x in xs] for a, xs in ranks.items()}, 'a', metric).row(0, named=True)
    a, b = (gain(ranks[x]).mean(0) for x in 'ab')
    assert r['p'] == pytest.approx(wilcoxon((b - a).round(12)).pvalue, rel=1e-9)
    assert r['difference'] == pytest.approx((b - a).mean()) and r['value'] == pytest.approx(b.mean())
    assert r['high'] - r['low'] == pytest.approx(2*1.96*(b - a).std()/np.sqrt(150), rel=.1) and (r['n_users'], r['seeds']) == (150, 3)

def test_a_list_tasks_own_column_and_unnamed_ranks():
    users = np.arange(40); g = np.random.default_rng(5); recall = g.random(40)
    arms = dict(a=[pl.DataFrame({'user': users, 'recall@3': recall})], b=[pl.DataFrame({'user': users, 'recall@3': recall + .1})])
    t = compare(arms, 'a', 'recall@3').row(0, named=True)
    assert [t['difference'], t['low'], t['high']] == pytest.approx([.1]*3) and t['p'] < 1e-6
    arms = dict(a=[pl.DataFrame(dict(user=users, rank=[1]*40))], b=[pl.DataFrame(dict(user=users, rank=[1]*20 + [None]*20))])
    named = compare(arms, 'a', 'HR@3').row(0, named=True)
    assert named['value'] == .5 and named['difference'] == -.5

@pytest.mark.parametrize('metric', ['auc', 'HR@1'])
def test_equal_arms_do_not_differ(metric):
    g = np.random.default_rng(6); base = answers(g, 50, .5, seeds=2)
    base = [f.with_columns(rank=pl.Series(g.integers(1, 4, 50))) for f in base]
    r = compare(dict(a=base, b=base, c=base), 'a', metric, draws=200)
    assert r['p'].to_list() == r['p_holm'].to_list() == [1, 1] and (r['difference'].to_list(), r['low'].to_list(), r['high'].to_list()) == ([0, 0],)*3

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_order_of_rows_and_monotone_scores_change_nothing(seed, levels):
    "Rows in another order in every table; the log-odds stretched; the users renamed in order: the same numbers."
    g = np.random.default_rng(seed); arms = two_arms(g, 40, .3, .6, seeds=2)
    arms = {a: [f.with_columns((pl.col('log_odds')*levels).round()) for f in fs] for a, fs in arms.items()}       # with ties
    if any(f['label'].n_unique() < 2 for f in arms['a']): return
    one = compare(arms, 'a', draws=100)
    for other in ({a: [f.sample(fraction=1., shuffle=True, seed=seed + k) for k, f in enumerate(fs)] for a, fs in arms.items()},
                  {a: [f.with_columns(pl.col('log_odds')*3 + 1, 'label', pl.col('user')*2 + 5) for f in fs] for a, fs in arms.items()}):
        assert compare(other, 'a', draws=100).equals(one)

@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm(p):
    q = holm(p); order = np.argsort(p, kind='stable')
    assert (q >= np.array(p) - 1e-15).all() and (q <= 1).all() and (np.diff(q[order]) >= 0).all() and q.min() == min(1, len(p)*min(p))
    brute = [max(min(1, (len(p) - j)*p[order[j]]) for j in range(list(order).index(i) + 1)) for i in range(len(p))]
    assert q == pytest.approx(brute)

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_weighted_auc_is_auc_of_repeated_rows(seed, levels):
    g = np.random.default_rng(seed); s, y, w = g.integers(0, levels, 25).astype(float), g.integers(0, 2, 25), g.integers(0, 3, (4, 25))
    assert weighted_auc(w, s, y) == pytest.approx([auc(np.repeat(s, c), np.repeat(y, c)) for c in w], nan_ok=True)

def test_labels_that_differ_from_seed_to_seed_pair_within_a_seed():
    g = np.random.default_rng(7); arms = two_arms(g, 300, .5, .9, seeds=3)
    assert len({tuple(f['label']) for f in arms['a']}) == 3
    r = compare(arms, 'a', draws=300).row(0, named=True)
    assert r['difference'] == pytest.approx(np.mean([auc(b['log_odds'], b['label']) - auc(a['log_odds'], a['label']) for a, b in zip(arms['a'], arms['b'])]))
    assert r['low'] > 0 and r['p'] < .05
    with pytest.raises(WorkbenchError, match='other questions than a had'): compare(dict(a=arms['a'], b=arms['b'][::-1]), 'a')

def test_several_questions_of_a_user_are_one_user():
    "Each user's row three times over is no new evidence."
    g = np.random.default_rng(8); arms = two_arms(g, 100, .3, .7)
    thrice = {a: [pl.concat([f]*3) for f in fs] for a, fs in arms.items()}
    one, many = (compare(x, 'a', draws=300).row(0, named=True) for x in (arms, thrice))
    assert many['n_users'] == 100 and all(many[k] == pytest.approx(one[k]) for k in ('difference', 'low', 'high', 'p'))

def test_small_p():
    assert bootstrap_p(np.ones(1999)) == pytest.approx(.001)
    assert signed_rank([.1 + .2]*5, [.3]*5) == 1 and signed_rank(range(1, 7), [0]*6) == pytest.approx(1/32)

FRAMES = dict(a=[pl.DataFrame(dict(user=[1, 2, 3, 4], label=[0, 1, 0, 1], log_odds=[.1, .2, .3, .4], rank=[1, 2, 3, 4]))])
def changed(**columns): return dict(a=FRAMES['a'], b=[FRAMES['a'][0].with_columns(**{c: pl.Series(v) for c, v in columns.items()})])
BAD = {
    'other users': (changed(user=[1, 2, 3, 5]), {}, '2 users are not in both'),
    'users of another kind': (changed(user=['1', '2', '3', '4']), {}, 'users are String'),
    'other labels': (changed(label=[1, 0, 0, 1]), {}, 'other questions'),
    'one class': (changed(label=[1, 1, 1, 1]), {}, 'labels 0 and 1'),
    'NaN': (changed(log_odds=[.1, float('nan'), .3, None]), {}, '2 of 4 rows have no auc'),
    'a seed less': (dict(FRAMES, b=FRAMES['a']*2), {}, 'b has 2 seeds, a has 1'),
    'no log_odds': (dict(FRAMES, b=[FRAMES['a'][0].drop('log_odds')]), {}, 'without log_odds'),
    'no such metric': (changed(), dict(metric='HR3'), 'no metric'),
    'k is no number': (changed(), dict(metric='HR@x'), 'no metric'),
    'no user': (dict(FRAMES, b=[FRAMES['a'][0].drop('user')]), dict(metric='HR@3'), 'without user'),
    'no baseline': (changed(), dict(baseline='c'), "baseline='c'"),
    'alone': (FRAMES, {}, 'one more arm'),
    'no runs': (dict(FRAMES, b=[]), {}, 'b has no runs'),
    'few draws': (changed(), dict(draws=10), 'at least 100'),
}
@pytest.mark.parametrize('what', BAD)
def test_what_cannot_be_compared_is_one_line(what):
    arms, how, says = BAD[what]
    with pytest.raises(WorkbenchError, match=says) as e: compare(arms, **{'baseline': 'a', **how})
    assert '\n' not in str(e.value)

def test_as_fast_as_promised():
    g = np.random.default_rng(9); arms = two_arms(g, 3000, .5, .6, seeds=3)
    start = time.process_time(); compare(arms, 'a')
    assert (spent := time.process_time() - start) < 15, spent       # about .6 s on one core
