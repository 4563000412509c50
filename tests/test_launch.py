"accelerate launch with two CPU processes: the numbers of one process, one writer, and parameters that mean the same everywhere."
import json, subprocess, sys
from pathlib import Path
import polars as pl, pytest
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run

ROOT, BIN = project_root(), Path(sys.executable).parent
SMALL = dict(dataset='toys', source='planted', max_users=60, epochs=1, batch_size=8, lora_dropout=0., noise=0., hard_temp=.05, examples_per_user=5,
             device='cpu')

def launch(out, processes, **params):
    args = [a for k, v in {**SMALL, 'out_dir': out, **params}.items() for a in ('-p', k, str(v))]
    cmd = [BIN/'accelerate', 'launch', *(['--multi_gpu'] if processes > 1 else []), '--num_processes', processes, '--num_machines', 1,
           '--mixed_precision', 'no', '--dynamo_backend', 'no', '-m', 'mmrec_wb.training.launch', 'nbs/train_hanorec.ipynb', *args]
    return subprocess.run(list(map(str, cmd)), cwd=ROOT, capture_output=True, text=True, timeout=500)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The same command with one process and with two."
    out = {}
    for n in (1, 2):
        out[n] = tmp_path_factory.mktemp(f'p{n}'); p = launch(out[n], n)
        assert p.returncode == 0, p.stderr[-3000:]
    return out

@pytest.mark.parametrize('stage', ['sft', 'hanorec'])
def test_two_processes_compute_what_one_does(runs, stage):
    "Losses of the first 20 steps within 1e-4 relative; responsiveness is that of the global micro-batch."
    one, two = (load_run(next(runs[n].glob(f'{stage}-*'))) for n in (1, 2))
    assert one.path.name == two.path.name and one.finished and two.finished
    assert (one.info['processes'], two.info['processes']) == (1, 2)
    split = 'sft' if stage == 'sft' else 'preference'
    for name, close in (('loss', 1e-4), *([] if stage == 'sft' else [('responsiveness', 1e-2), ('beta_mean', 1e-2)])):
        a, b = (r.frame('metrics').filter(split=split, name=name).sort('step')['value'][:20] for r in (one, two))
        assert len(a) == len(b) == 20 and ((a - b).abs()/a.abs()).max() < close, (name, ((a - b).abs()/a.abs()).max())

def test_only_the_first_process_writes(runs):
    for stage in ('sft', 'hanorec'):
        folder = next(runs[2].glob(f'{stage}-*')); info = json.loads((folder/'run.json').read_text())
        metrics = load_run(folder).frame('metrics')
        assert info['status'] == 'finished' and not list(folder.rglob('*.tmp'))
        assert metrics.filter(pl.struct('step', 'split', 'name').is_duplicated()).is_empty()
    assert len(list(runs[2].iterdir())) == 2

def test_the_notebook_then_draws_that_run(runs, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in runs[2].rglob('*') if p.is_file()}
    args = [a for k, v in {**SMALL, 'out_dir': runs[2]}.items() for a in ('-p', k, str(v))]
    p = subprocess.run([str(BIN/'papermill'), 'nbs/train_hanorec.ipynb', str(tmp_path/'out.ipynb'), *args], cwd=ROOT, capture_output=True, text=True,
                       timeout=300)
    assert p.returncode == 0, p.stderr[-2000:]
    assert {p: p.stat().st_mtime_ns for p in runs[2].rglob('*') if p.is_file()} == before and '(planted)' in (tmp_path/'out.ipynb').read_text()

@pytest.mark.parametrize('params, says', [(dict(batch_size=7), 'multiple of 2'), (dict(epochs=0), 'give at least 1'), (dict(epoch=3), 'did you mean epochs')])
def test_nonsense_is_one_line(tmp_path, params, says):
    p = launch(tmp_path/'runs', 2, **params)
    own = [l for l in p.stderr.splitlines() if l.startswith('WorkbenchError: ')]
    assert p.returncode != 0 and len(own) == 1 and says in own[0], p.stderr[-2000:]
