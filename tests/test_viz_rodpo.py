"Figures of the preference lab: the numbers drawn, what is not known, and text that looks like HTML."
import io, json, math, statistics
import numpy as np, plotly.graph_objects as go, polars as pl, pytest
from PIL import Image
from scipy.stats import binomtest
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.viz.rodpo import (STRATEGIES, drift, drift_by_draws, drift_matched, expert_load, false_negatives, false_rates, load_by_category, load_by_epoch,
                                looks, margins, negative_pictures, negatives_by_epoch, pool_curve, pool_means, probe_margins, quartiles)

R = np.random.default_rng(0)

def negatives(epochs=4, n=200, wrong=.1, planted=True, best=300):
    "A probe as `training.rodpo` writes it."
    whole = lambda low, high: R.integers(low, high, epochs*n)
    return pl.DataFrame(dict(epoch=np.repeat(np.arange(epochs), n), user=whole(0, 50), position=whole(1, 9), positive=whole(1, 21), negative=whole(1, 21),
        gap=R.normal(0, 1, epochs*n), gap_reference=R.normal(0, 1, epochs*n), rank=whole(1, best), mass=R.random(epochs*n), later=R.random(epochs*n) < wrong/2,
        planted_false=R.random(epochs*n) < wrong if planted else [None]*(epochs*n), category='c'),
        schema_overrides=dict(planted_false=pl.Boolean, epoch=pl.Int32))

def moved(n=400, least=0):
    count = R.geometric(.05, n); drawn = np.maximum(R.poisson(count*count/20)*(R.random(n) < .6), least)
    return pl.DataFrame(dict(item=range(1, n + 1), drawn=drawn, category='c', train_count=count, drift=R.normal(0, 1, n)))

def metrics(steps=12, **values):
    return pl.concat([pl.DataFrame(dict(step=range(1, steps + 1), split='train', name=n.replace('_', ' '),
                                        value=np.broadcast_to(np.asarray(v, float), steps))) for n, v in values.items()])

def experts(layers=2, n=4, categories=(None, 'a', 'b'), where=None):
    rows = [dict(layer=l, where=where or 'encoder', expert=e, category=c, load=float(v)) for l in range(layers) for c in categories
            for e, v in enumerate(R.dirichlet(np.ones(n)))]
    return pl.DataFrame(rows, schema_overrides=dict(category=pl.String))

def png(size=64):
    out = io.BytesIO(); Image.fromarray(R.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(out, 'PNG'); return out.getvalue()

def items(thumbnail=None, title='item', n=20):
    return pl.DataFrame(dict(id=range(1, n + 1), title=[f'{title} {i}' for i in range(1, n + 1)], category='c', thumbnail=[thumbnail]*n),
                        schema_overrides=dict(thumbnail=pl.Binary))

LOADS = {f'load_layer{l}_expert{e}': R.random(12) for l in range(2) for e in range(4)}
POOLS = pl.DataFrame([dict(strategy=s, pool=p, seed=n, value=.03 + k/1000 + n/5000) for k, (s, p) in enumerate(
    [('topk', 5), ('topk', 20), ('topk', 100), ('hard', None), ('uniform', None), ('base', None), ('control', None)]) for n in range(3)])
REWARDS = dict(reward_chosen=np.linspace(0, -1, 12), reward_rejected=np.linspace(0, -2, 12), margin=np.linspace(0, 1, 12), accuracy=np.linspace(.5, 1, 12))

def words(fig): return [a.text for a in fig.layout.annotations]
def named(fig): return {(t.name, t.yaxis or 'y'): t for t in fig.data}
def said(fig): return fig.layout.title.subtitle.text or ''


# ---- nothing to draw -> one clear line that names the table
ALL = {'negatives_by_epoch': (negatives_by_epoch, negatives(), 'rank'), 'false_negatives': (false_negatives, negatives(), 'epoch'),
       'drift': (drift, moved(), 'drawn'), 'margins': (margins, metrics(**REWARDS), 'value'), 'pool_curve': (pool_curve, POOLS, 'pool'),
       'expert_load': (lambda f: expert_load(f, metrics(**LOADS)), experts(), 'load'),
       'loads': (lambda f: expert_load(experts(), f), metrics(**LOADS), 'name'),
       'negative_pictures': (lambda f: negative_pictures(f, items()), negatives(), 'positive')}

@pytest.mark.parametrize('name', ALL)
def test_nothing_to_draw_is_said_in_one_line(name):
    draw, frame, column = ALL[name]; fig = draw(frame)
    assert isinstance(fig, go.Figure) and fig.layout.width is None and fig.layout.autosize
    for bad, says in ((frame.clear(), 'no rows'), (frame.drop(column), f'column {column} is missing'), (None, 'NoneType')):
        with pytest.raises(WorkbenchError, match=says) as e: draw(bad)
        assert '\n' not in str(e.value)

NOTHING = pl.lit(None, pl.Float64)

@pytest.mark.parametrize('draw, says', [
    (lambda: negatives_by_epoch({}), 'no run'), (lambda: negatives_by_epoch(dict(a=negatives(), b=negatives().clear())), 'of b'),
    (lambda: negatives_by_epoch(negatives().with_columns(gap=NOTHING, rank=NOTHING)), 'no finite gap'),
    (lambda: false_negatives(negatives(planted=False).drop('later')), 'neither later nor planted_false'),
    (lambda: drift(moved().with_columns(drift=NOTHING)), 'no item has a finite drift'), (lambda: margins(metrics(loss=1)), 'no reward'),
    (lambda: margins(metrics(**REWARDS), negatives=negatives().drop('gap_reference')), 'gap_reference is missing'),
    (lambda: pool_curve(POOLS.with_columns(value=NOTHING)), 'no rows'), (lambda: expert_load(experts(categories=('a',)), metrics(**LOADS)), 'no load of all'),
    (lambda: expert_load(experts().filter(pl.col('category').is_not_null() | (pl.col('layer') == 0)), metrics(**LOADS)), 'no load of all'),
    (lambda: expert_load(experts().with_columns(load=NOTHING), metrics(**LOADS)), 'no load of all'),
    (lambda: negative_pictures(negatives(), items(), user=999), 'user 999'), (lambda: negative_pictures(negatives(), items(), epoch=99), 'epoch 99')])
def test_what_cannot_be_drawn_is_said(draw, says):
    with pytest.raises(WorkbenchError, match=says): draw()


# ---- the look of a strategy
def test_a_strategy_keeps_its_colour():
    for s, (colour, symbol) in STRATEGIES.items():
        assert looks(['other', s])[s] == looks([f'{s}, pool 7'])[f'{s}, pool 7'] == dict(colour=colour, symbol=symbol, dash='solid')
    many = looks([*STRATEGIES, *(f'topk {i}' for i in range(24))]); assert len({tuple(v.values()) for v in many.values()}) == 32
    fig = negatives_by_epoch(dict(topk=negatives(), hard=negatives())); assert named(fig)['hard', 'y'].line.color == STRATEGIES['hard'][0]

@pytest.mark.parametrize('runs', [1, 3, 12])
def test_every_run_is_named_once_and_the_legend_has_room(runs):
    frames = {f'a run with a long name {i}': negatives(3, 20) for i in range(runs)}
    for draw in (negatives_by_epoch, false_negatives):
        fig = draw(frames); shown = [t.name for t in fig.data if t.showlegend is not False]
        assert shown == list(frames) and fig.layout.showlegend == (runs > 1)
        assert fig.layout.margin.t >= 94 + 20*(runs > 1) + 29*(runs//4) and fig.layout.height > fig.layout.margin.t + 200


# ---- how hard
def test_medians_and_quartiles_are_those_of_the_frame():
    frames = dict(hard=negatives(best=2), topk=negatives(best=20)); line = named(negatives_by_epoch(frames))
    for s, f in frames.items():
        for column, axis in (('gap', 'y'), ('rank', 'y2')):
            per = [f.filter(epoch=e)[column].to_numpy() for e in range(4)]
            for name, q in ((s, .5), (f'{s}: low', .25), (f'{s}: high', .75)): assert np.allclose(line[name, axis].y, [np.quantile(v, q) for v in per])
    assert list(line['topk', 'y'].x) == [0, 1, 2, 3]

def test_ranks_have_a_log_axis_that_holds_them():
    fig = negatives_by_epoch(negatives(best=10_000)); low, high = fig.layout.yaxis2.range
    assert fig.layout.yaxis2.type == 'log' and low < 0 and high > np.log10(np.quantile(negatives(best=10_000)['rank'], .7))

def test_what_is_not_finite_does_not_count():
    f = negatives(2, 50); holes = pl.concat([f, f[:9].with_columns(gap=pl.lit(math.nan)), f[:9].with_columns(gap=pl.lit(None, pl.Float64))])
    assert quartiles(f, 'gap').equals(quartiles(holes, 'gap'))
    only = named(negatives_by_epoch(f.with_columns(gap=NOTHING))); assert ('drawn negatives', 'y2') in only and ('drawn negatives', 'y') not in only

def test_one_epoch_has_whiskers():
    f = negatives(1); t = named(negatives_by_epoch(f))['drawn negatives', 'y']; v = f['gap'].to_numpy()
    assert np.allclose([t.y[0] - t.error_y.arrayminus[0], t.y[0] + t.error_y.array[0]], np.quantile(v, [.25, .75]))
    two = named(negatives_by_epoch(dict(a=f, b=f))); assert two['a', 'y'].x[0] < 0 < two['b', 'y'].x[0]


# ---- how false
@pytest.mark.parametrize('wrong', [0., .03, .5, 1.])
def test_rates_have_wilson_intervals(wrong):
    f = negatives(3, 80, wrong); rows = false_rates(f)
    for r in rows.iter_rows(named=True):
        part = f.filter(epoch=r['epoch']); k = part[r['kind']].sum(); ends = binomtest(k, 80).proportion_ci(.95, 'wilson')
        assert (r['false'], r['drawn']) == (k, 80) and np.allclose([r['rate'], r['low'], r['high']], [k/80, ends.low, ends.high])
        assert np.isclose(r['mass_share'], part.filter(pl.col(r['kind']))['mass'].sum()/part['mass'].sum())
    line = named(false_negatives(f)); planted = rows.filter(kind='planted_false')
    assert np.allclose(line['drawn negatives', 'y'].y, planted['rate']) and np.allclose(line['drawn negatives', 'y2'].y, planted['mass_share'])
    assert np.allclose(line['drawn negatives: high', 'y3'].y, rows.filter(kind='later')['high'])

def test_what_is_not_known_is_left_out_and_said():
    real = negatives(planted=False); fig = false_negatives(real, 'run'); assert 'planted truth: not known' in said(fig) and 'run · planted' not in said(fig)
    assert {t.yaxis for t in fig.data} == {'y', 'y2'} and "The user's own later items" in ' '.join(words(fig)) and 'would have' not in ' '.join(words(fig))
    light = false_negatives(real.drop('mass')); assert 'gradient mass: not known' in said(light) and {t.yaxis for t in light.data} == {'y'}
    mixed = false_negatives(dict(hard=negatives(), topk=real)); assert 'planted truth: not known for topk' in said(mixed) and said(mixed).startswith('planted')
    assert ('topk', 'y') not in named(mixed) and ('topk', 'y3') in named(mixed)
    part = negatives(2, 10).with_columns(planted_false=pl.when(pl.col('epoch') == 1).then('planted_false'))
    assert false_rates(part).filter(kind='planted_false').height == 1

def test_no_mass_at_all_has_no_share():
    flat = negatives().with_columns(mass=pl.lit(0.)); assert false_rates(flat)['mass_share'].null_count() == len(false_rates(flat))
    assert 'gradient mass: not known' in said(false_negatives(flat))

def test_planted_truth_is_in_the_title():
    assert 'planted' in said(false_negatives(negatives())) and 'planted' in said(negative_pictures(negatives(1, 8, wrong=1.), items()))
    assert said(false_negatives(negatives(), 'rodpo on toys (planted), seed 0')).count('planted') == 1


# ---- drift
def test_boxes_are_quantiles_by_draws():
    f = moved(); fig = drift(f, 'run'); t = drift_by_draws(f)
    groups = dict(zip(t['label'], zip(*(fig.data[0][k] for k in ('q1', 'median', 'q3', 'lowerfence', 'upperfence')))))
    for label, low, high in (('never', 0, 0), ('1+', 1, 9), ('10+', 10, 99)):
        v = f.filter(pl.col('drawn').is_between(low, high))['drift'].to_numpy(); assert np.allclose(groups[label], np.quantile(v, [.25, .5, .75, .05, .95]))
    assert t['items'].sum() == 400 and '400 items' in said(fig)

@pytest.mark.parametrize('drawn, label', [(9, '1+'), (10, '10+'), (99, '10+'), (999, '100+'), (1000, '1k+'), (99_999, '10k+'), (10**6, '1,000k+')])
def test_groups_of_draws(drawn, label): assert drift_by_draws(moved(3).with_columns(drawn=pl.lit(drawn)))['label'].to_list() == [label]

def test_like_is_compared_with_like():
    f = moved(); m = drift_matched(f, 4); fig = drift(f); never, taken = fig.data[1:]
    assert m['n_never'].sum() + m['n_drawn'].sum() == 400 and (m['low'][1:] > m['high'][:-1]).all() and 50 < (m['n_never'] + m['n_drawn']).min()
    for r in m.iter_rows(named=True):
        of = f.filter(pl.col('train_count').is_between(r['low'], r['high']))
        assert np.isclose(r['never'], of.filter(drawn=0)['drift'].median()) and np.isclose(r['drawn'], of.filter(pl.col('drawn') > 0)['drift'].median())
    m = drift_matched(f); assert list(never.y) == m['never'].to_list() and list(taken.y) == m['drawn'].to_list()

def test_all_drawn_none_drawn_and_one_item():
    assert 'every item was drawn' in said(drift(moved(least=1))) and 'no item was drawn' in said(drift(moved().with_columns(drawn=pl.lit(0))))
    assert '1 item ' in said(drift(moved(1))) and drift_matched(moved().with_columns(train_count=pl.lit(3))).height == 1


# ---- rewards
def test_rewards_are_drawn_as_recorded():
    fig = margins(metrics(**REWARDS)); line = {t.name: t for t in fig.data}
    for name, called in zip(REWARDS, ('chosen', 'rejected', 'margin', 'accuracy')): assert np.allclose(line[called].y, REWARDS[name])
    assert {s.y0 for s in fig.layout.shapes} == {0, .5} and len(margins(metrics(margin=1)).data) == 1

def test_the_probes_margin_stands_beside():
    f = negatives(); per = [f.filter(epoch=e) for e in (1, 2, 3)]; d = [.1*(p['gap'] - p['gap_reference']).to_numpy() for p in per]
    line = named(margins(metrics(**REWARDS), negatives=f, beta=.1)); probe = 'probe, without dropout'
    assert np.allclose(line[probe, 'y2'].y, [v.mean() for v in d]) and np.allclose(line[probe, 'y3'].y, [(v > 0).mean() for v in d])
    assert list(line[probe, 'y2'].x) == [1, 2, 3] and probe_margins(f.filter(epoch=0)).is_empty()
    assert isinstance(margins(metrics(**REWARDS), negatives=f.filter(epoch=0)), go.Figure)


# ---- pools
def test_pools_means_and_bands():
    fig = pool_curve(POOLS, 'data'); line = {t.name: t for t in fig.data}; v = lambda **k: POOLS.filter(**k)['value'].to_list()
    assert np.allclose(line['topk'].y, [np.mean(v(strategy='topk', pool=p)) for p in (5, 20, 100)]) and np.allclose(line['topk'].x, np.log10([5, 20, 100]))
    assert list(line['hard'].x) == [0] and line['uniform'].x[0] > 2 and np.allclose(line['uniform'].y, np.mean(v(strategy='uniform')))
    for level in ('base', 'control'):
        mean, sd = statistics.mean(v(strategy=level)), statistics.stdev(v(strategy=level))
        assert np.allclose(line[level].y, mean) and np.allclose(sorted(set(line[f'{level}: band'].y)), [mean - sd, mean + sd])
    assert sorted(line['topk: seeds'].y) == sorted(v(strategy='topk')) and '3 seeds' in said(fig)
    assert dict(zip(fig.layout.xaxis.ticktext, fig.layout.xaxis.tickvals))['1<br>hard'] == 0

def test_pools_of_any_kind():
    one = pool_curve(POOLS.filter(seed=0)); assert '1 seed' in said(one) and not any('band' in t.name for t in one.data)
    some = pool_curve(POOLS.filter((pl.col('seed') == 0) | (pl.col('strategy') == 'topk'))); assert '1 to 3 seeds' in said(some)
    text = POOLS.with_columns(pl.col('pool').cast(pl.String)); assert pool_means(text).equals(pool_means(POOLS))      # as csv may give it
    for only in (pl.col('pool').is_null(), pl.col('strategy') == 'base', pl.col('strategy') == 'uniform'): assert len(pool_curve(POOLS.filter(only)).data) >= 2
    filled = POOLS.with_columns(pl.col('pool').fill_null(20)); assert list({t.name: t for t in pool_curve(filled).data}['hard'].x) == [0]


# ---- experts
def test_loads_by_epoch_and_category():
    f, m = experts(), metrics(**LOADS, loss=1); fig = expert_load(f, m); lines, maps = ([t for t in fig.data if t.type == k] for k in ('scatter', 'heatmap'))
    assert load_by_epoch(m).height == 8*12
    for t, v in zip(lines, LOADS.values()): assert np.allclose(t.y, v)
    for layer, t in enumerate(maps):
        load = np.array([[f.filter(pl.col('category').eq_missing(pl.lit(c)), layer=layer, expert=e)['load'][0] for e in range(4)] for c in (None, 'a', 'b')])
        assert np.allclose(np.array(t.z, float), load*4, atol=1e-4) and t.text[1][2] == f'{load[1, 2]:.0%}'
    assert [t.showlegend for t in lines] == [True]*4 + [False]*4

@pytest.mark.parametrize('layers', [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize('trained', [True, False])
def test_any_number_of_layers(layers, trained):
    m = metrics(**{f'load_layer{l}_expert{e}': .25 for l in range(layers) for e in range(4)}) if trained else metrics(loss=1)
    fig = expert_load(experts(layers), m); shown = min(layers, 6); place = fig.to_dict()['layout']
    assert sum(t.type == 'heatmap' for t in fig.data) == shown and sum(t.type == 'scatter' for t in fig.data) == 4*shown*trained
    boxes = [(place['xaxis' + t.yaxis[1:]]['domain'], place['yaxis' + t.yaxis[1:]]['domain']) for t in fig.data if t.type == 'heatmap' or t.name == 'expert 0']
    for i, ((a, b), (c, d)) in enumerate(boxes):
        for (e, f), (g, h) in boxes[:i]: assert a >= f or e >= b or c >= h or g >= d                        # no panel lies on another
    assert ('of 8 layers' in said(fig)) == (layers == 8) and ('not recorded' in said(fig)) != trained

def test_experts_of_named_encoders_and_holes():
    assert any('text' in w for w in words(expert_load(experts(1, where='encoders.text.blocks.0'), metrics(**LOADS))))
    f = experts().filter(pl.col('category').ne_missing('a') | (pl.col('layer') == 0)); kinds, tables = load_by_category(f)
    assert np.isnan(tables['1'][kinds.index('a')]).all() and isinstance(expert_load(f, metrics(**LOADS)), go.Figure)
    many = expert_load(experts(categories=(None, *(f'c{i}' for i in range(40)))), metrics(**LOADS))
    assert '14 of 40 categories' in said(many)


# ---- pictures and text are data
def test_pictures_of_false_negatives_are_framed():
    f = negatives(2, 8, wrong=.6); last = f.filter(epoch=1); at = last.select('user', 'position', 'positive').unique(maintain_order=True).head(3)
    fig = negative_pictures(f, items(png()), examples=3); rows = last.join(at, on=['user', 'position', 'positive'], how='semi')
    assert len(fig.layout.images) == 3 + len(rows) and 'epoch 1' in said(fig)
    assert sum(s.line.width == 3 for s in fig.layout.shapes) == (rows['later'] | rows['planted_false']).sum()
    best = rows.filter(user=at['user'][0], position=at['position'][0]).sort('rank')['rank'][0]; assert f'rank {best}<' in ' '.join(words(fig))
    only = negative_pictures(f, items(), user=int(last['user'][5])); assert sum(f'user {last["user"][5]}' in w for w in words(only)) >= 1

def test_pictures_that_are_missing_or_broken():
    for frame in (items(), items(b'broken'), items(n=1), items().drop('thumbnail')):
        assert len(negative_pictures(negatives(), frame).layout.images) == 0
    bare = negatives(1, 8).drop('later', 'planted_false'); fig = negative_pictures(bare, items(), 'real'); assert said(fig) == 'real · epoch 0'

@pytest.mark.parametrize('text', ['<b>bold</b>', '<a href="javascript:alert(1)">x</a>', '$E=mc^2$'])
def test_names_are_drawn_letter_for_letter(text):
    one = {text: negatives(2, 20), 'b': negatives(2, 20)}
    for fig in (negatives_by_epoch(one, text), false_negatives(one, text), drift(moved(), text), margins(metrics(**REWARDS), text),
                pool_curve(POOLS.with_columns(strategy=pl.lit(text)), text, text), negative_pictures(negatives(1, 8), items(title=text), text),
                expert_load(experts(categories=(None, text)), metrics(**LOADS), text)):
        drawn = fig.to_dict(); [t.pop('legendgroup', None) for t in drawn['data']]                          # a key, never drawn
        assert json.dumps(text)[1:-1] not in json.dumps(drawn, default=str)

def test_figures_stay_small():
    big = {s: negatives(21, 2000) for s in STRATEGIES}; pictures = negatives(1, 400)
    for fig in (negatives_by_epoch(big), false_negatives(big), drift(moved(12_000)), negative_pictures(pictures, items(png(300)), examples=6),
                expert_load(experts(6, 8), metrics(20, **{f'load_layer{l}_expert{e}': .1 for l in range(6) for e in range(8)}))):
        assert len(fig.to_json()) < 150_000
