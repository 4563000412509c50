"explore_modalities in a real browser: each control, and what it draws."
import json

TRAIN = '''from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.training.recommender import train_recommender
from mmrec_wb.explore import explore_modalities
data = add_features(load_dataset('toys', source='planted', planted_users=400, planted_items=240), progress=False)
how = dict(epochs=3, d=32, inner=64, layers=1, max_len=30, out_dir=FOLDER, device='cpu')'''

def cells(folder, *more): return [TRAIN.replace('FOLDER', json.dumps(str(folder))), *more]
def weights(s): return {t['name']: t['y'] for t in s.figure('weights')['traces'] if t['type'] == 'bar'}
def titles(s, which): return [t['title'] for t in s.tiles(which)]

def test_explore_modalities(notebook, tmp_path):
    s = notebook('explore_modalities', cells(tmp_path, 'explore_modalities(train_recommender(data, "duaf_mat", **how), data)'))
    s.until(lambda: len(s.tiles('now')) == 10 and s.figure('weights')['points'] > 5, 'weights'); was = weights(s)
    assert set(was) == {'id', 'text', 'picture'} and titles(s, 'before') == titles(s, 'now')
    assert all(abs(sum(w) - 1) < 1e-3 for w in zip(*was.values())) and any('planted' in t['name'] for t in s.figure('weights')['traces'])
    s.shots()
    s.does('another user', lambda: s.part('user', 'select').select_option(index=3), lambda: weights(s) != was); was = weights(s)
    s.does('picture off', lambda: s.part('use_image', 'input').click(), lambda: max(weights(s)['picture']) == 0)
    s.until(lambda: titles(s, 'now') != titles(s, 'before')); assert 'with your changes' in s.text('place'); s.shots('without_pictures')
    s.does('undo', lambda: s.part('undo').click(), lambda: weights(s) == was)
    s.does('id off', lambda: s.part('use_id', 'input').click(), lambda: max(weights(s)['id']) == 0)
    s.does('words off', lambda: s.part('use_text', 'input').click(), lambda: max(weights(s)['text']) == 0)
    s.does('all off is refused', lambda: s.part('use_image', 'input').click(), lambda: 'has to stay' in s.text('said'))
    s.part('undo').click(); s.until(lambda: weights(s) == was)
    # one item
    item = lambda: s.part('item', 'select').evaluate('e => e.selectedIndex')
    s.does('click a bar', lambda: s.point('weights', 0), lambda: item() == 0)
    n = len(s.options('item')); picture = next(k for k in range(n - 1, 0, -1) if was['picture'][k] > 0 and s.figure('weights'))
    for k in range(n - 1, 0, -1):
        if item() != k: s.part('item', 'select').select_option(index=k); s.until(lambda: item() == k); s.page.wait_for_timeout(150)
        if s.part('drop', 'input').is_enabled(): break
    s.does('drop its picture', lambda: s.part('drop', 'input').click(), lambda: weights(s)['picture'] != was['picture'])
    s.does('give it back', lambda: s.part('drop', 'input').click(), lambda: weights(s) == was)
    s.does('three years before it', lambda: s.part('gap', 'select').select_option('3 years'), lambda: weights(s) != was)
    s.shots('stretched'); s.part('undo').click(); s.until(lambda: weights(s) == was)
    s.part('last', '.noUi-handle').focus()
    s.does('fewer items by keyboard', lambda: s.page.keyboard.press('ArrowLeft'), lambda: len(s.options('item')) < n or n < 12)
    s.does('text that matches nothing', lambda: s.part('user', 'input').fill('zebra crossing'), lambda: 'nothing matches' in s.text('user'))

def test_hm4sr_and_runs_that_weigh_nothing(notebook, tmp_path):
    s = notebook('explore_modalities_hm4sr', cells(tmp_path, 'explore_modalities(train_recommender(data, "hm4sr", **how), data)',
        'explore_modalities(train_recommender(data, "sasrec", **how), data)', f'explore_modalities({str(tmp_path/"gone")!r})'))
    s.until(lambda: s.page.locator('.wb-explorer').count() == 3 and s.figure('weights')['points'] > 5, seconds=120); was = weights(s)
    assert set(was) == {f'expert {k}' for k in range(1, 5)}
    s.does('three years before it', lambda: s.part('gap', 'select').select_option('3 years'), lambda: weights(s) != was)
    s.does('words off', lambda: s.part('use_text', 'input').click(), lambda: titles(s, 'now') != titles(s, 'before'))
    said = s.page.locator('.wb-explorer'); assert 'weighs no modalities' in said.nth(1).inner_text() and 'is no run' in said.nth(2).inner_text()
    s.shots()
