"The tour, top to bottom, in a real browser: a stranger's first quarter of an hour."
import nbformat
from lab import ROOT

def test_the_tour(notebook):
    cells = [c.source for c in nbformat.read(ROOT/'nbs'/'tutorials'/'00_tour.ipynb', 4).cells if c.cell_type == 'code']
    s = notebook('tour', ["import os; os.environ['IN_TEST'] = '1'", *cells]); s.page.set_viewport_size(dict(width=1280, height=9000)); explorers = s.page.locator('.wb-explorer')
    s.until(lambda: explorers.count() == 4, 'four explorers', 300); body = lambda: s.page.inner_text('body')
    s.until(lambda: "'category_fig'" in body(), 'the last cell', 300)
    title = lambda k: explorers.nth(k).locator('.wb-title').inner_text()
    assert [title(k).split()[0] for k in range(4)] == ['Explore', 'Training:', 'What', 'Runs'], explorers.nth(1).inner_text()
    s.until(lambda: 'finished' in explorers.nth(1).inner_text(), 'the training', 300)
    s.until(lambda: s.figure('weights')['traces'] and s.tiles('now'), 'weights and recommendations')
    rows = explorers.nth(3).locator('tbody tr'); s.until(lambda: rows.count() >= 5, 'a row for each run')   # one of train_live, two each of the calls
    s.does('find an item', lambda: s.part('item', 'input').fill('robot'), lambda: s.options('item') and all('robot' in o.lower() for o in s.options('item')))
    assert 'p_holm' in body() and s.page.locator('.jp-OutputArea-output.jp-mod-error, [data-mime-type="application/vnd.jupyter.error"]').count() == 0
    s.shot('1280')
