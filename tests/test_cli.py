"`mmrec-wb run`, `html` and `doctor`: what they say, how they end, what they leave. (`study`: test_studies.py, `fetch`: test_fetch.py.)"
import json, re, signal, subprocess, sys, time
from pathlib import Path
import nbformat, psutil, pytest
import mmrec_wb.training.doctor as doctor
from mmrec_wb.core.record import load_run
from mmrec_wb.training.cli import main
from mmrec_wb.training.jobs import job, job_state, perform

COMMAND = str(Path(sys.executable).parent/'mmrec-wb')
PARAMETERS = '''x: str = 'a'  # what to do
steps: int = 3  # of training
out_dir: str = 'runs'  # of runs
PAPERMILL_OUTPUT_PATH = None'''
BODY = '''import os, sys, time
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.record import open_run
if x == 'boom': raise WorkbenchError('no such thing; choose another')
if x == 'widget':
    import ipywidgets; display(ipywidgets.Text('x'*10000))
if x == 'die': os.kill(os.getpid(), 9)
with open_run('tiny', 'toys', 0, dict(x=x, steps=steps), 'f', 'planted', out_dir, notebook=PAPERMILL_OUTPUT_PATH) as run:
    for k in range(max([r['step'] for r in run._rows], default=0) + 1, steps + 1):
        run.log(k, 'train', loss=1/k); run.flush()
        while x == 'stubborn':
            try: time.sleep(300)
            except KeyboardInterrupt: pass
        if x == 'slow' and not os.path.exists(out_dir + '/hurry'): time.sleep(300)
    if not run.finished: run.finish()
print('recorded in', run.path.name)'''

@pytest.fixture
def tiny(tmp_path):
    "A stand-in notebook."
    cell = nbformat.v4.new_code_cell
    book = nbformat.v4.new_notebook(cells=[cell(PARAMETERS, metadata=dict(tags=['parameters'])), cell(BODY)],
        metadata=dict(kernelspec=dict(name='python3', display_name='', language='python')))
    nbformat.write(book, tmp_path/'tiny.ipynb'); return str(tmp_path/'tiny.ipynb')

def until(condition, seconds=120):
    end = time.time() + seconds
    while not (found := condition()): assert time.time() < end, 'waited in vain'; time.sleep(.1)
    return found

def run(tiny, tmp_path, *more): return main(['run', tiny, '-p', 'out_dir', str(tmp_path/'runs'), *more])

# --- run

def test_it_runs_and_says_where(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path, '-p', 'steps', '2') == 0; said = capsys.readouterr().out.splitlines()
    [folder] = (tmp_path/'runs').glob('tiny-*'); [book] = (tmp_path/'runs'/'notebooks').glob('*.ipynb')
    assert said == [f'finished: {book}', f'run: {folder}'] and load_run(folder).finished and load_run(folder).params == dict(x='a', steps=2)
    assert load_run(folder).info['notebook'] == str(book) and 'steps=2' in book.name and 'recorded in tiny' in book.read_text()
    at = (folder/'run.json').stat().st_mtime_ns; assert run(tiny, tmp_path, '-p', 'steps', '2') == 0 and (folder/'run.json').stat().st_mtime_ns == at
    assert run(tiny, tmp_path, '--out', str(tmp_path/'mine'/'x.ipynb')) == 0 and (tmp_path/'mine'/'x.ipynb').is_file()
    assert not [p for p in tmp_path.rglob('*') if p.suffix in ('.lock', '.tmp')]

@pytest.mark.parametrize('more, says', [(('-p', 'step', '3'), 'did you mean steps'), (('-p', 'seed', '3'), "unknown parameter of tiny.ipynb 'seed'"),
                                        (('--out', 'x.txt'), 'name a notebook')])
def test_mistakes_are_one_line(tiny, tmp_path, capsys, more, says):
    assert run(tiny, tmp_path, *more) == 2; err = capsys.readouterr().err
    assert says in err and err.count('\n') == 1 and not (tmp_path/'runs').exists()

def test_other_mistakes(tiny, tmp_path, capsys):
    for name, says in (('rodop', 'did you mean rodpo'), ('no/such.ipynb', 'is no notebook'), (str(tmp_path), 'is no notebook')):
        assert main(['run', name]) == 2 and says in capsys.readouterr().err
    assert main(['run', tiny, '--out', tiny]) == 2 and 'the notebook itself' in capsys.readouterr().err
    (tmp_path/'bad.ipynb').write_text('{'); assert main(['run', str(tmp_path/'bad.ipynb'), '-p', 'x', '1']) == 2
    (tmp_path/'file').touch(); assert main(['run', tiny, '-p', 'out_dir', str(tmp_path/'file'/'runs')]) == 2 and 'cannot be written' in capsys.readouterr().err
    with pytest.raises(SystemExit) as e: main(['run'])
    assert e.value.code == 2

@pytest.mark.parametrize('x, says', [('boom', 'WorkbenchError: no such thing; choose another (all of it: '), ('die', 'the kernel died')])
def test_a_notebook_that_fails(tiny, tmp_path, x, says):
    p = subprocess.run([COMMAND, 'run', tiny, '-p', 'out_dir', str(tmp_path/'runs'), '-p', 'x', x], capture_output=True, text=True, timeout=120)
    assert p.returncode == 1 and says in p.stderr and 'Traceback' not in p.stderr and '0/3' in p.stderr and p.stdout == ''          # a bar was there
    [state] = (tmp_path/'runs'/'notebooks').glob('*.json'); assert json.loads(state.read_text())['status'] == 'failed'

def test_the_state_of_widgets_is_not_kept(tiny, tmp_path):
    assert run(tiny, tmp_path, '-p', 'x', 'widget') == 0; [book] = (tmp_path/'runs'/'notebooks').glob('*.ipynb')
    assert 'widgets' not in json.loads(book.read_text())['metadata'] and 'widget-view' in book.read_text() and book.stat().st_size < 20_000

def test_an_interrupt_leaves_a_run_that_goes_on(tiny, tmp_path):
    command = [COMMAND, 'run', tiny, '-p', 'out_dir', str(tmp_path/'runs'), '-p', 'x', 'slow']
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = until(lambda: next((tmp_path/'runs').glob('tiny-*/metrics.parquet'), None)).parent; tree = psutil.Process(p.pid).children(recursive=True)
    second = subprocess.run(command, capture_output=True, text=True, timeout=60); assert second.returncode == 2 and f'(process {p.pid})' in second.stderr
    p.send_signal(signal.SIGINT); out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'the same command goes on' in err and 'Traceback' not in err and out == ''
    until(lambda: not [c for c in tree if c.is_running() and c.status() != 'zombie'], 30)
    j = job(tiny, dict(out_dir=str(tmp_path/'runs'), x='slow')); assert job_state(j)['status'] == 'stopped' and load_run(folder).status == 'running'
    assert not list(folder.parent.glob('.*.lock')); (tmp_path/'runs'/'hurry').touch()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120); assert again.returncode == 0, again.stderr
    assert load_run(folder).finished and load_run(folder).frame('metrics')['step'].to_list() == [1, 2, 3] and job_state(j)['attempts'] == 2

def test_a_kernel_that_does_not_listen(tiny, tmp_path):
    "It is ended after a while; a second interrupt would not wait for that."
    code = 'import sys, mmrec_wb.training.jobs as j, mmrec_wb.training.cli as c; j.PATIENCE = 3; sys.exit(c.main())'
    p = subprocess.Popen([sys.executable, '-c', code, 'run', tiny, '-p', 'out_dir', str(tmp_path/'runs'), '-p', 'x', 'stubborn'], stderr=subprocess.PIPE,
                         text=True)
    until(lambda: next((tmp_path/'runs').glob('tiny-*/metrics.parquet'), None)); p.send_signal(signal.SIGINT); _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'Traceback' not in err

def test_a_study_and_a_run_are_found_by_each_other(tiny, tmp_path):
    "The record tells the notebook that went on with it last."
    out = dict(out_dir=str(tmp_path/'runs')); j = job(tiny, out | dict(steps=1)); assert perform(j, progress=False)['status'] == 'finished'
    assert job(tiny, dict(steps=1) | out)['output'] == j['output'] and perform(job(tiny, out | dict(steps=1), tmp_path/'o.ipynb'),
        progress=False)['runs'] == perform(j, progress=False)['runs']

# --- html

def test_a_page_holds_code_words_and_living_figures(tmp_path, capsys):
    import plotly.graph_objects as go
    v4, show = nbformat.v4, lambda y: nbformat.v4.new_output('display_data', {'application/vnd.plotly.v1+json': json.loads(go.Figure(go.Bar(y=y)).to_json())})
    cells = [v4.new_raw_cell('title: front-matter-of-nbdev'), v4.new_markdown_cell('# Heading'),
             v4.new_code_cell('made_here = 1', outputs=[show([7, 11]), show([13])])]
    file = tmp_path/'x.ipynb'; nbformat.write(v4.new_notebook(cells=cells), file); before = file.read_bytes()
    assert main(['html', str(file)]) == 0 and '2 figures' in capsys.readouterr().out and file.read_bytes() == before
    page = (tmp_path/'x.html').read_text('utf-8'); assert page.count('Plotly.newPlot(') == 2 and '[7,11]' in page.replace(' ', '') and 'Heading' in page
    assert page.count('plotly.js v') == 1 and 'front-matter-of-nbdev' not in page and 'made_here' in page                    # plotly's script is within, once
    assert not [u for u in re.findall(r'<script[^>]*src="([^"]+)"', page) if 'mathjax' not in u]
    assert main(['html', str(file), '--no-code', '--out', str(tmp_path/'y.html')]) == 0 and 'made_here' not in (tmp_path/'y.html').read_text('utf-8')

@pytest.mark.parametrize('args, says', [(('nothing.ipynb',), 'is no notebook that can be read'), (('README.md',), 'is no notebook that can be read'),
                                        (('x.ipynb', '--out', 'x.ipynb'), 'name a page')])
def test_what_is_no_page_is_one_line(args, says, capsys):
    assert main(['html', *args]) == 2; said = capsys.readouterr().err.strip(); assert says in said and '\n' not in said

# --- doctor

def test_doctor(capsys, monkeypatch, tmp_path):
    assert main(['doctor', '--data-dir', str(tmp_path)]) == 0; said = capsys.readouterr().out
    for word in ('python', 'torch', 'kernel', 'device', 'ray', 'smollm2', 'chromium', 'mmrec-wb fetch ml-100k', 'GB free'): assert word in said
    real = doctor.version_of
    monkeypatch.setattr(doctor, 'version_of', lambda n: None if n == 'trl' else '0.1' if n == 'torch' else '99' if n == 'scipy' else real(n))
    assert main(['doctor']) == 1; said = capsys.readouterr().out
    assert 'missing trl' in said and 'Traceback' not in said
    assert "torch             is 0.1, and torch>=2.6 is needed -> pip install" in said and 'note    scipy' in said

def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def broken(): raise RuntimeError('CUDA driver\nis odd')
    monkeypatch.setattr(doctor, 'check_devices', broken)
    [f] = [f for f in doctor.examine() if f['what'] == 'broken']; assert f['mark'] == 'missing' and f['said'] == 'RuntimeError: CUDA driver is odd'
