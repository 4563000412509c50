"Edge cases of the figures: nothing to draw, nothing known, too much, and text that looks like HTML."
import io

import numpy as np, plotly.graph_objects as go, polars as pl, pytest
from PIL import Image

from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.viz.card import data_card, length_bins
from mmrec_wb.viz.preference import beta_curves, curves, hardness_bins, hardness_distribution, hardness_ends, loss_curves, margin_curves, smooth
from mmrec_wb.viz.results import result_table
from mmrec_wb.viz.theme import data_uri, escape, shorten, wrap


def pairs(delta, items=20):
    n = len(delta); r = np.random.default_rng(0)
    return pl.DataFrame(dict(pair=np.arange(n), user=np.arange(n), chosen_item=r.integers(1, items, n), rejected_item=r.integers(1, items, n),
                             delta=np.asarray(delta, float), weight=1 + np.asarray(delta, float)/4))

def items(n=20, thumbnail=None, title='item'):
    return pl.DataFrame(dict(id=range(1, n + 1), title=[f'{title} {i}' for i in range(1, n + 1)], category=['c']*n, thumbnail=[thumbnail]*n),
                        schema_overrides=dict(thumbnail=pl.Binary))

def noise_png(size=96):
    out = io.BytesIO(); Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(out, 'PNG'); return out.getvalue()

def metrics(split='preference', steps=30, **values):
    return pl.concat([pl.DataFrame(dict(step=range(1, steps + 1), split=split, name=n, value=np.broadcast_to(np.asarray(v, float), steps)))
                      for n, v in values.items()])

def words(fig): return [a.text for a in fig.layout.annotations]
def named(fig): return {t.name: t for t in fig.data}

CARD = dict(counts=pl.DataFrame(dict(name=['users'], value=[3.])), lengths=pl.DataFrame(dict(length=[3], users=[3])),
            coverage=pl.DataFrame(dict(modality=['text'], present=[0], total=[0], share=[float('nan')])),
            category=pl.DataFrame(dict(category=[None], items=[4], images=[0]), schema_overrides=dict(category=pl.String)))


# ---- nothing to draw -> one clear line
EMPTY = metrics(loss=1).clear()

@pytest.mark.parametrize('draw', [
    lambda: hardness_distribution(pairs([]), items()), lambda: hardness_distribution(pairs([np.nan]), items()),
    lambda: hardness_distribution(pairs([.1]).drop('delta'), items()), lambda: hardness_distribution(None, items()),
    lambda: beta_curves(EMPTY), lambda: margin_curves(EMPTY), lambda: loss_curves(EMPTY), lambda: result_table(EMPTY),
    lambda: beta_curves(metrics('sft', loss=1)), lambda: margin_curves(metrics('sft', loss=1)), lambda: loss_curves(metrics('preference', loss=np.nan)),
    lambda: result_table(metrics('sft', loss=1)),
    *[lambda k=k: data_card(**CARD | {k: CARD[k].clear()}) for k in CARD],
    lambda: data_card(**CARD | dict(lengths=pl.DataFrame(dict(length=[3], users=[0])))),
])
def test_nothing_to_draw_is_said_in_one_line(draw):
    with pytest.raises(WorkbenchError) as e: draw()
    assert '\n' not in str(e.value) and len(str(e.value)) > 20


# ---- hardness
@pytest.mark.parametrize('delta', [[.01], [0.], [.01]*40, [.01, .02], [.1, .1 + 1e-17], list(np.random.default_rng(1).gamma(4, .003, 300)), [0]*99 + [5.]])
@pytest.mark.parametrize('examples', [0, 1, 3, 6])
def test_every_pair_is_counted_once(delta, examples):
    fig = hardness_distribution(pairs(delta), items(), examples=examples)
    assert sum(fig.data[0].y) == len(delta) and isinstance(fig, go.Figure) and fig.layout.width is None
    hard, easy = hardness_ends(pairs(delta), examples)
    assert not set(hard['pair']) & set(easy['pair']) and len(hard) <= examples
    low, high = fig.layout.xaxis.range
    assert low < min(delta) <= max(delta) < high

def test_nan_and_null_distances_are_left_out_and_said():
    fig = hardness_distribution(pairs([.1, np.nan, .2, np.inf]), items(), 'run')
    assert sum(fig.data[0].y) == 2 and '2 without a distance' in fig.layout.title.subtitle.text

def test_histogram_equals_numpy():
    p = pairs(np.random.default_rng(2).gamma(4, .003, 5000)); bins = hardness_bins(p)
    count = np.histogram(p['delta'].to_numpy(), [*bins['left'], bins['right'][-1]])[0]
    assert bins['pairs'].to_list() == count.tolist()
    assert np.isclose((bins['pairs']*bins['weight'].fill_null(0)).sum()/5000, p['weight'].mean())

def test_a_hundred_thousand_pairs_with_the_worst_pictures_stay_small():
    fig = hardness_distribution(pairs(np.random.default_rng(0).gamma(4, .003, 100_000)), items(thumbnail=noise_png(300), title='x'*400), examples=50)
    assert len(fig.layout.images) == 24 and len(fig.to_json()) < 400_000

def test_missing_pictures_are_frames():
    p = pairs([.1, .2, .3, .4])
    for frame in (items(), items().drop('thumbnail'), items(thumbnail=b'broken'), items(3)):
        fig = hardness_distribution(p, frame, examples=2)
        assert len(fig.layout.images) == 0 and sum('no<br>picture' in w for w in words(fig)) == 8
        assert sum(s.line.dash == 'dash' and s.type == 'rect' for s in fig.layout.shapes) == 8

def test_order_of_the_examples():
    p = pairs(np.linspace(.01, .2, 19)).with_columns(chosen_item=pl.int_range(1, 20, dtype=pl.Int64), rejected_item=pl.lit(20))
    fig = named(hardness_distribution(p, items(), examples=3))
    assert np.allclose(fig['hard pairs below'].x, p['delta'][:3]) and np.allclose(fig['easy pairs below'].x, p['delta'][::-1][:3])

def test_weight_is_optional():
    p = pairs([.1, .2]).drop('weight', 'user')
    assert 'weight λ (right axis)' not in named(hardness_distribution(p, items()))


# ---- text is data
@pytest.mark.parametrize('text', ['<b>bold</b>', '<a href="javascript:alert(1)">x</a>', '$E=mc^2$', '&lt;', 'a\x00b\u202ec', '<br>', '%{x}'])
def test_titles_are_drawn_letter_for_letter(text):
    for safe in (escape(text), shorten(text), wrap(text, 99)): assert '<' not in safe and '$' not in safe and '\x00' not in safe and '\u202e' not in safe
    fig = hardness_distribution(pairs([.1, .2]), items(title=text), text, examples=1)
    if '</' in text: assert not any(text in w for w in [*words(fig), *(a.hovertext or '' for a in fig.layout.annotations), fig.layout.title.subtitle.text])

def test_thumbnails_are_small_and_safe():
    assert data_uri(noise_png(2000)) is not None and len(data_uri(noise_png(2000))) < 12_000
    assert data_uri(b'<svg xmlns="http://www.w3.org/2000/svg"/>') is None


# ---- curves
def test_curves_draw_the_frame():
    m = metrics(beta_mean=.1, beta_min=.09, beta_max=.11, responsiveness=np.linspace(.9, 1.1, 30))
    t = named(beta_curves(m, beta_0=.1))
    assert set(t['mean'].y) == {.1} and set(t['smallest'].y) == {.09} and set(t['smallest to largest'].y) == {.11}
    assert np.allclose(t['η'].y, np.linspace(.9, 1.1, 30))

def test_constant_beta_without_responsiveness():
    fig = beta_curves(metrics(beta_mean=.1, steps=5000), beta_0=.1)
    low, high = fig.layout.yaxis.range
    assert low < .095 and high > .105 and any('not recorded' in w for w in words(fig))

@pytest.mark.parametrize('steps', [1, 2, 24, 5000])
def test_any_number_of_steps(steps):
    m = pl.concat([metrics(steps=steps, margin=.1, accuracy=.7, loss=.6, beta_mean=.1, responsiveness=1), metrics('sft', steps=steps, loss=2)])
    for fig in (beta_curves(m), margin_curves(m), loss_curves(m)):
        assert len(fig.to_json()) < 400_000 and all(len(t.x) <= 1000 for t in fig.data)

def test_holes_and_repeated_steps():
    m = pl.concat([metrics(loss=1, steps=3), metrics(loss=2, steps=1), metrics(margin=[1, np.nan, 3], steps=3)])
    assert curves(m, 'preference', 'loss', 'margin').rows() == [(1, 1.5, 1), (2, 1, None), (3, 1, 3)]

def test_smooth_keeps_the_mean_of_a_constant_and_the_ends():
    assert smooth([])[0].size == 0 and np.allclose(smooth(np.full(1000, 3.))[0], 3) and smooth(np.arange(100.))[1] % 2 == 1


# ---- card and results
def test_card_of_almost_nothing():
    fig = data_card(**CARD)
    assert any('none' in w for w in words(fig)) and any('(no category)' in w for w in words(fig))

@pytest.mark.parametrize('low,high', [(0, 3), (1, 1), (3, 40), (20, 737), (5, 5000)])
def test_every_length_is_in_one_bin(low, high):
    length = np.arange(low, high + 1); bins = length_bins(pl.DataFrame(dict(length=length, users=np.ones(len(length), int))))
    assert bins['users'].to_list() == (bins['last'] - bins['first'] + 1).to_list() and bins['users'].sum() == len(length)

def test_categories_are_cut_but_not_merged():
    c = pl.DataFrame(dict(category=['x'*40 + 'a', 'x'*40 + 'b'], items=[2, 1], images=[1, 1]))
    t = named(data_card(**CARD | dict(category=c)))
    assert list(t['items'].x) == [2, 1] and list(t['of these with a picture'].x) == [1, 1]

def test_results_hold_unusual_scores():
    def table(**scores):
        return result_table(pl.DataFrame(dict(step=0, split='test', name=[n.replace('__', '/') for n in scores], value=list(map(float, scores.values())))))
    fig = table(auc__model=.4, auc__popularity=.7, auc__random=np.nan)
    assert named(fig)['AUC'].text == ('<b>0.700</b>', '0.400', '–') and list(named(fig)['AUC, drawn'].x) == [.7, .4]
    assert 'AUC, drawn' not in named(table(hit__model=.4)) and 'AUC, drawn' not in named(table(auc__model=np.nan))
    assert named(table(auc__oracle=.9, auc__model=.8, auc__sft=.7))['AUC'].text == ('<b>0.800</b>', '0.700', '0.900')
    assert named(table(**{'auc__<b>mine</b>': .9}))['scorer'].text == ('&lt;b&gt;mine&lt;/b&gt;',)
