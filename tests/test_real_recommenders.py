"The two notebooks of score-based recommenders on real files in full, killed in mid-training: MMREC_DATA=<folder> pytest tests/test_real_recommenders.py"
import json, os, subprocess, sys, time
from pathlib import Path
import nbformat, psutil, pytest
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run

DATA = os.environ.get('MMREC_DATA')
pytestmark = [pytest.mark.real, pytest.mark.skipif(not DATA, reason='MMREC_DATA names no folder with the real files (see data/README.md)')]
SIZE = {'ml-100k': (943, 1_682), 'toys': (19_412, 11_924)} # users, items
FIGURES = {('sasrec', 'ml-100k'): 2, ('sasrec', 'toys'): 2, ('duaf_mat', 'ml-100k'): 6, ('duaf_mat', 'toys'): 5}

@pytest.mark.parametrize('dataset', SIZE)
@pytest.mark.parametrize('model, notebook', [('sasrec', 'train_baseline'), ('duaf_mat', 'train_duaf_mat')])
def test_the_notebook_is_killed_and_goes_on(tmp_path, model, notebook, dataset):
    out, params = tmp_path/'out.ipynb', dict(dataset=dataset, source='raw', data_dir=DATA, out_dir=tmp_path/'runs', epochs=2, device='cpu')
    command = [str(Path(sys.executable).parent/'papermill'), f'nbs/{notebook}.ipynb', str(out), *(a for k, v in params.items() for a in ('-p', k, str(v)))]
    p = subprocess.Popen(command, cwd=project_root(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(f'runs/{model}-*/checkpoint-1/progress.json')): assert p.poll() is None; time.sleep(.2)
    for each in [*psutil.Process(p.pid).children(recursive=True), p]: each.kill()                           # the kernel too, as kill -9 does
    p.wait(); done = subprocess.run(command, cwd=project_root(), capture_output=True, text=True); assert done.returncode == 0, done.stderr[-3000:]
    [folder] = (tmp_path/'runs').iterdir(); run = load_run(folder); users, items = SIZE[dataset]
    if (model, dataset) != ('duaf_mat', 'toys'):                                                            # minutes more; the others show it
        whole = [a.replace(str(tmp_path), str(tmp_path/'whole')) for a in command[1:]]; (tmp_path/'whole').mkdir()
        done = subprocess.run([command[0], *whole], cwd=project_root(), capture_output=True, text=True); assert done.returncode == 0, done.stderr[-3000:]
        [other] = (tmp_path/'whole/runs').iterdir(); assert load_run(other).frame('ranks').equals(run.frame('ranks'))   # as if it had not been killed
    losses = run.frame('metrics').filter(split='train', name='loss'); assert run.finished and losses['step'].to_list() == [1, 2] and run.info['epochs_run'] == 2
    assert run.frame('ranks').height == users and 1 <= run.frame('ranks')['rank'].min() and run.frame('ranks')['rank'].max() <= items
    shown = [o for c in nbformat.read(out, 4).cells if c.cell_type == 'code' for o in c.outputs if 'application/vnd.plotly.v1+json' in o.get('data', {})]
    assert len(shown) == FIGURES[model, dataset] and not any('planted' in json.dumps(f['data']['application/vnd.plotly.v1+json']['layout']) for f in shown)
    if model == 'duaf_mat':
        pictures = dataset == 'ml-100k'; names = set(run.frame('explain/fusion')['modality'].unique())
        assert names == {'id', 'text', *['image']*pictures} and ('cscl' in set(run.frame('metrics')['name'])) == pictures
        assert any('no pictures are generated' in n for n in run.info['notes']) != pictures
