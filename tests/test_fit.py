"The loop: killed and resumed, stopped early, with two players, and given nonsense."
import json, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np, polars as pl, pytest, torch
from torch import nn
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run, open_run
from mmrec_wb.data.clean import leave_one_out
from mmrec_wb.models.sasrec import SASRec
from mmrec_wb.training.fit import fit, optimisers
from mmrec_wb.training.ranking import metrics_of, rank_all

def made_up(n_items=30, users=80, length=8, step=1, seed=0):
    "Users who walk a ring; `step=None`: items at random."
    g = np.random.default_rng(seed); offsets = np.arange(0, users*length + 1, length); times = np.arange(users*length)
    items = ((g.integers(0, n_items, users)[:, None] + (step or 0)*np.arange(length)) % n_items + 1).ravel().astype(np.int32)
    if step is None: items = g.integers(1, n_items + 1, users*length).astype(np.int32)
    split = lambda name: leave_one_out(name, offsets, items, times)
    return SimpleNamespace(title='made up', n_items=n_items, items=items, times=times, offsets=offsets, split=split, train=split('train'))

SMALL = dict(d=16, heads=1, layers=1, inner=32, dropout=.2, max_len=8)

def opened(tmp_path): return open_run('sasrec', 'made up', 0, {}, 'x', 'planted', tmp_path)

TRAIN = '''
import sys
from mmrec_wb.data import load_dataset
from mmrec_wb.training.recommender import train_recommender
data = load_dataset('toys', source='planted', planted_users=300, planted_items=200, pictures=False)
how = dict(d=16, heads=1, layers=1, max_len=20, epochs=8, batch_size=64, lr=.005, patience=4, main_loss='bce_sampled') # draws negatives, too
print(train_recommender(data, out_dir=sys.argv[1], device='cpu', **how).path)
'''

def train(out, kill_at=None):
    "Train; kill -9 once the checkpoint of epoch `kill_at` is there."
    p = subprocess.Popen([sys.executable, '-c', TRAIN, str(out)], cwd=project_root(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if kill_at is None:
        text, err = p.communicate(timeout=300); assert p.returncode == 0, err[-2000:]
        return load_run(text.strip().splitlines()[-1])
    end = time.time() + 300
    while not list(Path(out).glob(f'sasrec-*/checkpoint-{kill_at}/progress.json')):
        assert p.poll() is None and time.time() < end, p.stderr.read()[-2000:]
        time.sleep(.005)
    p.send_signal(signal.SIGKILL); p.communicate()

def test_a_killed_run_goes_on_and_ends_the_same(tmp_path):
    straight = train(tmp_path/'straight')
    for epoch in (2, 4): train(tmp_path/'killed', kill_at=epoch)
    assert json.loads(next((tmp_path/'killed').glob('*/run.json')).read_text())['status'] == 'running'
    resumed = train(tmp_path/'killed')
    assert resumed.path.name == straight.path.name and not list(resumed.path.glob('checkpoint*'))
    a, b = (r.frame('metrics').filter(~pl.col('name').str.ends_with('seconds')) for r in (straight, resumed))
    assert a.equals(b) and a.filter(split='train', name='loss').height == straight.info['epochs_run']
    assert straight.frame('ranks').equals(resumed.frame('ranks')) and straight.info['best_epoch'] == resumed.info['best_epoch']
    assert (straight.path/'model.safetensors').read_bytes() == (resumed.path/'model.safetensors').read_bytes()

def test_early_stopping_returns_to_the_best_epoch(tmp_path):
    "A rate far too high: the valid metric goes up and down."
    data = made_up(step=None)
    with opened(tmp_path) as run:
        torch.manual_seed(0); model = SASRec(data, **SMALL)
        p = fit(model, data, run, epochs=40, batch_size=64, lr=.03, patience=3)
        curve = run.frame('metrics').filter(name='NDCG@10 valid').sort('step')['value'].to_list()
    assert p['epoch'] < 40 and p['epoch'] == len(curve) == p['best_epoch'] + 3
    assert p['best'] == max(curve) and curve.index(p['best']) + 1 == p['best_epoch']              # the first of equals
    assert metrics_of(rank_all(model, data, 'valid'))['NDCG@10/model'] == pytest.approx(p['best'], abs=1e-12) != curve[-1]

class TwoPlayers(SASRec):
    "SASRec with a critic and a generator that do next to nothing, and say who was asked."
    def __init__(self, data, **settings):
        super().__init__(data, **settings)
        self.critic, self.generator, self.asked = nn.Linear(16, 1), nn.Linear(16, 16), []
        self.player_options = dict(lr=.1)
    def players(self): return dict(critic=list(self.critic.parameters()), generator=list(self.generator.parameters()))
    def adversarial_loss(self, batch, player):
        self.asked.append(player); v = self.item(batch.items[:, 0]); fake = self.critic(self.generator(v)).mean()
        return dict(loss=fake - self.critic(v).mean() if player == 'critic' else -fake, fake=fake)
    def loss(self, batch):
        self.asked.append('main'); return super().loss(batch)

def test_players_step_before_the_main_one_and_leave_it_alone(tmp_path):
    data, how = made_up(), dict(epochs=2, batch_size=128, lr=.01)
    with opened(tmp_path/'a') as run:
        torch.manual_seed(0); model = TwoPlayers(data, **SMALL | dict(dropout=0.)); weights = {k: v.clone() for k, v in model.state_dict().items()}
        by = optimisers(model, .01); assert list(by) == ['critic', 'generator', 'main'] and by['critic'].param_groups[0]['lr'] == .1
        ours = lambda o: {id(p) for g in o.param_groups for p in g['params']}
        assert not ours(by['critic']) & ours(by['main']) and ours(by['generator']) <= ours(by['main'])
        fit(model, data, run, **how); curve = run.frame('metrics')
    assert model.asked[:6] == ['critic', 'generator', 'main']*2
    assert {'loss', 'critic loss', 'critic fake', 'generator loss', 'generator fake'} <= set(curve['name'])
    assert all((v != weights[k]).any() for k, v in model.state_dict().items() if k.startswith(('critic', 'generator')) and 'critic.bias' not in k)
    with opened(tmp_path/'b') as run:                                # the same without players: the main steps must be the same
        plain = SASRec(data, **SMALL | dict(dropout=0.)); plain.load_state_dict({k: v for k, v in weights.items() if k in plain.state_dict()})
        fit(plain, data, run, **how)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in plain.state_dict().items())

class Diverging(SASRec):
    def loss(self, batch): return dict(loss=super().loss(batch)['loss']*float('nan'))

def test_nonsense_is_one_line(tmp_path):
    data = made_up()
    for Model, how, says in ((Diverging, {}, 'loss became nan'), (SASRec, dict(report_to='wandbb'), 'unknown or not installed')):
        with opened(tmp_path) as run, pytest.raises(WorkbenchError, match=says): fit(Model(data, **SMALL), data, run, epochs=1, **how)
        assert not list(run.path.glob('checkpoint*')) and not (run.path/'model.safetensors').exists()
    with opened(tmp_path) as run:
        fit(SASRec(data, **SMALL), data, run, epochs=1)
        file = next(run.path.glob('checkpoint-1/*.safetensors')); file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(WorkbenchError, match='resume=False'): fit(SASRec(data, **SMALL), data, run, epochs=2)

def test_any_tracker_of_accelerate(tmp_path):
    "Built in or registered: it is told the settings and, each epoch, the numbers of the record."
    from accelerate.tracking import GeneralTracker, register_tracker_class
    told = []
    class Remember(GeneralTracker):
        name, requires_logging_directory, tracker = 'remember', False, None
        def __init__(self, project, **how): super().__init__()
        def store_init_configuration(self, values): told.append(values)
        def log(self, values, step=None, **how): told.append((step, values))
    register_tracker_class(Remember); data = made_up()
    with open_run('sasrec', 'made up', 0, dict(d=16), 'x', 'planted', tmp_path) as run: fit(SASRec(data, **SMALL), data, run, epochs=2, report_to='remember')
    curve = run.frame('metrics').filter(step=2); value = lambda name: curve.filter(name=name)['value'].item()
    assert told[0] == dict(d=16) and told[2] == (2, {n: value(n) for n in ('loss', 'NDCG@10 valid')}) and len(told) == 3

def test_a_run_that_reached_its_last_epoch_is_only_loaded(tmp_path):
    "Killed between training and the end: nothing is trained again."
    data = made_up()
    with opened(tmp_path) as run:
        torch.manual_seed(0); first = SASRec(data, **SMALL); p = fit(first, data, run, epochs=2, batch_size=64)
        again = SASRec(data, **SMALL); again.loss = None
        assert fit(again, data, run, epochs=2, batch_size=64) == p
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())
