"The explorers on all of Toys (12,000 items, 20,000 users): `make test-real`; MMREC_TIMINGS keeps how long each interaction took."
import os
import pytest
from test_browser_hardness import choose, drag, inside
from test_browser_modalities import titles, weights

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.slow]
LOAD = f'''from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.explore import explore_data, explore_modalities
from mmrec_wb.training.recommender import train_recommender
data = add_features(load_dataset('toys', {os.environ.get("MMREC_DATA", "data/raw")!r}, source='raw'), progress=False)'''

def test_explore_data_on_toys(notebook):
    s = notebook('real_toys_data', [LOAD, 'explore_data(data)']); s.until(lambda: len(s.tiles('near_text')) == 8 and s.figure('length_fig')['points'] > 3)
    title = lambda: s.text('card').split('\n')[0].replace('\xa0', ' ')
    assert 'picture vectors' in s.text('said_image'); s.shots()
    s.does('type a text to find items', lambda: s.part('item', 'input').fill('lego'), lambda: s.options('item') and 'lego' in s.options('item')[0].lower())
    s.does('pick an item in the list', lambda: s.part('item', 'select').select_option(index=2), lambda: title() and s.options('item')[2].startswith(title()))
    s.does('find who bought it', lambda: s.part('user', 'input').fill('lego'), lambda: '19,412' not in s.text('user') and 'found' in s.text('user'))
    had = [t['title'] for t in s.tiles('history')]
    s.does('pick a user in the list', lambda: s.part('user', 'select').select_option(index=3), lambda: [t['title'] for t in s.tiles('history')] != had)
    s.does('click a length', lambda: s.point('length_fig', 0), lambda: s.figure('length_fig')['traces'][0]['colour'].count('#C9CDD2') > 3)
    s.does('no filter', lambda: s.part('clear').click(), lambda: '#C9CDD2' not in s.figure('length_fig')['traces'][0]['colour'])

def test_explore_modalities_on_toys(notebook, tmp_path):
    small = f'epochs=1, d=32, inner=64, layers=1, main_loss="bce_sampled", lambda_1=0., lambda_2=0., out_dir={str(tmp_path)!r}, device="cpu"'
    s = notebook('real_toys_modalities', [LOAD, f'explore_modalities(train_recommender(data, "duaf_mat", {small}), data)'])
    s.until(lambda: len(s.tiles('now')) == 10 and s.figure('weights')['points'] > 5); was = weights(s); s.shots()
    s.does('another user', lambda: s.part('user', 'select').select_option(index=3), lambda: weights(s) != was); was = weights(s)
    s.does('words off', lambda: s.part('use_text', 'input').click(), lambda: titles(s, 'now') != titles(s, 'before'))
    s.does('undo', lambda: s.part('undo').click(), lambda: weights(s) == was)
    s.does('three years before it', lambda: s.part('gap', 'select').select_option('3 years'), lambda: weights(s) != was)
    s.does('type a text to find users', lambda: s.part('user', 'input').fill('lego'), lambda: '19,412' not in s.text('user'))

def test_explore_hardness_on_toys(notebook, tmp_path):
    small = f'base_epochs=1, epochs=1, d=16, heads=1, layers=1, max_len=20, out_dir={str(tmp_path)!r}, device="cpu"'
    load = LOAD + f'''
from mmrec_wb.explore import explore_hardness
from mmrec_wb.training.rodpo import train_rodpo
hard, easy = (train_rodpo(data, 'sasrec', strategy=x, {small}) for x in ('topk', 'uniform'))'''
    s = notebook('real_toys_hardness', [load, 'explore_hardness(hard, easy, data=data)'])
    s.until(lambda: len(s.tiles('pairs')) == len(s.tiles('pairs_beside')) == 12 and len(inside(s)) == 40); s.shots()
    s.does('the hardest twentieth', lambda: s.part('hardest').click(), lambda: 0 < len(inside(s)) < 40)
    low, high = .3, .6
    s.does('drag over the bars', lambda: drag(s, low, high), lambda: inside(s) and abs(inside(s)[0] - 40*low) < 2 and abs(inside(s)[-1] + 1 - 40*high) < 2)
    s.does('all', lambda: s.part('whole').click(), lambda: len(inside(s)) == 40)
    s.does('another measure', lambda: choose(s, 'measure', 'rank'), lambda: 'rank' in s.text('brush_said'))
    s.does('click a pair', lambda: s.part('pairs', '.wb-tile:nth-child(3)').click(), lambda: s.tiles('pairs')[2]['picked'])

def test_explore_factors_on_toys(notebook, tmp_path):
    load = LOAD + f'''
from mmrec_wb.explore import explore_factors
from mmrec_wb.training.factors import train_sae
run = train_sae(data, visual="text", units=32, epochs=1, out_dir={str(tmp_path)!r}, device="cpu", progress=False)'''
    s = notebook('real_toys_factors', [load, 'explore_factors(run, data)']); s.until(lambda: len(s.tiles('pairs')) > 3 and s.figure('map')['points'] >= 32)
    head = lambda: s.text('head'); was = head(); s.shots()
    s.does('pick a unit in the list', lambda: s.part('unit', 'select').select_option(index=3), lambda: head() != was)
    apart = lambda: s.figure('apart')['traces'][0]['x']; had = apart()
    s.does('click a pair', lambda: s.part('pairs', '.wb-tile:nth-child(2)').click(), lambda: apart() != had)
