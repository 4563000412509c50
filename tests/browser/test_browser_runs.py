"explore_runs and train_live in a real browser: each control, and what it draws."
import re, time
from mmrec_wb.core.record import open_run

MAKE = '''import os, time, nbformat
from pathlib import Path
from mmrec_wb.core.record import open_run
from mmrec_wb.explore import explore_runs, train_live
d = Path.cwd()/'FOLDER'
def make(seed, width, losses, done=True, at='', model='sasrec'):
    with open_run(model, 'toys', seed, dict(model=model, d=width, lr=.001*width), 'f', 'planted', d/at,
                  notebook=str(d/'notebooks'/'made.ipynb') if seed == 0 else None) as run:
        for k in range(1, len(losses) + 1): run.log(k, 'train', loss=losses[k - 1], **{'NDCG@10 valid': .01*k*width})
        if done: run.log(0, 'test', **{'NDCG@10/model': .01*width + .001*seed, 'HR@10/model': .02*width, 'MRR@10/model': .005*width}); run.finish()
        else: run.flush()
    return run.path
(d/'notebooks').mkdir(parents=True, exist_ok=True)
nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# here I am')]), d/'notebooks'/'made.ipynb')
'''
MANY = '''for w in range(1, 41):
    for s in (0, 1): make(s, w, [3/w + 1/k for k in range(1, 11)])
make(0, 50, [3., 2.5, 2.], False); make(0, 60, [3., 2.], True, 'more', 'pop')
explore_runs(d)'''

def test_explore_runs(notebook):
    s = notebook('explore_runs', [MAKE.replace('FOLDER', 'runs') + MANY])
    table = lambda: s.part('table').evaluate("t => ({rows: t.querySelectorAll('tbody tr').length, picked: t.querySelectorAll('tr.wb-on').length})")
    s.until(lambda: table()['rows'] == 81, 'rows')
    head = lambda name: s.page.locator('.wb-part-table th button').filter(has_text=re.compile(f'^{name}( [▲▼])?$'))
    column = lambda name: s.part('table').evaluate("""(t, name) => {
        const k = [...t.querySelectorAll('th')].findIndex(h => h.textContent.replace(/ [▲▼]$/, '') === name);
        return k < 0 ? ['no such column'] : [...t.querySelectorAll(`tbody td:nth-child(${k + 1})`)].map(d => d.textContent); }""", name)
    s.does('sort by a metric', lambda: head('NDCG@10').click(), lambda: column('NDCG@10')[:1] == ['0.4010'] and column('NDCG@10')[-1] == '')
    s.does('the other way round', lambda: head('NDCG@10').click(), lambda: column('NDCG@10')[0] == '0.0100')
    head('NDCG@10').focus(); s.does('sort by keyboard', lambda: s.page.keyboard.press('Enter'), lambda: column('NDCG@10')[0] == '0.4010')
    s.does('a parameter as a column', lambda: s.part('column', 'select').select_option('parameter d'), lambda: len(column('d')) == 81)
    s.does('sort by it', lambda: head('d').click(), lambda: column('d')[0] == '50')
    s.does('filter by text', lambda: s.part('filter', 'input').fill('D=40 sasrec'), lambda: column('d') == ['40', '40'])
    s.does('pick by a click', lambda: s.page.locator('.wb-part-table tbody tr').nth(0).locator('td').nth(1).click(),
           lambda: len(s.figure('figure')['traces']) == 1 and s.figure('figure')['traces'][0]['y'])
    s.does('filter that matches nothing', lambda: s.part('filter', 'input').fill('zebra'), lambda: 'nothing matches' in s.text('note'))
    s.part('filter', 'input').fill('d=2'); s.until(lambda: column('d') == ['2', '2'])
    s.page.locator('.wb-part-table tbody tr input').nth(1).focus()
    two = lambda: len(s.figure('figure')['traces']) == 2 and 'What differs' in s.text('differences')
    s.does('pick by keyboard', lambda: s.page.keyboard.press('Space'), two)
    assert any('d=2' in t['name'] for t in s.figure('figure')['traces']) and table()['picked'] == 1
    s.does('another curve', lambda: s.part('metric', 'select').select_option('loss (train)'), lambda: 'loss' in s.figure('figure')['title'])
    s.part('filter', 'input').fill('')
    s.does('only what is unfinished', lambda: s.part('status', 'select').select_option('unfinished'), lambda: column('status') == ['unfinished'])
    moved = lambda: max(len(t['x']) for t in s.figure('figure')['traces'] if '50' in t['name'])
    s.does('pick it', lambda: s.part('table', 'tbody tr input').click(), lambda: len(s.figure('figure')['traces']) == 3 and moved() == 3)
    with open_run('sasrec', 'toys', 0, dict(model='sasrec', d=50, lr=.001*50), 'f', 'planted',
                  s.lab.root/'runs') as run:              # it goes on, in this process
        s.until(lambda: column('status') == [] and 'nothing' in s.text('note')); s.part('status', 'select').select_option('running')
        s.until(lambda: column('d') == ['50'])
        for k in (4, 5): run.log(k, 'train', loss=5/k)
        run.flush(); s.until(lambda: moved() == 5, 'the curve of a run that goes on')
    s.until(lambda: not column('status'), 'it no longer runs')
    s.part('status', 'select').select_option('any'); s.shots(); s.page.set_viewport_size(dict(width=1920, height=2400))
    s.until(lambda: s.figure('figure')['width'] > 700, 'the figure takes the room')
    s.until(lambda: s.part('notebooks', 'a').count() >= 1, 'link')
    s.does('no picks', lambda: s.part('clear').click(), lambda: table()['picked'] == 0 and not s.figure('figure')['traces'])
    s.does('another folder', lambda: s.part('folder', 'select').select_option(index=1), lambda: table()['rows'] == 1)
    s.part('table', 'tbody tr input').click(); s.until(lambda: s.part('notebooks', 'a').is_visible(), 'link'); s.part('notebooks', 'a').click()
    s.until(lambda: 'here I am' in s.page.locator('.jp-NotebookPanel:visible').last.inner_text(), 'the notebook that the run was made by')

def test_sentences(notebook):
    s = notebook('explore_runs_bare', [MAKE.replace('FOLDER', 'none') + 'explore_runs(d)', 'explore_runs("no/such/folder")', 'train_live("rodop")',
                                       'train_live("baseline", epoch=3)'])
    s.until(lambda: s.page.locator('.wb-explorer').count() == 4); said = [e.inner_text() for e in s.page.locator('.wb-explorer').all()]
    for text, says in zip(said, ('no runs in', 'is no folder', 'did you mean rodpo', 'did you mean epochs')): assert says in text, text
    s.shots()

LIVE = MAKE.replace('FOLDER', 'live') + '''x = train_live('baseline', dataset='toys', source='planted', max_users=200, d=16, heads=1, layers=1,
    epochs=EPOCHS, patience=EPOCHS, device='cpu', out_dir=str(d))
x'''

def test_train_live(notebook, lab):
    s = notebook('train_live', [LIVE.replace('EPOCHS', '400'), 'answer = 6*7; print("the kernel answers", answer)'])
    points = lambda: max([len(t['x']) for t in s.figure('figure')['traces']], default=0)
    s.until(lambda: 'the kernel answers 42' in s.page.inner_text('body'), 'the kernel is free', 60)
    s.until(lambda: points() >= 2, 'first points', 120); n = points(); s.until(lambda: points() > n, 'the curve moves', 60)
    s.does('pause', lambda: s.part('pause').click(), lambda: 'paused' in s.text('note')); n = points(); s.page.wait_for_timeout(2500); assert points() == n
    s.shots('paused')
    s.does('go on', lambda: s.part('go').click(), lambda: 'running' in s.text('note')); s.until(lambda: points() > n, 'it moves again', 60)
    s.does('another curve', lambda: s.part('metric', 'select').select_option('loss (train)'), lambda: 'loss' in s.figure('figure')['title'])
    n = points(); s.page.close(); s.close = lambda known: None
    time.sleep(3)                                                    # the browser is closed in mid-training
    t = notebook('train_live_again', [LIVE.replace('EPOCHS', '400')]); t.until(lambda: 'running' in t.text('note'))
    reach = lambda: max([len(q['x']) for q in t.figure('figure')['traces']], default=0)
    t.until(lambda: reach() > n, 'what was trained meanwhile', 60); t.part('stop').click(); t.until(lambda: 'stopped' in t.text('note'), 'it has stopped', 60)
    t.shots('stopped')
    assert t.part('go').is_enabled() and not t.part('stop').is_enabled(); assert 'epoch' in t.text('figure') and '.ipynb' in t.text('notebook')
