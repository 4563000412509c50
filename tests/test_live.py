"train_live and explore_runs over a real, short training: paused, killed, gone on with; watched while it moves."
import asyncio, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, polars as pl, psutil, pytest
from mmrec_wb.core.record import load_run
from mmrec_wb.explore.live import train_live
from mmrec_wb.explore.runs import explore_runs, follow
from mmrec_wb.training.cli import main
from mmrec_wb.training.jobs import job, job_state, stop
from test_cli import until
TINY = dict(dataset='toys', source='planted', max_users=200, d=16, heads=1, layers=1, epochs=80, patience=80, device='cpu')

def numbers(path): return load_run(path).frame('metrics').filter(split='train').filter(~pl.col('name').str.contains('seconds')).sort('name', 'step')

@pytest.mark.slow
def test_paused_killed_and_gone_on_with(tmp_path):
    "The curves are those of a training that nobody disturbed."
    x = train_live('baseline', out_dir=str(tmp_path/'runs'), **TINY); p = x.parts
    points = lambda: (x.refresh(), len(p['figure'].data[0].x) if p['figure'].data else 0)[1]
    table = lambda: (w.refresh(), w.parts['table'].rows)[1]
    until(lambda: points() >= 2); w = explore_runs(tmp_path/'runs'); assert table()[0]['cells'][2] == 'running'
    p['pause'].click(); until(lambda: (x.refresh(), 'paused' in p['note'].value)[1])
    assert job_state(x.cell)['status'] == 'paused'; n = points(); time.sleep(1.5); assert points() == n
    root = psutil.Process(job_state(x.cell)['pid']); tree = [root, *root.children(recursive=True)]; assert len(tree) >= 2
    for q in tree: q.kill()                                                                    # paused, and then the machine goes down
    until(lambda: x.refresh() is False); assert 'stopped' in p['note'].value and not p['go'].disabled
    until(lambda: table()[0]['cells'][2] == 'unfinished')                                       # a killed process holds its lock until it is gone
    p['go'].click(); until(lambda: x.refresh() is False, 300); assert '<b>finished</b>' in p['note'].value, job_state(x.cell)
    assert table()[0]['cells'][2] == 'finished'; [a] = (tmp_path/'runs').glob('sasrec-*'); w.parts['table'].picked = [a.name]
    assert '.ipynb</a>' in w.parts['notebooks'].outputs[0]['data']['text/html']
    assert main(['run', 'baseline', *[s for k, v in (TINY | dict(out_dir=tmp_path/'other')).items() for s in ('-p', k, str(v))]]) == 0
    [b] = (tmp_path/'other').glob('sasrec-*'); assert a.name == b.name and numbers(a).equals(numbers(b)) and numbers(a)['step'].max() == 80

@pytest.mark.slow
def test_it_outlives_the_notebook(tmp_path):
    "The process that asked for it is killed; another one finds it, and stops it."
    given = dict(TINY, epochs=5000, patience=5000, out_dir=str(tmp_path/'runs'))
    code = f'import time; from mmrec_wb.explore.live import train_live; train_live("baseline", **{given}); print("started", flush=True); time.sleep(300)'
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, start_new_session=True); assert p.stdout.readline() == 'started\n'
    cell = job('baseline', given); root = psutil.Process(job_state(cell)['pid'])
    assert os.getsid(root.pid) == root.pid != os.getsid(p.pid); os.killpg(p.pid, signal.SIGKILL); p.wait()
    try:
        until(lambda: next((tmp_path/'runs').glob('sasrec-*/metrics.parquet'), None)); assert job_state(cell)['status'] == 'running'
        x = train_live('baseline', **given)
        assert psutil.Process(job_state(x.cell)['pid']) == root and x.parts['go'].disabled      # attached, not started again
        x.parts['stop'].click(); until(lambda: x.refresh() is False, 60); assert 'stopped' in x.parts['note'].value
        [run] = (tmp_path/'runs').glob('sasrec-*')
        assert load_run(run).status == 'running' and list(run.glob('checkpoint-*')) and not list(run.parent.glob('.*.lock'))
        until(lambda: not root.is_running() or root.status() == 'zombie')
    finally:
        for q in ([*root.children(recursive=True), root] if root.is_running() else []): q.kill()

@pytest.mark.parametrize('name, given, says', [('rodop', {}, 'did you mean rodpo'), ('baseline', dict(epoch=3), 'did you mean epochs'),
                                               ('x.ipynb', {}, 'is no notebook')])
def test_a_sentence(name, given, says): assert says in train_live(name, **given).parts['said'].text

def test_a_run_that_was_deleted_can_be_made_again(tmp_path):
    "And the folder may be given as a path, a number as numpy's."
    given = dict(TINY, out_dir=tmp_path/'runs', epochs=1, max_users=np.int64(30)); x = train_live('baseline', **given); until(lambda: x.refresh() is False, 120)
    assert '<b>finished</b>' in x.parts['note'].value, job_state(x.cell); [a] = (tmp_path/'runs').glob('sasrec-*'); shutil.rmtree(a); x.refresh()
    assert f'{a.name} is no longer in' in x.parts['said'].text and not x.parts['go'].disabled
    x.parts['go'].click(); until(lambda: x.refresh() is False, 120); assert '<b>finished</b>' in x.parts['note'].value and load_run(a).finished

def test_a_failure_is_a_sentence(tmp_path):
    x = train_live('baseline', out_dir=str(tmp_path/'runs'), epochs=0); until(lambda: x.refresh() is False)
    assert x.parts['said'].text.startswith('WorkbenchError: parameter epochs=0') and not x.parts['go'].disabled

def test_it_moves_by_itself_until_it_is_closed(tmp_path):
    async def watch():
        (tmp_path/'runs').mkdir(); w = explore_runs(tmp_path/'runs', seconds=.05); assert not w.parts['table'].rows
        from mmrec_wb.core.record import open_run
        with open_run('tiny', 'toys', 0, {}, 'f', 'planted', tmp_path/'runs') as run: run.finish()
        await asyncio.sleep(.5); assert len(w.parts['table'].rows) == 1
        w.close(); await asyncio.sleep(.2); return [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    assert asyncio.run(watch()) == []
