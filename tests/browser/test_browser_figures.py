"Figures on a slow page, and on one that is loaded again."

LATE = """const make = URL.createObjectURL.bind(URL); window.wbRead = 0;
URL.createObjectURL = b => b.size < 1e6 ? make(b) : (window.wbRead += 1,
  make(new Blob(['await new Promise(go => setTimeout(go, 4000));', b], {type: b.type})));"""
CELLS = ["""import ipywidgets as W
from mmrec_wb.explore.shell import *
a, b, button = live(chart('a').add_bar(y=[1, 2])), live(chart('b').add_bar(y=[1, 2])), W.Button(description='more')
def more(_): a.data[0].y = [5, 6, 7] if list(a.data[0].y) == [5, 6] else [5, 6]
button.on_click(more); show('Figures', a, b, button, parts=dict(a=a, b=b, button=button))""",
         "a.data[0].y = [3, 4]; redraw(b, chart('c').add_scatter(y=[3, 4, 5]).add_bar(y=[1]))"]

def test_plotly_comes_late(notebook):
    "Four seconds: anywidget gives up a widget after two. What was said meanwhile is shown, and what is said later; the script is read once."
    s = notebook('late', CELLS, script=LATE); drawn = lambda name: [(t['type'], t['y']) for t in s.figure(name)['traces']]
    s.until(lambda: drawn('a') == [('bar', [3, 4])], 'what was said before plotly came')
    s.until(lambda: drawn('b') == [('scatter', [3, 4, 5]), ('bar', [1])] and s.figure('b')['title'] == '<b>c</b>', 'another figure in its place')
    s.does('more', lambda: s.part('button').click(), lambda: drawn('a') == [('bar', [5, 6])])
    assert s.page.evaluate('window.wbRead') == 1; s.shot()

def test_the_page_is_loaded_again(notebook):
    "The kernel lives: figures come back as they are, not as they began, and go on."
    s = notebook('again', CELLS[:1]); drawn = lambda: s.figure('a')['traces'][0]['y']; s.until(lambda: drawn() == [1, 2], 'the figure')
    s.does('more', lambda: s.part('button').click(), lambda: drawn() == [5, 6]); s.again()
    s.until(lambda: drawn() == [5, 6], 'the figure as it was left', 60)
    s.does('still more', lambda: s.part('button').click(), lambda: drawn() == [5, 6, 7])
