"explore_factors in a real browser: each control, and what it draws."

LOAD = '''import tempfile
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.explore import explore_factors
from mmrec_wb.training.factors import train_sae
data = add_features(load_dataset('toys', source='planted', planted_users=300, planted_items=240), progress=False)
run = train_sae(data, units=32, epochs=5, out_dir=tempfile.mkdtemp(), device='cpu', progress=False)
'''

def test_explore_factors(notebook):
    s = notebook('explore_factors', [LOAD + 'explore_factors(run, data)']); s.until(lambda: len(s.tiles('pairs')) == 8, 'pairs')
    s.until(lambda: s.figure('map')['points'] >= 32); s.until(lambda: len(s.figure('apart')['traces'][0]['x']) == 10); s.shots()
    head = lambda: s.text('head'); bars = lambda name: s.figure(name)['traces'][0]['x']
    assert s.tiles('pairs')[0]['picked'] and all(' | ' in t['title'] for t in s.tiles('pairs')) and any(t['picture'] for t in s.tiles('pairs'))
    s.does('sort by number', lambda: s.part('sort', 'select').select_option('number'), lambda: s.options('unit')[0].startswith('unit 0 '))
    s.does('pick a unit in the list', lambda: s.part('unit', 'select').select_option(index=7), lambda: head().startswith('Unit 7:'))
    s.does('Enter picks the first hit', lambda: s.part('unit', 'input').press('Enter'), lambda: head().startswith('Unit 0:'))
    before = bars('apart')
    s.does('click a pair', lambda: s.part('pairs', '.wb-tile:nth-child(3)').click(), lambda: s.tiles('pairs')[2]['picked'] and bars('apart') != before)
    second, card = s.tiles('pairs')[3]['title'], s.text('card')
    s.part('pairs', '.wb-tile:nth-child(3)').focus(); s.page.keyboard.press('ArrowRight')
    s.does('pick a pair by keyboard', lambda: s.page.keyboard.press('Enter'), lambda: s.tiles('pairs')[3]['picked'] and s.text('card') != card)
    assert second.split(' | ')[0].split()[0] in s.text('card') and 'planted' in s.text('card')
    s.does('click a bar to go to its unit', lambda: s.point('apart', 1), lambda: not head().startswith('Unit 0:'))
    unit = head()
    s.does('click a unit on the map', lambda: mark(s), lambda: head() != unit)
    s.does('text that matches nothing', lambda: s.part('unit', 'input').fill('zebra crossing'), lambda: 'nothing matches' in s.text('unit'))
    s.part('unit', 'input').fill(''); s.shots('picked')

def mark(s):
    "Click a mark of the map that no other lies upon: the last that was drawn of the first group."
    at = s.part('map', '.scatterlayer .trace:nth-child(1) .point').bounding_box(); s.page.mouse.click(at['x'] + at['width']/2, at['y'] + at['height']/2)

def test_without_data(notebook):
    s = notebook('explore_factors_bare', [LOAD + 'explore_factors(run)', 'explore_factors("runs/there is none")'])
    s.until(lambda: 'give the data set' in s.text('pair_said') and s.figure('map')['points'] >= 32); assert not s.part('apart').is_visible()
    s.until(lambda: 'no' in s.page.locator('.wb-explorer').nth(1).inner_text()); s.shots()

def test_plain_items(notebook):
    s = notebook('explore_factors_items', [LOAD.replace('units=32, epochs=5', "kind='items', units=16, epochs=20") + 'explore_factors(run, data)'])
    s.until(lambda: len(s.tiles('pairs')) == 8 and len(s.figure('apart')['traces'][0]['x']) == 10)
    assert not any(' | ' in t['title'] for t in s.tiles('pairs')); s.shots()
