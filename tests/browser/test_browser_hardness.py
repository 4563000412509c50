"explore_hardness in a real browser: each control, and what it draws."

LOAD = '''import contextlib, io, tempfile
from mmrec_wb.data import load_dataset
from mmrec_wb.explore import explore_hardness
from mmrec_wb.training.rodpo import train_rodpo
data = load_dataset('toys', source='planted', planted_users=300, planted_items=240)
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    how = dict(d=16, heads=1, layers=1, max_len=20, base_epochs=4, base_batch_size=128, base_lr=.01, epochs=2, batch_size=128, lr=1e-3, device='cpu')
    hard, easy = (train_rodpo(data, 'sasrec', strategy=s, out_dir=tempfile.mkdtemp(), **how) for s in ('hard', 'uniform'))
'''

def inside(s, trace=0): # which bars are in the brush
    return [k for k, c in enumerate(s.figure('chart')['traces'][trace]['colour']) if c.endswith('0.62)')]

def drag(s, a, b): # over the bars, from one share of the width to another
    at = s.part('chart', '.nsewdrag').bounding_box(); y = at['y'] + at['height']/2
    s.page.mouse.move(at['x'] + a*at['width'], y); s.page.mouse.down(); s.page.mouse.move(at['x'] + (a + b)/2*at['width'], y + 20, steps=4)
    s.page.mouse.move(at['x'] + b*at['width'], y + 30, steps=4); s.page.mouse.up()

def choose(s, part, label): s.part(part, 'select').select_option(label=label)

def test_explore_hardness(notebook):
    s = notebook('explore_hardness', [LOAD + 'explore_hardness(hard, easy, data=data)'])
    s.until(lambda: len(s.tiles('pairs')) == len(s.tiles('pairs_beside')) == 12 and s.figure('chart')['points'] >= 40 and len(inside(s)) == 40)
    assert all(' | ' in t['title'] for t in s.tiles('pairs')) and any(t['picture'] for t in s.tiles('pairs')) and 'planted' in s.text('card'); s.shots()
    says, bars = lambda: s.text('head'), lambda: s.figure('chart')['traces'][0]['y']
    s.does('the hardest twentieth', lambda: s.part('hardest').click(), lambda: 0 < len(inside(s)) < 30 and '301 of 301' not in says())
    s.shots('brushed')
    was = inside(s); handle = s.part('brush', '.noUi-handle-upper')
    left = lambda: [handle.focus(), *[s.page.keyboard.press('ArrowRight' if len(was) < 20 else 'ArrowLeft') for _ in range(24)]]
    s.does('arrow keys on the brush', left, lambda: len(inside(s)) != len(was))
    s.does('click a bar', lambda: s.point('chart', max(range(40), key=bars().__getitem__)), lambda: len(inside(s)) == 1)
    bar = inside(s); s.does('the easiest twentieth', lambda: s.part('easiest').click(), lambda: inside(s) and inside(s) != bar)
    s.does('all', lambda: s.part('whole').click(), lambda: len(inside(s)) == 40)
    for what, (low, high) in {'drag over the bars': (.1, .7), 'drag from within the brush': (.3, .5)}.items():
        s.does(what, lambda: drag(s, low, high), lambda: inside(s) and abs(inside(s)[0] - 40*low) < 2 and abs(inside(s)[-1] + 1 - 40*high) < 2)
    s.does('all of them again', lambda: s.part('whole').click(), lambda: len(inside(s)) == 40)
    was, step = bars(), s.part('step', '.noUi-handle')
    s.does('the step before', lambda: [step.focus(), s.page.keyboard.press('ArrowLeft')], lambda: 'epoch 1' in says() and bars() != was)
    s.does('another measure', lambda: choose(s, 'measure', 'rank'), lambda: 'rank' in s.text('brush_said') and 'epoch 1' in says())
    assert max(range(40), key=bars().__getitem__) == 0; s.shots('rank')
    s.does('click a pair', lambda: s.part('pairs', '.wb-tile:nth-child(3)').click(), lambda: s.tiles('pairs')[2]['picked'])
    s.does('click a pair of the other run', lambda: s.part('pairs_beside', '.wb-tile:nth-child(2)').click(), lambda: 'of rodpo uniform' in s.text('card'))
    assert not any(t['picked'] for t in s.tiles('pairs'))
    s.does('nothing beside', lambda: choose(s, 'second', '(nothing)'), lambda: not s.part('pairs_beside').is_visible())
    s.does('the other run first', lambda: choose(s, 'first', 'rodpo uniform'), lambda: 'rodpo uniform' in says())
    s.does('and one beside it', lambda: choose(s, 'second', 'rodpo hard'), lambda: len(s.tiles('pairs_beside')) == 12 and s.part('pairs_beside').is_visible())

MADE_UP = '''
import json, numpy as np, polars as pl
from pathlib import Path
def made_up(method, params, status='finished', **frames):
    folder = Path(tempfile.mkdtemp())/f'{method}-toys-s0-{status}'; (folder/'explain').mkdir(parents=True)
    hard.frame('items').write_parquet(folder/'items.parquet')
    for name, f in frames.items(): f.write_parquet(folder/('' if name == 'metrics' else 'explain')/f'{name}.parquet')
    (folder/'run.json').write_text(json.dumps(dict(method=method, dataset='toys', source='planted', seed=0, params=params, status=status))); return folder
n, g = 200, np.random.default_rng(0); delta = g.beta(2, 5, n); items = g.integers(1, 241, (n, 2))
pairs = pl.DataFrame(dict(pair=range(n), user=range(n), chosen_item=items[:, 0], rejected_item=items[:, 1], delta=delta, weight=.8 + delta))
eta = pl.DataFrame(dict(step=range(1, 31), split='preference', name='responsiveness', value=g.random(30) + .3))
gaps = pl.DataFrame([(s, t, k, k + 1, int(items[k, 1]), float(g.normal(t == 'after', 2)), float(g.random())) for s in ('sae', 'uniform')
    for t in ('before', 'after') for k in range(n)], schema=['strategy', 'stage', 'example', 'positive', 'negative', 'gap', 'similarity'], orient='row')
'''

def test_records_of_language_models(notebook):
    cells = [LOAD + MADE_UP + "explore_hardness(made_up('hanorec', dict(beta=.1), hardness=pairs, metrics=eta))"]
    s = notebook('explore_hardness_mllm', cells); s.until(lambda: len(s.tiles('pairs')) == 12 and len(inside(s)) == 40)
    assert s.figure('chart')['points'] <= 40                                       # nothing is drawn for the run that is not there
    assert 'does not change' in s.text('step_said') and not s.part('first').is_visible() and s.part('step', '[disabled]').count(); s.shots()
    s.does('beta at a step', lambda: choose(s, 'measure', 'β at a step'), lambda: 'step 30' in s.text('head')); was = s.figure('chart')['traces'][0]['y']
    s.part('step', '.noUi-handle').focus()
    s.does('the step before', lambda: s.page.keyboard.press('ArrowLeft'), lambda: 'step 29' in s.text('head') and s.figure('chart')['traces'][0]['y'] != was)
    s.shots('beta')

def test_strategies_of_one_record_and_bad_input(notebook):
    cells = [LOAD + MADE_UP + "explore_hardness(made_up('misp_dpo', dict(strategy='sae'), gaps=gaps))", "explore_hardness('runs/there is none')",
             "explore_hardness(made_up('sft', {}))", "explore_hardness(made_up('dpo', {}, status='running', hardness=pairs))"]
    s = notebook('explore_hardness_misp', cells); s.until(lambda: len(s.tiles('pairs')) == len(s.tiles('pairs_beside')) == 12)
    said = lambda k: s.page.locator('.wb-explorer').nth(k).inner_text()
    s.until(lambda: 'is no run' in said(1) and 'recorded no pairs' in said(2) and 'is not finished' in said(3))
    assert 'after' in s.text('head') and 'misp_dpo uniform' in s.text('head_beside'); s.shots(); s.part('step', '.noUi-handle').focus()
    s.does('before training', lambda: s.page.keyboard.press('ArrowLeft'), lambda: 'before' in s.text('head'))
    fixed = lambda: 'similarity' in s.text('brush_said') and 'does not change' in s.text('step_said')
    s.does('another measure', lambda: choose(s, 'measure', 'similarity'), fixed)
