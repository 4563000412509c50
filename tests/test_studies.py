"Studies: killed, stopped, failed, and going on. Most run a tiny stand-in notebook that records a run; one trains."
import json, signal, subprocess, sys, threading, time
from pathlib import Path
import nbformat, polars as pl, psutil, pytest
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.record import load_run, runs_table
from mmrec_wb.training.cli import main
from mmrec_wb.training.comparison import choose, summarise, paired_tests
from mmrec_wb.training.studies import failures, plan, study

COMMAND = str(Path(sys.executable).parent/'mmrec-wb')
PARAMETERS = '''x: str = 'a'  # what to do
y: int = 0  # changes nothing
seed: int = 0  # of the run
wait: float = 0.  # seconds
out_dir: str = 'runs'  # of runs
mark: str = ''  # a folder for marks'''
BODY = '''import os, time
from pathlib import Path
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.record import open_run
if x == 'boom': raise WorkbenchError('no such thing; choose another')
if x == 'crash': raise ValueError('first line\\nsecond line')
with open_run('tiny', 'toys', seed, dict(x=x), 'f', 'planted', out_dir) as run:
    if not run.finished:
        with open(Path(mark)/'began', 'a') as f: f.write(f'{x} {seed} {os.environ["OMP_NUM_THREADS"]}\\n')
        first = not (Path(mark)/x).exists(); (Path(mark)/x).touch()
        if x == 'die' and first: os.kill(os.getpid(), 9)
        if x == 'slow' and first: time.sleep(300)
        time.sleep(wait); run.log(0, 'test', **{'NDCG@10/model': .1}); run.finish()
print('recorded in', run.path.name)'''

@pytest.fixture
def tiny(tmp_path):
    "The stand-in notebook."
    cell = nbformat.v4.new_code_cell; (tmp_path/'marks').mkdir()
    book = nbformat.v4.new_notebook(cells=[cell(PARAMETERS, metadata=dict(tags=['parameters'])), cell(BODY)],
        metadata=dict(kernelspec=dict(name='python3', display_name='', language='python')))
    nbformat.write(book, tmp_path/'tiny.ipynb'); return str(tmp_path/'tiny.ipynb')

def began(tmp): return sorted((tmp/'marks'/'began').read_text().splitlines())
def slow_cell(tmp):
    "The process of the cell with x=slow."
    all_ = [(p, ' '.join(p.info['cmdline'] or [])) for p in psutil.process_iter(['cmdline'])]
    [p] = [p for p, said in all_ if 'child()' in said and f'{tmp}/' in said and 'x=slow' in said]; return p

def until(condition, seconds=120):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, 'waited in vain'
        time.sleep(.1)
    return found

# --- the plan

def test_unknown_names_stop_it_before_it_starts(tiny, tmp_path):
    for grid, says in ((dict(z=[1]), 'unknown parameter of tiny.ipynb'), ([dict(x='a'), dict(wiat=1)], 'did you mean wait'),
                       (dict(out_dir='x'), 'the out_dir of the study')):
        with pytest.raises(WorkbenchError, match=says): study(tiny, grid, out_dir=tmp_path/'runs', progress=False)
    for more, says in ((dict(backend='rey'), 'did you mean ray'), (dict(backend=['ray']), 'unknown backend'),
                       (dict(workers=0), 'at least 1'), (dict(seeds=['0']), 'whole numbers')):
        with pytest.raises(WorkbenchError, match=says): study(tiny, out_dir=tmp_path/'runs', **more)
    (tmp_path/'bad.ipynb').write_text('{'); nbformat.write(nbformat.v4.new_notebook(), tmp_path/'bare.ipynb'); (tmp_path/'file').touch()
    for book, says in ((tmp_path/'bad.ipynb', 'cannot be read'), (tmp_path/'bare.ipynb', 'tagged `parameters`'), (tmp_path, 'is no notebook')):
        with pytest.raises(WorkbenchError, match=says): study(book, out_dir=tmp_path/'runs')
    assert not (tmp_path/'runs').exists()
    with pytest.raises(WorkbenchError, match='cannot be written'): study(tiny, out_dir=tmp_path/'file'/'runs')

def test_names_sort_and_cells_keep_theirs(tiny):
    cells = plan(tiny, dict(x='a', y=[5, 10, 100]), [0, 10])
    assert [c['name'][:-9] for c in cells] == [f'tiny-y={y}-s{s}' for y in ('005', '010', '100') for s in ('00', '10')] == sorted(c['name'][:-9] for c in cells)
    larger = plan(tiny, dict(x=['a', 'b'], y=[5, 10, 100, 1000]), [0, 10, 20])
    assert len(larger) == 24 and {c['digest'] for c in cells} < {c['digest'] for c in larger}
    assert len(plan(tiny, [dict(x='a'), dict(x=['a', 'b'])])) == 2                          # a cell that two grids have is one cell
    assert len(plan([tiny, 'nbs/train_baseline.ipynb'], [{}, dict(notebook=tiny, x='b')])) == 3

# --- running

def test_one_fails_one_is_killed_one_loses_its_kernel(tiny, tmp_path):
    "The others do not mind; the second call runs what is missing, in the same folders."
    def kill():
        until(lambda: (tmp_path/'marks'/'slow').exists())
        p = slow_cell(tmp_path)
        kernels.extend(p.children()); p.kill()
    kernels = []; killer = threading.Thread(target=kill); killer.start()
    grid = dict(x=['boom', 'slow', 'die', 'a', 'crash'], mark=str(tmp_path/'marks'))
    table = study(tiny, grid, out_dir=tmp_path/'runs', workers=2, progress=False); killer.join()
    assert dict(table.select(pl.col('name').str.extract('x=([a-z]+)'), 'problem').rows()) == dict(a=None, boom='WorkbenchError: no such thing; choose another',
        slow='killed by SIGKILL', die='the kernel died (killed, or out of memory)', crash='ValueError: first line')
    done = [p.name for p in (tmp_path/'runs').glob('tiny-*') if load_run(p).finished]
    assert len(failures(table)) == 4 and table.filter(status='finished')['runs'].to_list() == [done] and len(done) == 1
    assert len(kernels) == 1; until(lambda: not kernels[0].is_running() or kernels[0].status() == 'zombie', 30)      # the kernel of a killed cell goes too
    table = study(tiny, grid, out_dir=tmp_path/'runs', workers=2, progress=False)
    said = table.select('name', 'problem').rows(); assert table['status'].to_list() == ['failed', 'finished', 'finished', 'finished', 'failed'], said
    assert table['attempts'].to_list() == [2, 2, 2, 1, 2]
    assert began(tmp_path) == ['a 0 1', 'die 0 1', 'die 0 1', 'slow 0 1', 'slow 0 1']                                # and one thread each
    runs = runs_table(tmp_path/'runs'); assert runs.height == 3 and (runs['status'] == 'finished').all()
    assert sorted(p.stem for p in (tmp_path/'runs'/'notebooks').glob('*.ipynb')) == sorted(table['name'])

@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_study_leaves_nothing_running_and_goes_on(tiny, tmp_path, how):
    command = [COMMAND, 'study', '--notebook', tiny, '-p', 'mark', str(tmp_path/'marks'), '-g', 'x', 'a,slow,b', '--out-dir', str(tmp_path/'runs')]
    hears = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)              # what is started with & in a script does not hear it
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears)
    finished = lambda: [f for f in (tmp_path/'runs').glob('notebooks/tiny*.json') if json.loads(f.read_text())['status'] == 'finished']
    until(lambda: (tmp_path/'marks'/'slow').exists() and len(finished()) == 2)
    tree = psutil.Process(p.pid).children(recursive=True); assert len(tree) >= 2
    with pytest.raises(WorkbenchError, match='another study'): study(tiny, out_dir=tmp_path/'runs')
    p.send_signal(how); out, err = p.communicate(timeout=60)
    assert p.returncode == (130 if how == signal.SIGINT else -9) and (how == signal.SIGKILL or 'the same command goes on' in err) and 'Traceback' not in err
    until(lambda: not [c for c in tree if c.is_running() and c.status() != 'zombie'], 30)
    p = subprocess.run(command, capture_output=True, text=True, timeout=300); assert p.returncode == 0, p.stderr
    assert '3 of 3 cells finished' in p.stdout and began(tmp_path) == ['a 0 1', 'b 0 1', 'slow 0 1', 'slow 0 1']
    assert runs_table(tmp_path/'runs').height == 3

def test_two_cells_that_need_one_run_wait_for_each_other(tiny, tmp_path):
    table = study(tiny, dict(x='a', y=[1, 2], wait=4., mark=str(tmp_path/'marks')), out_dir=tmp_path/'runs', progress=False)
    assert table['status'].to_list() == ['finished']*2 and began(tmp_path) == ['a 0 1'] and table['runs'][0].to_list() == table['runs'][1].to_list() != []

def test_a_deleted_or_unfinished_run_is_made_again(tiny, tmp_path):
    call = lambda: study(tiny, dict(x='a', mark=str(tmp_path/'marks')), out_dir=tmp_path/'runs', progress=False)
    run = tmp_path/'runs'/call()['runs'][0][0]
    (run/'metrics.parquet').unlink(); (run/'run.json').unlink(); run.rmdir()
    assert call()['attempts'].to_list() == [2] and load_run(run).finished
    state, = (tmp_path/'runs').glob('notebooks/tiny*.json'); state.write_text('{"status": "fini')                     # damaged
    assert call()['status'].to_list() == ['finished'] and began(tmp_path) == ['a 0 1']*2                             # the run itself was only read

@pytest.mark.ray
def test_on_ray(tiny, tmp_path):
    "The same on a local Ray with two workers: one fails, one loses its Ray worker, the rest is there; then it goes on."
    pytest.importorskip('ray', reason="RAY IS NOT INSTALLED, so studies on Ray are not tested: pip install -e '.[ray]' -c constraints.txt")
    def kill():
        until(lambda: (tmp_path/'marks'/'slow').exists(), 300)
        p = slow_cell(tmp_path); parents.append(p.parent().name()); p.parent().kill(); until(lambda: not p.is_running(), 30); parents.append('gone')
    parents = []; killer = threading.Thread(target=kill); killer.start()
    grid = dict(x=['a', 'slow', 'boom', 'b'], mark=str(tmp_path/'marks'))
    table = study(tiny, grid, out_dir=tmp_path/'runs', backend='ray', workers=2, progress=False); killer.join()
    assert table['status'].to_list() == ['finished', 'failed', 'failed', 'finished'] and table['problem'][2] == 'WorkbenchError: no such thing; choose another'
    assert parents[0].startswith('ray') and parents[1] == 'gone' and 'Worker' in table['problem'][1]
    table = study(tiny, grid, out_dir=tmp_path/'runs', progress=False)
    assert table['status'].to_list() == ['finished', 'finished', 'failed', 'finished'] and began(tmp_path) == ['a 0 1', 'b 0 1', 'slow 0 1', 'slow 0 1']

def test_ray_is_named_where_it_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(WorkbenchError, match='needs Ray'): study(tiny, out_dir=tmp_path/'runs', backend='ray', progress=False)

# --- with a real notebook, from the shell

def test_a_toml_study_of_train_baseline(tmp_path, capsys):
    file = tmp_path/'small.toml'
    file.write_text(f'''notebooks = "nbs/train_baseline.ipynb"\nout_dir = "{tmp_path}/runs"\nseeds = [0, 1]
params = {{ dataset = "toys", source = "planted", max_users = 60 }}
[[grid]]\nmodel = "sasrec"\nd = 8\nheads = 1\nlayers = 1\nepochs = 1\n[[grid]]\nmodel = "pop"''')
    assert main(['study', str(file)]) == 0 and '4 of 4 cells finished' in capsys.readouterr().out
    assert main(['runs', f'{tmp_path}/runs']) == 0 and capsys.readouterr().out.count('finished') == 4
    runs, lines = choose(tmp_path/'runs')
    assert not lines and sorted(runs['arm'].unique()) == ['pop', 'sasrec'] and runs['group'].n_unique() == 1
    assert load_run(tmp_path/'runs'/runs['run'][0]).info['notebook'].endswith('.ipynb')
    tests, _ = paired_tests(runs, 'pop', tmp_path/'runs', 'NDCG@10'); assert tests['arm'].to_list() == ['sasrec'] and tests['seeds'].to_list() == ['0 1']
    assert set(summarise(runs)['arm']) == {'sasrec', 'pop', 'popularity', 'oracle'}
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/'runs').rglob('*') if f.is_file() and f.name != 'study.json'}
    assert main(['study', str(file)]) == 0 and before == {f: f.stat().st_mtime_ns for f in before}

def test_a_kernel_that_could_not_begin_is_started_again(tiny, tmp_path, monkeypatch):
    import papermill
    from mmrec_wb.training.studies import execute_cell
    begun, cell = [], dict(notebook=tiny, output=str(tmp_path/'out.ipynb'), given=dict(out_dir=str(tmp_path/'runs'), mark=str(tmp_path/'marks')))
    def dies(times):
        def execute(*a, **k):
            begun.append(1)
            if len(begun) <= times: raise RuntimeError('Kernel died before replying to kernel_info')
        return execute
    for times, problem, attempts in ((2, False, 3), (9, True, 3)):
        begun.clear(); monkeypatch.setattr(papermill, 'execute_notebook', dies(times)); assert bool(execute_cell(cell)) == problem and len(begun) == attempts
