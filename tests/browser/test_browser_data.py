"explore_data in a real browser: each control, and what it draws."
import pytest

LOAD = '''from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.explore import explore_data
data = add_features(load_dataset('toys', source='planted', planted_users=400, planted_items=240), progress=False)
explore_data(data)'''
OFF = '#C9CDD2'

def test_explore_data(notebook):
    s = notebook('explore_data', [LOAD]); s.until(lambda: len(s.tiles('near_fused')) == 8, 'neighbours')
    s.until(lambda: s.figure('length_fig')['points'] > 3); s.shots()
    title = lambda: s.text('card').split('\n')[0]
    assert s.tiles('history')[-1]['picked']
    # lists
    robots = lambda: s.options('item') and all('robot' in o.lower() for o in s.options('item'))
    s.does('type a text to find items', lambda: s.part('item', 'input').fill('robot'), robots)
    s.does('pick an item in the list', lambda: s.part('item', 'select').select_option(index=1), lambda: s.options('item')[1].startswith(title()))
    first = s.options('item')[0].split(' · ')[0]
    s.does('Enter picks the first hit', lambda: s.part('item', 'input').press('Enter'), lambda: title() == first)
    s.does('find who bought it', lambda: s.part('user', 'input').fill(first), lambda: 'found' in s.text('user') and '400 found' not in s.text('user'))
    before = [t['title'] for t in s.tiles('history')]
    s.does('pick a user in the list', lambda: s.part('user', 'select').select_option(index=1), lambda: [t['title'] for t in s.tiles('history')] != before)
    assert first in [t['title'] for t in s.tiles('history')] or len(s.tiles('history')) == 20
    s.does('text that matches nothing', lambda: s.part('user', 'input').fill('zebra crossing'), lambda: 'nothing matches' in s.text('user'))
    s.part('user', 'input').fill('')
    # pictures
    history = s.tiles('history'); assert history[0]['above'] == 'first' or len(history) == 20
    assert sum(t['picture'] for t in history) >= .3*len(history) and history[-1]['above'].endswith('test')
    s.does('click a picture of the history', lambda: s.part('history', '.wb-tile').click(), lambda: title() == history[0]['title'])
    s.until(lambda: [t['picked'] for t in s.tiles('history')].index(True) == 0)
    near = s.tiles('near_text'); assert near[0]['below'].startswith('cosine')
    s.does('click a neighbour', lambda: s.part('near_text', '.wb-tile').click(), lambda: title() == near[0]['title'])
    s.until(lambda: s.tiles('near_text')[0]['title'] != near[0]['title'])                     # the card comes first, then the strips
    s.part('near_text', '.wb-tile').focus(); s.page.keyboard.press('ArrowRight'); second = s.tiles('near_text')[1]['title']
    s.does('pick a neighbour by keyboard', lambda: s.page.keyboard.press('Enter'), lambda: title() == second)
    # charts
    colours = lambda name, trace=0: s.figure(name)['traces'][trace]['colour']
    s.does('click a length', lambda: s.point('length_fig', 0), lambda: colours('length_fig')[1:].count(OFF) == len(colours('length_fig')) - 1)
    assert all(o.endswith(f'· {s.options("user")[0].split("· ")[1]}') for o in s.options('user'))
    looks = lambda: s.part('looks', 'select').evaluate('e => e.selectedOptions[0].text')
    s.does('click items without a picture', lambda: s.point('coverage_fig', 1, 1), lambda: looks() == 'without')
    s.does('click a category', lambda: s.point('category_fig', 1), lambda: colours('category_fig').count(OFF) == len(colours('category_fig')) - 1)
    s.shots('filtered')
    s.does('no filter', lambda: s.part('clear').click(), lambda: OFF not in colours('category_fig') + colours('length_fig'))
    items = s.options('item')
    s.does('category by its control', lambda: s.part('kind', 'select').select_option(index=2), lambda: s.options('item') != items)
    s.does('words by their control', lambda: s.part('words', 'select').select_option('without'), lambda: 'nothing' in s.text('item'))

def test_a_long_history_has_pages(notebook):
    longest = 'x = explore_data(data); x.parts["user"].pick(int((data.offsets[1:] - data.offsets[:-1]).argmax())); x'
    s = notebook('explore_data_pages', [LOAD.replace('explore_data(data)', longest)])
    s.until(lambda: len(s.tiles('history')) == 20, 'history'); titles = lambda: [t['title'] for t in s.tiles('history')]; late = titles()
    s.does('older', lambda: s.part('older').click(), lambda: titles() != late)
    s.does('newer', lambda: s.part('newer').click(), lambda: titles() == late)

def test_without_pictures_and_without_data(notebook):
    s = notebook('explore_data_bare', [LOAD.replace('planted_items=240', 'planted_items=240, pictures=False'), 'explore_data("toys")'])
    s.until(lambda: len(s.tiles('near_text')) == 8); assert 'no picture vectors' in s.text('said_image')
    s.until(lambda: s.page.locator('.wb-explorer').count() == 2); assert 'takes a data set' in s.page.locator('.wb-explorer').nth(1).inner_text()
    s.shots()
