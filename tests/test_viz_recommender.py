"Figures of score-based recommenders: the numbers drawn, edge cases, and text that looks like HTML."
import io, json
import numpy as np, plotly.graph_objects as go, polars as pl, pytest
from PIL import Image
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.viz.ablation import ablation_bars, missing_curves, over_seeds
from mmrec_wb.viz.fusion import attention_map, text_share, user_weights, weight_panels, weights_by
from mmrec_wb.viz.generation import cosine_histograms, guess_scores, neighbour_pictures, player_curves

R = np.random.default_rng(0)

def fusion(users=30, long=12, modalities=('id', 'text', 'image'), planted=True, flat=False):
    "Weights as `models.explain.fusion_weights` writes them; every fourth item has no picture of its own."
    out = []
    for u in range(users):
        for p in range(int(R.integers(3, long + 1))):
            w = np.full(len(modalities), 1/len(modalities)) if flat else R.dirichlet(np.ones(len(modalities)))
            own = dict(user=u, position=p, item=int(R.integers(1, 21)), time=0, gap_s=0 if p == 0 else int(R.exponential(9e5)),
                       category=f'c{R.integers(0, 10)}')
            own |= dict(picture=p % 4 != 3) | (dict(text_attention=float(R.random())) if planted else {})
            out += [own | dict(modality=m, weight=float(x)) for m, x in zip(modalities, w)]
    return pl.DataFrame(out)

def png(size=64):
    out = io.BytesIO(); Image.fromarray(R.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(out, 'PNG'); return out.getvalue()

def items(n=20, thumbnail=None, title='item'):
    return pl.DataFrame(dict(id=range(1, n + 1), title=[f'{title} {i}' for i in range(1, n + 1)], category=['c']*n, thumbnail=[thumbnail]*n),
                        schema_overrides=dict(thumbnail=pl.Binary))

def generated(n=40, methods=('generated', 'mean', 'category_mean', 'text_nearest', 'oracle')):
    return pl.DataFrame([dict(item=i, category='c', method=m, cosine=0. if m == 'mean' else float(R.uniform(-1, 1)), squared_error=float(R.random()))
                         for m in methods for i in range(n)])

def neighbours(n=6, k=5):
    return pl.DataFrame([dict(item=i, source=s, place=p + 1, neighbour=int(j), cosine=.9 - p/10) for i in range(1, n + 1) for s in ('generated', 'withheld')
                         for p, j in enumerate(R.permutation(20)[:k] + 1)])

def metrics(steps=20, **values):
    return pl.concat([pl.DataFrame(dict(step=range(1, steps + 1), split='train', name=n.replace('_', ' '),
                                        value=np.broadcast_to(np.asarray(v, float), steps)))
                      for n, v in values.items()])

ARMS = pl.DataFrame([dict(arm=a, seed=s, value=.02 + s/1000 + k/500) for k, a in enumerate(('all', '- one', 'SASRec')) for s in range(3)])
RATES = pl.DataFrame([dict(missing_rate=r, fill=f, seed=s, value=.03 - r/100 + s/1000) for f in ('zero', 'generated') for r in (0., .4,
    .8) for s in range(2)])

def words(fig): return [a.text for a in fig.layout.annotations]
def named(fig): return {t.name: t for t in fig.data}


# ---- nothing to draw -> one clear line that names the table
ALL = {'user_weights': (lambda f: user_weights(f, items()), fusion(), 'weight'), 'weight_panels': (weight_panels, fusion(), 'gap_s'),
       'attention_map': (attention_map, fusion(), 'modality'), 'cosine_histograms': (cosine_histograms, generated(), 'cosine'),
       'neighbour_pictures': (lambda f: neighbour_pictures(f, items(), examples=1, k=2), neighbours(), 'place'),
       'player_curves': (player_curves, metrics(loss=1), 'value'),
       'ablation_bars': (ablation_bars, ARMS, 'seed'), 'missing_curves': (missing_curves, RATES, 'fill')}

@pytest.mark.parametrize('name', ALL)
def test_nothing_to_draw_is_said_in_one_line(name):
    draw, frame, column = ALL[name]
    assert isinstance(draw(frame), go.Figure) and draw(frame).layout.width is None
    for bad, says in ((frame.clear(), 'no rows'), (frame.drop(column), f'column {column} is missing'), (None, 'NoneType')):
        with pytest.raises(WorkbenchError, match=says) as e: draw(bad)
        assert '\n' not in str(e.value)

def test_what_cannot_be_drawn_is_said():
    blind = fusion(modalities=('id', 'text'))
    for draw, says in ((lambda: user_weights(fusion(), items(), user=999), 'user 999'), (lambda: attention_map(fusion(), 'smell'), 'text share'),
                       (lambda: attention_map(blind), 'no item has both'), (lambda: weights_by(fusion(), 'age'), 'category'),
                       (lambda: player_curves(metrics(accuracy=1)), 'no loss'), (lambda: ablation_bars(ARMS.with_columns(value=pl.lit(None))), 'no rows')):
        with pytest.raises(WorkbenchError, match=says): draw()
    assert isinstance(weight_panels(blind), go.Figure) and isinstance(attention_map(blind, 'text'), go.Figure)


# ---- planted is said in the title
@pytest.mark.parametrize('draw', [lambda: user_weights(fusion(), items(), last=3), lambda: weight_panels(fusion()), lambda: attention_map(fusion()),
                                  lambda: cosine_histograms(generated())])
def test_planted_truth_is_in_the_title(draw): assert 'planted' in draw().layout.title.subtitle.text

def test_real_data_are_not_called_planted():
    real = fusion(planted=False)
    for fig in (user_weights(real, items(), title='run'), weight_panels(real, 'run'), attention_map(real, title='run'),
                cosine_histograms(generated(methods=('generated', 'mean')), 'run')):
        assert 'planted' not in fig.to_json()


# ---- the numbers
def by_hand(frame, user=None): return [r for r in frame.iter_rows(named=True) if user is None or r['user'] == user]

def test_bars_are_the_users_weights():
    f = fusion(); fig = named(user_weights(f, items(), user=4, last=5)); rows = by_hand(f, 4); top = max(r['position'] for r in rows)
    for m, name in dict(id='id', text='text', image='picture').items():
        assert list(fig[name].y) == [r['weight'] for r in rows if r['modality'] == m and r['position'] > top - 5]
    attention = [r['text_attention'] for r in rows if r['modality'] == 'id' and r['position'] > top - 5]
    assert list(fig['attention to the words (planted truth)'].y) == attention
    assert np.allclose(np.sum([fig[n].y for n in ('id', 'text', 'picture')], 0), 1)

def test_text_share_by_hand():
    f = fusion(); found = text_share(f); w = {(r['user'], r['position'], r['modality']): r['weight'] for r in by_hand(f)}
    assert len(found) == len({(r['user'], r['position']) for r in by_hand(f) if r['picture']})
    for u, p, share in found.select('user', 'position', 'share').iter_rows(): assert np.isclose(share, w[u, p, 'text']/(w[u, p, 'text'] + w[u, p, 'image']))

def test_the_map_holds_each_share_at_its_place():
    f = fusion(10); fig = attention_map(f, users=10, last=6); share = {(u, p): s for u, p, s in text_share(f).select('user', 'position', 'share').iter_rows()}
    means = {u: np.mean([s for (v, p), s in share.items() if v == u and p > max(q for w, q in [(r['user'],
        r['position']) for r in by_hand(f)] if w == u) - 6]) for u in range(10)}
    z = np.asarray(fig.data[0].z); assert z.shape == (10, 6)
    for line, u in enumerate(sorted(means, key=means.get, reverse=True)):
        top = max(r['position'] for r in by_hand(f, u))
        for k in range(6):
            want = share.get((u, top - 5 + k)); assert np.isnan(z[line, k]) if want is None else abs(z[line, k] - want) < 1e-3

@pytest.mark.parametrize('long', [5, 12, 40])
def test_means_and_spreads(long):
    f = fusion(40, long); w = np.array([r['weight'] for r in by_hand(f) if r['modality'] == 'text' and 3600 <= r['gap_s'] < 86400 and r['position'] > 0])
    row = weights_by(f, 'gap').filter(modality='text', label='<1 d').row(0, named=True)
    assert np.isclose(row['mean'], w.mean()) and np.isclose(row['sd'], w.std()) and row['rows'] == len(w)
    by = weights_by(f, 'position').filter(modality='id'); assert by['rows'].sum() == f.filter(modality='id').height and by['at'].is_sorted() and len(by) <= 12
    by = weights_by(f, 'category').filter(modality='id'); sizes = f.filter(modality='id')['category'].value_counts()['count'].sort(descending=True)
    assert by['rows'].to_list() == sizes[:8].to_list()

def test_flat_weights_and_one_item_are_drawn():
    assert 'sd 0.00' in ' '.join(words(attention_map(fusion(flat=True))))
    one = fusion(1, 3).filter(position=0)
    assert all(isinstance(d(one), go.Figure) for d in (lambda f: user_weights(f, items()), weight_panels, attention_map))

def test_histograms_count_every_item():
    g = generated(); fig = named(cosine_histograms(g)); scores = {r['method']: r for r in guess_scores(g).iter_rows(named=True)}
    for m in scores:
        c = g.filter(method=m)['cosine'].to_numpy(); assert np.isclose(sum(fig[m].y), 1) and np.isclose(scores[m]['cosine'], c.mean(), atol=1e-6)
        assert np.allclose(fig[m].y, np.histogram(c, np.linspace(-1, 1, 41))[0]/40)
    for n in range(1, 8): assert isinstance(cosine_histograms(generated(3, [f'm{i}' for i in range(n)])), go.Figure)     # panels of any number

def test_losses_are_drawn_as_recorded():
    v = np.linspace(2, 1, 20); m = metrics(loss=v, main=v/2, critic_loss=1.3*v, generator_loss=.7*v, critic_real=v - 1, critic_fake=1 - v)
    fig = player_curves(m); t = named(fig); assert np.allclose(t['L'].y, v) and np.allclose(t['critic'].y, 1.3*v) and np.allclose(t['generated'].y, 1 - v)
    assert 'VSCL' not in t and '2 ln 2' in words(fig) and '2 ln 2' not in words(player_curves(m, gan='wgan-gp'))

def test_bars_and_curves_over_seeds():
    fig = ablation_bars(ARMS, reference='SASRec'); bar = fig.data[0]
    assert np.allclose(bar.x, [.021, .023, .025]) and np.allclose(bar.error_x.array, .001) and np.isclose(fig.layout.shapes[0].x0, .025)
    assert over_seeds(ARMS.filter(seed=0), ['arm'])['sd'].null_count() == 3 and '(1 seed)' in ' '.join(words(ablation_bars(ARMS.filter(seed=0))))
    t = named(missing_curves(RATES)); assert np.allclose(t['zeros'].y, [.0305, .0265, .0225]) and np.allclose(t['generated'].error_y.array, .001/2**.5)


# ---- pictures and text are data
@pytest.mark.parametrize('text', ['<b>bold</b>', '<a href="javascript:alert(1)">x</a>', '$E=mc^2$', '%{x}'])
def test_names_are_drawn_letter_for_letter(text):
    f = fusion().with_columns(category=pl.lit(text)); safe = items(title=text)
    for fig in (user_weights(f, safe, title=text), weight_panels(f, text), neighbour_pictures(neighbours(), safe, text, examples=1),
                ablation_bars(ARMS.with_columns(arm=pl.lit(text)), title=text), missing_curves(RATES.with_columns(fill=pl.lit(text)), title=text)):
        if text != '%{x}': assert json.dumps(text)[1:-1] not in json.dumps(json.loads(fig.to_json()))

def test_pictures_that_are_missing_broken_or_withheld():
    n = user_weights(fusion(), items(thumbnail=png()), user=4).layout; assert {i.opacity for i in n.images} <= {1, .35} and len(n.images) > 0
    assert any(i.opacity == .35 for i in n.images)                                           # known to us, not to the model
    for frame in (items(), items(thumbnail=b'broken'), items(2)):
        fig = user_weights(fusion(), frame, user=4); assert len(fig.layout.images) == 0 and any(w in ('none', '?') for w in words(fig))
        fig = neighbour_pictures(neighbours(), frame, examples=2); assert len(fig.layout.images) == 0
    assert any(w.startswith('item<br>') for w in words(fig))                                 # not in the record is not the same as no picture

def test_figures_stay_small():
    big = fusion(1500, 40)
    for fig in (weight_panels(big), attention_map(big), user_weights(big, items(thumbnail=png(300))),
                neighbour_pictures(neighbours(50), items(thumbnail=png(300)), k=5)):
        assert len(fig.to_json()) < 400_000
