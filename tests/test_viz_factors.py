"Figures of sparse factors and MISP-DPO: the numbers drawn, what is not known, text that looks like HTML, and that no two things lie on each other."
import io, json, math
import numpy as np, plotly.graph_objects as go, polars as pl, pytest
from PIL import Image
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.viz.factors import (called, effective, factor_cards, factor_map, gaps_by_strategy, groups, purity, sae_curves, selection_view, telling)
from mmrec_wb.viz.rodpo import STRATEGIES, looks

R = np.random.default_rng(0)
TRUTH = ('planted_factor', 'planted_level', 'planted_auc')

def png(size=64):
    out = io.BytesIO(); Image.fromarray(R.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(out, 'PNG'); return out.getvalue()

def items(thumbnail=None, title='item', n=40):
    return pl.DataFrame(dict(id=range(1, n + 1), title=[f'{title} {i}' for i in range(1, n + 1)], category='c', thumbnail=[thumbnail]*n),
                        schema_overrides=dict(thumbnail=pl.Binary))

def factors(units=12, planted=True, dead=2):
    rows = [dict(unit=u, mean=.1, share=0. if u >= units - dead else float(R.random()), highest=1., dead=u >= units - dead, norm=1 + float(R.random()),
                 x=float(R.normal()),
                 y=float(R.normal()), words=[f'word{u}', 'toy'], planted_factor=('colour', 'theme', 'shape')[u % 3] if planted else None,
                 planted_level=f'level{u}' if planted else None, planted_auc=.95 - .03*u if planted else None) for u in range(units)]
    return pl.DataFrame(rows, schema_overrides=dict(unit=pl.Int32, planted_factor=pl.String, planted_level=pl.String, planted_auc=pl.Float64))

def pairs(units=12, n=8, lone=False):
    return pl.DataFrame([dict(unit=u, place=k + 1, user=u, positive=1 + (u + k) % 40, negative=None if lone else 1 + (u*k + 7) % 40,
                              z=1 - .1*k) for u in range(units)
                         for k in range(n)], schema_overrides=dict(negative=pl.Int64))

def histogram(units=12):
    return pl.DataFrame([dict(unit=u, left=b/20, right=(b + 1)/20, count=int(c)) for u in range(units) for b, c in enumerate(R.integers(0, 10**(u % 7), 20))])

def truth(units=12):
    return pl.DataFrame([dict(unit=u, factor=f, level=l, auc=float(R.random()), sign=1) for u in range(units) for f in ('colour', 'theme') for l in 'abc'])

def selection(examples=3, pool=50, k=3, drawn=False):
    out = []
    for e in range(examples):
        difficulty, deviation = R.random(pool), R.random(pool); picks = R.permutation(pool)[:k]; logq = np.log(R.dirichlet(np.ones(pool)))
        pick, diversity = [None]*pool, [None]*pool
        for n, i in enumerate(picks): pick[i] = n + 1; diversity[i] = None if drawn else .2*n
        out.append(pl.DataFrame(dict(example=e, user=90 + e, positive=e + 1, candidate=1 + R.permutation(pool)[:pool] % 40,
                                     similarity=R.permutation(pool)/pool, difficulty=difficulty,
                   deviation=deviation, score=difficulty + deviation, diversity=diversity, pick=pick, logq=logq if drawn else None),
                   schema_overrides=dict(diversity=pl.Float32, pick=pl.Int64, logq=pl.Float64)))
    return pl.concat(out)

def metrics(split='preference', steps=12, **values):
    return pl.concat([pl.DataFrame(dict(step=range(1, steps + 1), split=split, name=n, value=np.broadcast_to(np.asarray(v, float), steps))) for n,
                      v in values.items()])

def gaps(strategies=('sae', 'uniform'), n=60, stages=('before', 'after'), likeness=True):
    out = [dict(strategy=s, stage=t, example=i//3, negative=i, gap=float(R.normal(k)), similarity=.9 - .1*k - i/1000 if likeness else None) for k,
           s in enumerate(strategies)
           for t in stages for i in range(n)]
    return pl.DataFrame(out, schema_overrides=dict(similarity=pl.Float64))

def cards(f=None, p=None, h=None, i=None, **more):
    return factor_cards(factors() if f is None else f, pairs() if p is None else p, histogram() if h is None else h, items() if i is None else i, **more)

LEARNED = dict(reconstruction=np.linspace(1, .2, 12), explained_variance=np.linspace(.1, .8, 12), L0=np.linspace(9, 4, 12), dead=np.linspace(.3, 0, 12))
WEIGHTS = dict(ess=np.linspace(3, 1, 12), weight_max=np.linspace(1/3, 1, 12))

def words(fig): return [a.text for a in fig.layout.annotations]
def said(fig): return fig.layout.title.subtitle.text or ''
def named(fig): return {t.name: t for t in fig.data}


# ---- nothing to draw -> one clear line that names the table
ALL = {'factors': (lambda f: factor_cards(f, pairs(), histogram(), items()), factors(), 'words'),
       'pairs': (lambda f: factor_cards(factors(), f, histogram(), items()), pairs(), 'z'),
       'histogram': (lambda f: factor_cards(factors(), pairs(), f, items()), histogram(), 'count'),
       'items': (lambda f: factor_cards(factors(), pairs(), histogram(), f), items(), 'title'), 'map': (factor_map, factors(), 'x'),
       'selection': (lambda f: selection_view(f, items()), selection(), 'score'),
       'items of a selection': (lambda f: selection_view(selection(), f), items(), 'id'),
       'effective': (effective, metrics(**WEIGHTS), 'value'), 'gaps': (gaps_by_strategy, gaps(), 'stage'),
       'curves': (sae_curves, metrics('train', **LEARNED), 'name')}

@pytest.mark.parametrize('name', ALL)
def test_nothing_to_draw_is_said_in_one_line(name):
    draw, frame, column = ALL[name]; fig = draw(frame)
    assert isinstance(fig, go.Figure) and fig.layout.width is None and fig.layout.autosize
    for bad, says in ((frame.clear(), 'no rows'), (frame.drop(column), f'column {column} is missing'), (None, 'NoneType')):
        with pytest.raises(WorkbenchError, match=says) as e: draw(bad)
        assert '\n' not in str(e.value)

NOTHING = pl.lit(None, pl.Float64)

@pytest.mark.parametrize('draw, says', [
    (lambda: cards(units=[3, 99]), 'no unit 99; units run from 0 to 11'), (lambda: cards(units=[]), 'none was named'),
    (lambda: cards(truth=truth().drop('auc')), 'factor_truth: column auc is missing'), (lambda: factor_map(factors().with_columns(x=NOTHING)),
        'no unit has a place'),
    (lambda: selection_view(selection(), items(), 77), 'example 77 is not in the table; it has 3 examples, e.g. 0'), (lambda: effective(metrics(loss=1)),
        'no ess'),
    (lambda: effective(metrics('sft', **WEIGHTS)), "split 'preference' or 'train'"), (lambda: gaps_by_strategy(gaps().with_columns(gap=NOTHING)),
        'no finite gap'),
    (lambda: gaps_by_strategy(gaps(stages=('later',))), "stage 'before' or 'after'"), (lambda: sae_curves(metrics(**LEARNED)), 'no reconstruction')])
def test_what_cannot_be_drawn_is_said(draw, says):
    with pytest.raises(WorkbenchError, match=says): draw()


# ---- which units, and what they know
def test_planted_units_come_by_what_they_know_each_factor_once():
    order = telling(factors()); assert order['unit'][:3].to_list() == [0, 1, 2] and order['dead'].to_list() == [False]*10 + [True]*2
    some = factors().with_columns(planted_factor=pl.lit('colour')); assert telling(some)['unit'][:10].to_list() == list(range(10))

def test_other_units_come_by_what_they_move():
    f = factors(planted=False); order = telling(f); p = order['share'].to_numpy(); v = np.sqrt(p*(1 - p))*order['norm'].to_numpy()
    assert (np.diff(v[:10]) <= 0).all() and order['dead'][-2:].all() and set(order['unit']) == set(range(12))
    assert telling(f.drop(*TRUTH, 'norm'))['dead'][-2:].all() and telling(f.with_columns(share=pl.lit(1.)))['unit'][-2:].to_list() == [10, 11]

def test_purity_has_the_best_factor_and_the_best_of_another():
    t = truth()
    for u in range(12):
        best, then = purity(dict(unit=u), t); of = t.filter(unit=u).with_columns(auc=pl.max_horizontal('auc', 1 - pl.col('auc')))
        assert best[2] == of['auc'].max() and then[2] == of.filter(pl.col('factor') != best[0])['auc'].max() and {best[0], then[0]} == {'colour', 'theme'}
        row = dict(unit=u, planted_factor='theme', planted_level='b', planted_auc=.6); best, then = purity(row, t.with_columns(sign=pl.lit(-1)))
        assert best == ('theme', 'b', .6, -1) and then[:3] == of.filter(factor='colour').sort('auc')[-1].select('factor', 'level',
            'auc').row(0)    # the record's own
    assert purity(dict(unit=1, planted_factor='age', planted_level=None, planted_auc=.8)) == [('age', None, .8, 1)] and purity(dict(unit=1,
        planted_auc=None)) == []
    assert purity(dict(unit=77), t) == [] and called('age', 'teen', -1) == 'not age: teen' and called('age') == 'age differs' and called('age', None,
        -1) == 'same age'

def test_groups_follow_truth_or_liveliness():
    f = factors()
    assert groups(f, .79).to_list() == ['knows colour', 'knows theme', 'knows shape', 'knows colour', 'knows theme', 'knows shape'] + ['none']*4 + ['dead']*2
    p = f.drop(TRUTH).with_columns(share=pl.Series([0., .0099, .01, .5, .51, 1., None] + [.2]*5))
    assert groups(p).to_list() == ['rarely', 'rarely', 'often', 'often', 'mostly', 'mostly', 'rarely'] + ['often']*3 + ['dead']*2


# ---- cards
def test_cards_draw_the_frames():
    h, p = histogram(), pairs(); fig = cards(h=h, p=p, i=items(png()), units=[5, 2], title='run'); bars = {t.yaxis: t for t in fig.data}
    for axis, u in (('y', 5), ('y2', 2)):
        of = h.filter(unit=u)
        assert list(bars[axis].y) == of['count'].to_list() and list(bars[axis].x) == of['left'].to_list() and np.allclose(bars[axis].width, .05)
    text = ' '.join(words(fig)); assert len(fig.layout.images) == 2*4*2 and text.index('Unit 5<') < text.index('Unit 2<') and '2 of 12 units' in said(fig)
    for r in p.filter(pl.col('unit') == 5, pl.col('place') <= 4).iter_rows(named=True):
        assert f'item {r["positive"]}<' in text and f'z {r["z"]:.2f}, user 5' in text
    assert 'colour: level0' not in text and 'shape: level5' in text and 'AUC .80' in text and 'word5, toy' in text

def test_planted_is_said_and_only_where_it_is_known():
    assert 'planted' in said(cards()) and 'planted' in said(factor_map(factors())) and said(cards(title='sae on toys (planted)')).count('planted') == 1
    real = factors(planted=False); fig = cards(real); assert 'planted' not in said(fig) + ' '.join(words(fig)) and 'AUC' not in ' '.join(words(fig))
    assert 'planted' not in said(factor_map(real.drop(TRUTH))) and 'planted' in said(cards(real, truth=truth())) and 'planted' not in said(cards(real,
        truth=truth().clear()))

def test_plain_items_have_one_picture():
    fig = cards(p=pairs(lone=True).with_columns(user=pl.lit(None)), i=items(png()))
    assert 'user' not in ' '.join(words(fig)) and len(fig.layout.images) == 16 and any('items that switch it on' in w for w in words(fig))
    assert len(cards(p=pairs(lone=True).drop('negative'), i=items(png())).layout.images) == 16

def test_units_without_pairs_histogram_or_words():
    f = factors().with_columns(words=pl.lit(None, pl.List(pl.String)))
    fig = cards(f, pairs().filter(pl.col('unit') != 3), histogram().filter(pl.col('unit') != 3), units=[3, 11])
    assert any('no pair switches it on' in w for w in words(fig)) and any('(no words)' in w for w in words(fig)) and len(fig.data) == 1
    assert any('never on' in w for w in words(fig)) and '2 dead' in said(fig)

@pytest.mark.parametrize('count', [0, 1, 9, 10, 999, 1000, 10**7])
def test_counts_of_any_size_have_ticks_they_fit(count):
    fig = cards(h=histogram().with_columns(count=pl.lit(count)), units=[1]); axis = fig.layout.yaxis
    assert 1 <= len(axis.tickvals) <= 4 and axis.range[0] < 0 < axis.range[1] and max(axis.tickvals) <= 10**axis.range[1]
    assert axis.range[1] >= math.log10(max(count, 1))

@pytest.mark.parametrize('n', [1, 4, 5, 8, 20])
def test_cards_do_not_lie_on_each_other(n):
    fig = cards(i=items(png()), examples=n, units=range(6)); images = fig.layout.images; high = fig.layout.height - fig.layout.margin.t - fig.layout.margin.b
    assert len(images) == 6*min(n, 8)*2
    boxes = [(i.x - i.sizex/2, i.x + i.sizex/2, (i.y - i.sizey)*high, i.y*high) for i in images]
    boxes += [(0, .27, fig.layout[f'yaxis{k or ""}'].domain[0]*high, fig.layout[f'yaxis{k or ""}'].domain[1]*high) for k in (0, 2, 3, 4, 5, 6)]
    for k, (a, b, c, d) in enumerate(boxes):
        assert a > -.001 and b < 1.001 and c > 0 and d <= high
        for e, f, g, h in boxes[:k]: assert a >= f - 1e-9 or e >= b - 1e-9 or c >= h - 1e-9 or g >= d - 1e-9


# ---- the map
def test_the_map_has_every_unit_at_its_place():
    f = factors(); fig = factor_map(f); at = {u: (x, y, s, t.name) for t in fig.data for u, x, y, s in zip(t.customdata, t.x, t.y, t.marker.size)}
    most = f['share'].max()
    assert sorted(at) == list(range(12))
    for r in f.iter_rows(named=True):
        x, y, size, group = at[r['unit']]; assert (x, y) == (r['x'], r['y']) and np.isclose(size, 7 if r['dead'] else 5 + 23*math.sqrt(r['share']/most))
        assert group.startswith('dead' if r['dead'] else r['planted_factor'] if r['planted_auc'] >= .7 else 'none (AUC below .70)')
    texts = [t for trace in fig.data for t in trace.text]; assert any('unit 4: word4, toy' in t and 'theme: level4, AUC .83' in t for t in texts)

def test_marks_of_the_map_differ_and_labels_have_room():
    many = factors(128, dead=0).with_columns(planted_factor=pl.Series([f'f{u % 13}' for u in range(128)]), planted_auc=pl.lit(.9)); fig = factor_map(many)
    assert len({(t.marker.color, t.marker.symbol) for t in fig.data}) == 13
    labels = [a for a in fig.layout.annotations if a.xref == 'x']; assert 0 < len(labels) <= 16
    high, wide = 400, 612; place = lambda v, r, n: (v - r[0])/(r[1] - r[0])*n
    boxes = [(x - 3.4*len(a.text), x + 3.4*len(a.text), y, y + 14) for a in labels for x,
             y in [(place(a.x, fig.layout.xaxis.range, wide), place(a.y, fig.layout.yaxis.range, high) + a.yshift)]]
    for k, (a, b, c, d) in enumerate(boxes):
        for e, f, g, h in boxes[:k]: assert a >= f or e >= b or c >= h - 1 or g >= d - 1

def test_a_map_of_one_unit_and_of_dead_ones():
    assert len(factor_map(factors(1, dead=0)).data) == 1
    fig = factor_map(factors(3, dead=3)); assert [t.name for t in fig.data] == ['dead: 3'] and not [a for a in fig.layout.annotations if a.xref == 'x']


# ---- one example
def test_the_chosen_have_their_scores():
    f = selection(); fig = selection_view(f, items(png()), example=1, title='run'); of = f.filter(example=1); picks = of.drop_nulls('pick').sort('pick')
    t = named(fig)
    for s in ('difficulty', 'deviation', 'diversity'): assert np.allclose(t[s].y, picks[s]) and list(t[s].x) == [0, 1, 2]
    assert set(zip(t['chosen'].x, t['chosen'].y, t['chosen'].text)) == set(zip(picks['similarity'], picks['score'], map(str, picks['pick'])))
    assert set(zip(t['in the pool'].x, t['in the pool'].y)) == set(of.filter(pl.col('pick').is_null()).select('similarity', 'score').rows())
    assert 'user 91' in said(fig) and 'pool of 50' in said(fig) and len(fig.layout.images) == 1 + 3 + 8

def test_the_pool_is_shown_most_similar_first_and_the_chosen_are_framed():
    f = selection(1, 12, 3); fig = selection_view(f, items(), most=12); ranked = f.sort('similarity', descending=True)
    shown = [w for w in words(fig) if '>s ' in w]
    assert len(shown) == 12 and all(f'item {i}' in w.replace('<br>', ' ') for i, w in zip(ranked['candidate'], shown))
    assert sum(s.line.width == 3 for s in fig.layout.shapes) == 3

def test_drawn_ones_have_a_probability_and_no_diversity():
    f = selection(drawn=True); fig = selection_view(f, items()); of = f.filter(example=0); q = of['logq'].exp().to_numpy(); t = named(fig)
    assert 'diversity' not in t and f'effective support {1/(q*q).sum():.3g}' in said(fig)
    for v in of.drop_nulls('pick')['logq']: assert any(f'q {math.exp(v):.3g}' in w for w in words(fig))
    bare = selection().drop('logq', 'diversity'); assert 'diversity' not in named(selection_view(bare, items()))

def test_pools_of_any_size():
    none = selection(1).with_columns(pick=pl.lit(None, pl.Int64)); fig = selection_view(none, items())
    assert any('none of the pool was chosen' in w for w in words(fig))
    assert isinstance(selection_view(selection(1, 1, 1), items()), go.Figure) and isinstance(selection_view(selection(1, 50, 9), items()), go.Figure)
    holes = selection(1).with_columns(similarity=pl.lit(math.nan)); assert any('cosine –' in w for w in words(selection_view(holes, items())))

@pytest.mark.parametrize('k', [1, 3, 5, 6])
def test_nothing_of_an_example_lies_on_another(k):
    fig = selection_view(selection(1, 50, k), items(png())); high = fig.layout.height - fig.layout.margin.t - fig.layout.margin.b
    boxes = [(i.x - i.sizex/2, i.x + i.sizex/2, (i.y - i.sizey)*high, i.y*high) for i in fig.layout.images] + \
            [(.26, 1, *(v*high for v in fig.layout.yaxis.domain)), (0, 1, *(v*high for v in fig.layout.yaxis2.domain))]
    for n, (a, b, c, d) in enumerate(boxes):
        for e, f, g, h in boxes[:n]: assert a >= f - 1e-9 or e >= b - 1e-9 or c >= h - 1e-9 or g >= d - 1e-9


# ---- weights
def test_effective_is_drawn_as_recorded_under_its_ceiling():
    fig = effective(metrics(**WEIGHTS), 'run', k=3); t = named(fig)
    for n, v in WEIGHTS.items(): assert np.allclose(t[n].y, v) and list(t[n].x) == list(range(1, 13))
    assert {s.y0 for s in fig.layout.shapes} == {3, 1/3} and fig.layout.yaxis.range[1] > 3 and any('K = 3' in w for w in words(fig))
    assert not effective(metrics(**WEIGHTS)).layout.shapes and fig.layout.xaxis.title.text == 'optimiser step'

def test_long_runs_are_smoothed_and_epochs_are_named():
    v = 2 + R.normal(0, .1, 400); t = named(effective(metrics(steps=400, ess=v, weight_max=1/v))); mean = next(t[n] for n in t if n.startswith('ess, mean of'))
    assert np.allclose(t['ess'].y, v) and np.std(mean.y) < np.std(v)/2
    fig = effective(metrics('train', **WEIGHTS)); assert fig.layout.xaxis.title.text == 'epoch'
    one = effective(metrics(ess=2)); assert 'weight_max: not recorded' in said(one) and len(one.data) == 1


# ---- gaps
def test_gaps_are_quartiles_by_strategy_and_stage():
    f = gaps(('sae', 'topk', 'uniform')); t = named(gaps_by_strategy(f)); style = looks(['sae', 'topk', 'uniform'])
    for s in ('sae', 'topk', 'uniform'):
        for stage, label in (('before', 'before stage 2'), ('after', 'after stage 2')):
            v = f.filter(strategy=s, stage=stage)['gap'].to_numpy(); m = t[f'{s}, {label}']
            assert np.allclose([m.x[0] - m.error_x.arrayminus[0], m.x[0], m.x[0] + m.error_x.array[0]], np.quantile(v, [.25, .5, .75]))
            assert m.marker.line.color == style[s]['colour'] and m.marker.symbol == style[s]['symbol'] and (m.marker.color == 'white') == (stage == 'before')
        assert np.isclose(t[f'{s}, similarity'].x[0], np.median(f.filter(strategy=s, stage='before')['similarity']))                 # a pair counts once
    assert 'sae' in STRATEGIES and len({m.y for m in [t[f'{s}, before stage 2'] for s in ('sae', 'topk', 'uniform')]}) == 3

def test_gaps_where_something_is_not_known():
    assert 'similarity: not recorded' in said(gaps_by_strategy(gaps(likeness=False)))
    assert 'similarity: not recorded' in said(gaps_by_strategy(gaps().drop('similarity')))
    fig = gaps_by_strategy(gaps(stages=('before',))); shown = [t.name for t in fig.data if t.showlegend is not False]; assert shown == ['before stage 2']
    holes = pl.concat([f := gaps(), f[:5].with_columns(gap=pl.lit(math.nan))]); a, b = (named(gaps_by_strategy(x)) for x in (f, holes))
    assert a['sae, before stage 2'].x == b['sae, before stage 2'].x


# ---- learning
def test_curves_are_drawn_as_recorded():
    fig = sae_curves(metrics('train', **LEARNED, revived=3), 'run'); assert len(fig.data) == 4 and '12 epochs' in said(fig)
    for t, v in zip(fig.data, LEARNED.values()): assert np.allclose(t.y, v) and list(t.x) == list(range(1, 13))
    assert fig.layout.yaxis4.range[0] < 0 < fig.layout.yaxis4.range[1]
    assert fig.layout.yaxis2.tickformat == fig.layout.yaxis4.tickformat != fig.layout.yaxis3.tickformat
    part = sae_curves(metrics('train', 1, reconstruction=.5))
    assert len(part.data) == 1 and 'explained_variance, L0, dead: not recorded' in said(part) and '1 epoch' in said(part)


# ---- pictures and text are data
def test_pictures_that_are_missing_or_broken():
    for frame in (items(), items(b'broken'), items(n=1), items().drop('thumbnail')):
        assert len(cards(i=frame).layout.images) == 0 and len(selection_view(selection(), frame).layout.images) == 0

@pytest.mark.parametrize('text', ['<b>bold</b>', '<a href="javascript:alert(1)">x</a>', '$E=mc^2$'])
def test_names_are_drawn_letter_for_letter(text):
    f = factors().with_columns(words=pl.lit([text]), planted_factor=pl.lit(text), planted_level=pl.lit(text)); s = gaps().with_columns(strategy=pl.lit(text))
    for fig in (cards(f, i=items(title=text), title=text), cards(f, truth=truth().with_columns(factor=pl.lit(text), level=pl.lit(text))), factor_map(f, text),
                gaps_by_strategy(s, text, text),
                selection_view(selection(), items(title=text), title=text), effective(metrics(**WEIGHTS), text), sae_curves(metrics('train', **LEARNED), text)):
        assert json.dumps(text)[1:-1] not in json.dumps(fig.to_dict(), default=str)

def test_long_titles_are_cut():
    long = items(title='Yu-Gi-Oh! - Dark Magician (LCYW-EN001) - Legendary Collection 3: Supercalifragilisticexpialidocious'*3)
    for fig in (cards(i=long, title='run '*90), selection_view(selection(), long, title='run '*90)):
        lines = [l for w in words(fig) for l in w.replace('</span>', '').split('<br>')]; assert len(said(fig)) <= 110 and any('…' in l for l in lines)
        assert max(len(l.split('>')[-1]) for l in lines) <= 46

def test_figures_stay_small():
    noise = items(png(300))
    for fig in (cards(factors(128), pairs(128), histogram(128), noise), factor_map(factors(512)), selection_view(selection(1, 200), noise),
                effective(metrics(steps=20_000, ess=2)),
                gaps_by_strategy(gaps(list(STRATEGIES), 2000))): assert len(fig.to_json()) < 250_000
