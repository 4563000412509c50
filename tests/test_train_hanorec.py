"The main job through papermill: whole, again, interrupted, and given nonsense."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import nbformat, polars as pl, pytest
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run

ROOT = project_root()
SMALL = dict(dataset='toys', source='planted', max_users=40, epochs=1, batch_size=16)

def papermill(tmp, timeout=300, root=ROOT, **params):
    "The finished process of `papermill nbs/train_hanorec.ipynb`, its notebook and its run folders; `root`: the checkout it is of."
    out, runs = tmp/'out.ipynb', tmp/'runs'
    args = [a for k, v in {'out_dir': runs, **params}.items() for a in ('-p', k, str(v))]
    p = subprocess.run([str(Path(sys.executable).parent/'papermill'), 'nbs/train_hanorec.ipynb', str(out), *args], cwd=root, capture_output=True, text=True,
                       timeout=timeout, env={**os.environ, 'PYTHONPATH': str(root)})
    return p, out, runs

def figures(notebook):
    return [o for c in nbformat.read(notebook, 4).cells if c.cell_type == 'code' for o in c.outputs if 'application/vnd.plotly.v1+json' in o.get('data', {})]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('whole')
    p, out, runs = papermill(tmp, **SMALL)
    assert p.returncode == 0, p.stderr[-3000:]
    return tmp, out, runs

def test_a_whole_run(whole):
    _, out, runs = whole
    shown = figures(out)
    assert len(shown) >= 5 and out.stat().st_size < 3_000_000
    assert all('planted' in json.dumps(f['data']['application/vnd.plotly.v1+json']['layout']) for f in shown), 'a figure of planted data must say so'
    run = load_run(next(runs.glob('hanorec-*')))
    assert run.finished and run.info['source'] == 'planted' and run.info['cpu_seconds'] > 0
    assert sorted(p.name.split('-')[0] for p in runs.iterdir()) == ['hanorec', 'sft'] and not list(runs.rglob('checkpoint'))
    ranks = run.frame('ranks')
    assert ranks.height == 40 and ranks['p_yes'].is_between(0, 1).all() and {'popularity', 'random', 'oracle'} <= set(ranks.columns)
    text = out.read_text()
    assert 'recorded in' in text and 'Traceback' not in text

def test_the_same_again_only_redraws(whole):
    tmp, _, runs = whole
    before = {p: p.stat().st_mtime_ns for p in runs.rglob('*') if p.is_file()}
    p, out, _ = papermill(tmp, **SMALL)
    assert p.returncode == 0 and len(figures(out)) >= 5
    assert {p: p.stat().st_mtime_ns for p in runs.rglob('*') if p.is_file()} == before

def test_dpo_shares_the_sft_run(whole):
    tmp, _, runs = whole
    p, out, _ = papermill(tmp, **SMALL, loss='dpo')
    assert p.returncode == 0, p.stderr[-3000:]
    assert len(list(runs.glob('sft-*'))) == 1 and load_run(next(runs.glob('dpo-*'))).params['sft'] == next(runs.glob('sft-*')).name

def test_a_loss_by_import_path_is_that_loss(whole):
    "The door for method authors: DPO through `package.module:function` gives DPO's numbers."
    tmp, _, runs = whole
    p, _, _ = papermill(tmp, **SMALL, loss='mmrec_wb.preference.losses:dpo')
    assert p.returncode == 0, p.stderr[-3000:]
    own, ours = (load_run(next(runs.glob(f'{m}-*'))).frame('ranks') for m in ('mmrec_wb.preference.losses.dpo', 'dpo'))
    assert (own['log_odds'] - ours['log_odds']).abs().max() < 1e-6
    assert ours['log_odds'].to_list() != ours['p_yes_sft'].to_list()

NONSENSE = {
    'unknown data set': (dict(dataset='toyz'), 'did you mean toys'),
    'files missing': (dict(source='raw', data_dir='/nonexistent/place'), 'reviews_Toys_and_Games_5.json.gz'),
    'epochs=0': (dict(epochs=0), 'give at least 1'),
    'misspelt parameter': (dict(datset='toys'), 'did you mean dataset'),
    'wrong type': (dict(epochs='three'), 'int is needed'),
    'no backbone': (dict(backbone='tests'), 'is no model'),
    'unknown loss': (dict(loss='dpoo'), 'did you mean dpo'),
    'no such function': (dict(loss='math:nothing'), 'nothing'),
    'unknown task': (dict(task='top5'), 'did you mean top3'),
    'too many wrong answers': (dict(negatives=2), 'has one wrong answer'),
    'unknown noise': (dict(noise_on='weights'), 'known: logits, lora'),
}

@pytest.mark.parametrize('what', NONSENSE)
def test_nonsense_is_one_line_and_leaves_nothing(clone, tmp_path, what):
    params, says = NONSENSE[what]
    p, _, runs = papermill(tmp_path, root=clone, **{**SMALL, **params})
    last = p.stderr.strip().splitlines()[-1]
    assert p.returncode != 0 and last.startswith('WorkbenchError: ') and says in last, p.stderr[-1500:]
    assert not runs.exists() and [f.name for f in (clone/'data').rglob('*')] == ['datasets.toml']

TRAIN = '''
import sys
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.training.hanorec import train_preference, train_sft
data = add_features(load_dataset('toys', source='planted', planted_users=120, planted_items=80), progress=False)
how = dict(out_dir=sys.argv[1], epochs=2, preference_epochs=2, batch_size=8, accumulation=2, eta_over='step') # draws ahead: the hardest case
print(train_preference(data, train_sft(data, **how), **how).path)
'''

def train(out, kill_in=None):
    "Train; kill -9 once a checkpoint of the stage `kill_in` is there."
    p = subprocess.Popen([sys.executable, '-c', TRAIN, str(out)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if kill_in is None:
        text, err = p.communicate(timeout=300); assert p.returncode == 0, err[-2000:]
        return load_run(text.strip().splitlines()[-1])
    end = time.time() + 300
    while not list(Path(out).glob(f'{kill_in}-*/checkpoint/checkpoint-*/trainer_state.json')):
        assert p.poll() is None and time.time() < end, p.stderr.read()[-2000:]
        time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.communicate()

def test_a_killed_run_goes_on_and_ends_the_same(tmp_path):
    straight = train(tmp_path/'straight')
    for stage in ('sft', 'hanorec'):
        train(tmp_path/'killed', kill_in=stage)
        assert json.loads(next((tmp_path/'killed').glob(f'{stage}-*/run.json')).read_text())['status'] == 'running'
    resumed = train(tmp_path/'killed')
    assert resumed.path.name == straight.path.name
    for frame in ('metrics', 'ranks'):
        a, b = straight.frame(frame), resumed.frame(frame)
        assert a.columns == b.columns and a.height == b.height
        for c in a.columns:
            if a[c].dtype == pl.Float64: assert (a[c] - b[c]).abs().max() < 1e-6, (frame, c)
            else: assert a[c].equals(b[c]), (frame, c)

def test_defaults_are_the_notebooks():
    "What `train_sft(data)` does is what the notebook does untouched."
    from papermill import inspect_notebook
    from mmrec_wb.training.hanorec import DEFAULTS
    from mmrec_wb.training.launch import parameter
    shown = {k: parameter(v['default'].strip("'")) for k, v in inspect_notebook(str(ROOT/'nbs'/'train_hanorec.ipynb')).items()}
    assert {k: shown.get(k) for k in DEFAULTS if k != 'notebook'} == {k: v for k, v in DEFAULTS.items() if k != 'notebook'}

HANOREC = dict(loss='hanorec')

@pytest.mark.parametrize('task, K, how', [('yes_no', 1, dict(loss='dpo')), ('yes_no', 1, dict(noise=.05, **HANOREC)), ('pick_one', 3, dict(loss='dpo')),
                                          ('yes_no', 1, dict(noise=.05, eta_over='step', **HANOREC)), ('top3', 4, dict(noise=.02, **HANOREC))])
def test_twenty_steps_packed_are_twenty_steps_one_by_one(tmp_path, task, K, how):
    "Without dropout, with no noise or the same draws: losses within 1e-4 relative. (The logits' noise has other shapes, so other draws.)"
    from trl import DPOConfig
    from mmrec_wb.data import load_dataset
    from mmrec_wb.mllm.backbones import load_backbone, lora_config
    from mmrec_wb.mllm.prompts import Collator
    from mmrec_wb.mllm.tasks import examples
    from mmrec_wb.training.trl_trainers import PreferenceTrainer, as_dataset, quiet, trainer_args
    data, losses = load_dataset('toys', source='planted', planted_users=120, planted_items=80), []
    asked = examples(data, task, 'train', 0, per_user=1, negatives=K).head(80).to_dicts()
    rows = [e | dict(weight=[.9 + .01*((7*n + k) % 20) for k in range(K)]) for n, e in enumerate(asked)]
    for packed in (True, False):
        model, processor = load_backbone('tiny', data.catalogue['title'].to_list(), seed=0)
        args = trainer_args(DPOConfig, tmp_path/str(packed), 100, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=20,
                            learning_rate=1e-3, seed=0, report_to='none', beta=.5)
        trainer = quiet(PreferenceTrainer(model, args=args, train_dataset=as_dataset(rows), processing_class=processor, beta=.5,
                                          data_collator=Collator(data, processor, 'all'), peft_config=lora_config(dropout=0.), **how))
        assert trainer.packed; trainer.packed = packed
        trainer.train(); losses.append(pl.Series([l['loss'] for l in trainer.state.log_history if 'loss' in l]))
    a, b = losses
    assert len(a) == len(b) == 20 and a.std() > 1e-3 and ((a - b).abs()/b.abs()).max() < 1e-4, ((a - b).abs()/b.abs()).max()

@pytest.mark.parametrize('task, k, n', [('top3', 3, 7), ('pick_one', 1, 5)])
def test_list_tasks(tmp_path, task, k, n):
    "Whole runs through papermill; chance stands beside the model."
    p, out, runs = papermill(tmp_path, **{**SMALL, 'max_users': 60}, task=task, candidates=5, loss='hanorec', noise_on='logits', label_smoothing=.1)
    assert p.returncode == 0, p.stderr[-3000:]
    run = load_run(next(runs.glob('hanorec-*')))
    m = dict(run.frame('metrics').filter(split='test').select('name', 'value').iter_rows())
    assert abs(m[f'HR@{k}/uniform'] - k/n) < 1e-12 and {f'HR@{k}/{who}' for who in ('model', 'sft', 'popularity', 'random', 'oracle')} <= set(m)
    assert {f'HR@{k} written/model', f'NDCG@{k}/model', 'valid_ratio/model'} <= set(m) and 0 <= m['valid_ratio/model'] <= 1
    ranks = run.frame('ranks')
    assert ranks['rank'].is_between(1, n).all() and ranks.height == (6 if task == 'top3' else 60) and len(figures(out)) >= 5
    assert abs((ranks['rank'] <= k).mean() - m[f'HR@{k}/model']) < 1e-12

def test_no_picture_at_all(tmp_path):
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.features import add_features
    from mmrec_wb.training.hanorec import train_preference, train_sft
    data = add_features(load_dataset('toys', source='planted', planted_users=30, planted_items=60, pictures=False), progress=False)
    how = dict(out_dir=tmp_path, epochs=1, batch_size=16)
    run = train_preference(data, train_sft(data, **how), **how)
    assert run.info['modalities'] == ['text'] and run.frame('items')['thumbnail'].null_count() == run.frame('items').height

def test_a_pretrained_backbone_is_tuned_through_lora_only(tmp_path):
    "Any local folder of an image-text-to-text model: two adapters, base weights untouched, and the recorded model answers as the evaluated one did."
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.features import add_features
    from mmrec_wb.mllm.backbones import load_backbone
    from mmrec_wb.mllm.tasks import examples
    from mmrec_wb.mllm.scoring import score_yes_no
    from mmrec_wb.training.hanorec import train_preference, train_sft
    data = add_features(load_dataset('toys', source='planted', planted_users=40, planted_items=60), progress=False)
    model, processor = load_backbone('tiny', data.catalogue['title'].to_list(), seed=3)
    model.save_pretrained(tmp_path/'base'); processor.save_pretrained(tmp_path/'base')
    before = (tmp_path/'base'/'model.safetensors').read_bytes()
    how = dict(out_dir=tmp_path/'runs', epochs=1, batch_size=16, backbone=str(tmp_path/'base'), hardness_from='backbone', lr=1e-3, preference_lr=1e-3)
    sft = train_sft(data, **how); run = train_preference(data, sft, **how)
    assert (tmp_path/'base'/'model.safetensors').read_bytes() == before
    assert not list(tmp_path.glob('runs/*/model')) and (run.path/'adapter_sft').exists() and (run.path/'adapter').exists()
    test = examples(data, 'yes_no', 'test', 2025)
    base = score_yes_no(model, processor, data, test, progress=False)['log_odds']
    for r in (sft, run):
        again = score_yes_no(*load_run(r.path).model(), data, test, progress=False)['log_odds']
        assert (again - r.frame('ranks')['log_odds']).abs().max() < 1e-4
        assert (again - base).abs().max() > 1e-3; base = again

@pytest.mark.real
@pytest.mark.parametrize('dataset, images', [('ml-100k', True), ('toys', False)])
def test_real_data(tmp_path, dataset, images):
    "Real posters, and real reviews without any picture: whole runs that say they are raw."
    p, out, runs = papermill(tmp_path, timeout=800, dataset=dataset, source='raw', max_users=40, epochs=1, batch_size=16)
    assert p.returncode == 0, p.stderr[-3000:]
    run = load_run(next(runs.glob('hanorec-*')))
    assert run.finished and run.info['source'] == 'raw' and ('image' in run.info['modalities']) == images
    assert len(figures(out)) >= 5 and f'{dataset} (raw)' in out.read_text() and '(planted)' not in out.read_text()
    assert (run.frame('items')['thumbnail'].null_count() == 0 or not images)
