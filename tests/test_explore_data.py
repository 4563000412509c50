"explore_data without a browser: odd data, large data, and what is said."
import dataclasses, time
import numpy as np, polars as pl, pytest
from mmrec_wb.data import Dataset, Feature, load_dataset
from mmrec_wb.explore import explore_data
from mmrec_wb.explore.data import Neighbours
from mmrec_wb.explore.shell import HITS, Message, Picker, friendly, matches

def made_up(users=6, items=9, length=4, titles=None, category='c', dims=5):
    "A data set without files: user u has `length` items in a row."
    ids = np.arange(1, items + 1); title = titles or [f'Item {i}' for i in ids]; none = [None]*(items + 1)
    catalogue = pl.DataFrame(dict(id=np.arange(items + 1), raw_id=['', *(f'R{i}' for i in ids)], title=['', *title], text=['', *title], category=['']
        + [category]*items, image=none, image_offset=none, image_size=none),
        schema_overrides=dict(id=pl.Int32, image=pl.String, image_offset=pl.Int64, image_size=pl.Int64))
    seen = np.concatenate([(np.arange(length) + u) % items + 1 for u in range(users)]).astype(np.int32)
    x = np.random.default_rng(0).normal(size=(items + 1, dims)).astype(np.float32); x[0] = 0; there = np.arange(items + 1) > 0
    return Dataset('made-up', 'raw', [f'U{u}' for u in range(users)], np.arange(users + 1)*length, seen, np.tile(np.arange(length)*86400, users), catalogue,
                   'f', dict(text=Feature(x, there)))

def test_titles_that_look_like_html_stay_text():
    bad = '<img src=x onerror=alert(1)>'; data = made_up(titles=[bad]*9, category='<b>c</b>'); p = explore_data(data).parts
    assert bad not in p['card'].value and '&lt;img' in p['card'].value and '<b>c' not in p['card'].value
    assert p['history'].tiles[0]['title'] == bad                                     # set as text by the strip
    assert '<b>' not in ''.join(p['category_fig'].layout.yaxis.ticktext)

def test_items_without_title_words_or_category():
    data = made_up(titles=[None] + [f'Item {i}' for i in range(2, 10)], category=None); x = data.features['text']
    has = x.present.copy(); has[1] = False; data = dataclasses.replace(data, features=dict(text=Feature(x.values*has[:, None], has)))
    p = explore_data(data).parts; p['item'].pick(1)
    assert 'R1' in p['card'].value and p['near_text'].tiles == [] and 'has no text' in p['said_text'].text and 'none' in p['card'].value
    p['words'].value = 'without'; assert p['item'].hits == [1]
    p['clear'].click(); assert len(p['item'].hits) == 9

def test_one_user_and_few_items():
    p = explore_data(made_up(users=1, items=3, length=3)).parts
    assert len(p['near_text'].tiles) == 2 and p['length'].value == (3, 3) and len(p['history'].tiles) == 3
    assert [t['above'] for t in p['history'].tiles] == ['first', '+1 d · valid', '+1 d · test']

def test_pages_cover_a_long_history_once():
    p = explore_data(made_up(users=2, items=90, length=53)).parts; seen = [p['history'].ids]
    while not p['older'].disabled: p['older'].click(); seen.insert(0, p['history'].ids)
    assert sum(seen, []) == list(range(1, 54)) and not p['newer'].disabled
    p['user'].pick(1); assert p['newer'].disabled

def test_a_filter_leaves_nothing():
    p = explore_data(made_up()).parts; p['words'].value = 'without'; assert p['item'].hits == [] and 'nothing is left' in p['item'].said
    p['item'].text.value = 'Item'; assert 'nothing matches' in p['item'].said

@pytest.mark.parametrize('wrong', [None, 'toys', 3, pl.DataFrame()])
def test_what_is_no_data_set_gets_a_sentence(wrong):
    said = explore_data(wrong).parts['said'].text; assert 'takes a data set' in said and '\n' not in said

def test_neighbours_are_the_nearest():
    data = made_up(items=400, length=10); n = Neighbours(data); ids, cosine = n.near(7, 'text', 5)
    every = n.unit['text'] @ n.unit['text'][7]; every[[0, 7]] = -9
    assert np.array_equal(ids, np.argsort(-every)[:5]) and np.allclose(cosine, np.sort(every)[::-1][:5], atol=1e-6)
    assert np.array_equal(n.near(7, 'fused', 5)[0], ids) and len(n.near(7, 'image')[0]) == 0

def test_large_data_stays_quick_and_lists_short():
    data = made_up(users=20_000, items=12_000, length=8, dims=384); p = explore_data(data).parts; start = time.perf_counter()
    p['user'].text.value = 'item 11999'; assert 0 < len(p['user'].hits) <= HITS
    p['item'].text.value = 'item 5'; p['item'].first(); p['length'].value = (8, 8); p['user'].pick(19_999)
    assert len(p['item'].list.options) == HITS and p['history'].ids[0] == (19_999 % 12_000) + 1
    assert time.perf_counter() - start < 20                                          # not a measurement: no step may loop over users or items

def test_search_is_literal_and_knows_no_case():
    names = pl.Series(['red robot', 'robot (red)', 'a.b', 'axb', 'ärger'])
    assert matches(names, 'RED').tolist() == [0, 1] and matches(names, 'a.b').tolist() == [2] and matches(names, '(').tolist() == [1]
    assert matches(names, 'robot red').tolist() == [0, 1] and matches(names, 'Ärger').tolist() == [4] and matches(names, '  ').tolist() == [0, 1, 2, 3, 4]

def test_enter_picks_the_first_hit():
    p = Picker('x', lambda text: ([3, 4], ['three', 'four'])); p.text._handle_custom_msg({'event': 'submit'}, []); assert p.value == 3

def test_friendly_hides_no_fault_of_ours():
    said = Message()
    with pytest.raises(KeyError): friendly(said)(lambda: {}['x'])()
    friendly(said)(lambda: open('no such file'))(); assert 'no such file' in said.text
    friendly(said)(lambda: None)(); assert said.text == ''                           # the next success clears it
