"MISP-DPO on the language model: facts about its loss and its negatives, resume, and its notebook through papermill."
import json, math, signal, subprocess, sys, time
from pathlib import Path
import nbformat, numpy as np, polars as pl, pytest, torch
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.mllm.backbones import load_backbone, lora_config
from mmrec_wb.mllm.prompts import NOTHING, Collator
from mmrec_wb.mllm.tasks import examples, with_picture
from mmrec_wb.data.batches import training_items
from mmrec_wb.training.misp import MISP, pictured, picture_negatives, settled, train_misp

ROOT = project_root()
SMALL = dict(dataset='toys', source='planted', max_users=40, epochs=1, batch_size=16, sae_units=16, sae_epochs=1, prefilter=20)

@pytest.fixture(scope='module')
def data(): return add_features(load_dataset('toys', source='planted', planted_users=40, planted_items=60), progress=False)

@pytest.fixture(scope='module')
def questions(data): return pictured(data, examples(data, 'yes_no', 'train', seed=0))

# ---- negatives ----
@pytest.mark.parametrize('strategy', ['uniform', 'popularity'])
def test_pictures_are_of_items_that_nobody_here_owns(data, questions, strategy):
    own = settled(dict(strategy=strategy, negatives=4))[1]; ids, logq = picture_negatives(data, questions, own, 0)
    seen, y = with_picture(data), questions['positive'].list.first().to_numpy()
    assert ids.shape == (len(questions), 4) and seen[y].all() and seen[ids.numpy()].all()
    for u, row in zip(questions['user'], ids.tolist()): assert not {*row} & {*data.sequence(u)[0][:-2].tolist()}
    assert torch.equal(ids, picture_negatives(data, questions, own, 0)[0]) and not torch.equal(ids, picture_negatives(data, questions, own, 1)[0])
    if strategy == 'uniform':                                              # each of the pictured items that the user does not own alike
        n = seen.sum() - np.array([len({i for i in row.tolist() if seen[i]} - {0}) for row in training_items(data, questions['user'])])
        assert np.allclose(logq.exp().numpy(), 1/n[:, None], rtol=1e-4)

def test_questions_without_a_picture_are_left_out(data, questions):
    every = examples(data, 'yes_no', 'train', seed=0); n = with_picture(data)[every['positive'].list.first().to_numpy()].sum()
    assert 0 < len(questions) == n < len(every)

# ---- the loss ----
@pytest.fixture(scope='module')
def trainer(data, tmp_path_factory):
    from trl import DPOConfig
    from mmrec_wb.training.trl_trainers import PictureTrainer, as_dataset, trainer_args
    def make(**how):
        model, processor = load_backbone('tiny', data.catalogue['title'].to_list(), 0, None); torch.manual_seed(0)
        collate = Collator(data, processor, 'pictures')
        t = PictureTrainer(model, args=trainer_args(DPOConfig, tmp_path_factory.mktemp('t'), 10, report_to='none'), processing_class=processor,
            data_collator=collate, train_dataset=as_dataset([dict(x=1)]), peft_config=lora_config(8, 32, .05), **dict(loss='misp') | how)
        g = torch.Generator().manual_seed(1)
        for n, p in t.model.named_parameters():                            # a policy that has learned something
            if 'lora_B' in n: p.data = .3*torch.randn(p.shape, generator=g)
        return t, collate
    return make

def value_and_gradient(t, x):
    t.model.train(); t.model.zero_grad(); loss = t._compute_loss(t.model, t._prepare_inputs(x), False); loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in t.model.parameters() if p.grad is not None])

def rows_of(questions, K):
    return [e | dict(negative=n) for e, n in zip(questions.head(3).to_dicts(), np.random.default_rng(0).integers(1, 60, (3, K)).tolist())]

def test_at_the_start_nothing_is_learned_and_the_loss_is_known(trainer, questions):
    t, collate = trainer(lambda_text=.5)
    for n, p in t.model.named_parameters():
        if 'lora_B' in n: p.data.zero_()
    assert value_and_gradient(t, collate(rows_of(questions, 3)))[0] == pytest.approx(math.log(4) + .5*math.log(2), abs=1e-5)
    m = t._metrics['train']; assert m['ess'][0] == pytest.approx(3, abs=1e-4) and m['weight_max'][0] == pytest.approx(1/3, abs=1e-4) and m['margin'][0] == 0

@pytest.mark.parametrize('side', ['both', 'positive'])
def test_the_loss_is_that_of_log_probabilities_one_by_one(trainer, questions, side):
    "Against a token-by-token forward of every question alone, with the equation written out."
    t, collate = trainer(beta=.5, lambda_text=.7, text_side=side); rows = rows_of(questions, 3); got = value_and_gradient(t, collate(rows))[0]; t.model.eval()
    one = Collator(collate.data, collate.processor, 'right')
    def lp(e, item, word):
        x = one([e | dict(target=item, chosen=word)]); labels = x.pop('labels')
        z = t.model(**{k: v for k, v in x.items()}).logits[0, :-1].float().log_softmax(-1); on = labels[0, 1:] != -100
        return z[on].gather(1, labels[0, 1:][on][:, None]).sum()
    total = 0.
    with torch.no_grad():
        for e in rows:
            asked = [(i, 'Yes') for i in (e['positive'][0], *e['negative'])] + [(e['positive'][0], 'No'), (e['negative'][0], 'No')]
            policy = torch.stack([lp(e, *a) for a in asked])
            with t.model.disable_adapter(): r = policy - torch.stack([lp(e, *a) for a in asked])
            image = torch.nn.functional.softplus(torch.logsumexp(.5*(r[1:4] - r[0]), 0)); plus = torch.nn.functional.softplus
            text = plus(-.5*(r[0] - r[4])) if side == 'positive' else (plus(-.5*(r[0] - r[4])) + plus(-.5*(r[5] - r[1])))/2
            total += float(image + .7*text)/3
    assert got == pytest.approx(total, abs=2e-4) and abs(got - math.log(4) - .7*math.log(2)) > 1e-3

def test_a_loss_per_token_is_per_token(trainer, questions):
    "ipo: (the mean gap of the answers' tokens minus 1/(2 beta)), squared, as in train_hanorec; not of their sums."
    t, collate = trainer(loss='ipo', beta=.5, lambda_text=0.); x = collate(rows_of(questions, 3)); got = value_and_gradient(t, x)[0]
    with torch.no_grad(): r = (t.policy_log_probs(t.model, x) - t.frozen_log_probs(t.model, x))[:, :-2]
    n = x.get('counts', x['answers'] != NOTHING).sum(2)[:, :-2]; assert n.min() > 1
    want = lambda r: float(((r[:, :1] - r[:, 1:] - 1/(2*.5))**2).mean()); assert got == pytest.approx(want(r/n), rel=1e-4) and abs(want(r) - want(r/n)) > 1e-2

def test_misp_without_weights_is_sdpo_and_with_one_picture_dpo(trainer, questions):
    for K, other in ((3, 'sdpo'), (1, 'dpo')):
        (t, collate), (o, _) = trainer(beta=.5), trainer(loss=other, beta=.5)
        (a, ga), (b, gb) = (value_and_gradient(x, collate(rows_of(questions, K))) for x in (t, o))
        assert a == pytest.approx(b, abs=1e-6) and torch.allclose(ga, gb, atol=1e-6)

def test_packed_is_one_by_one(trainer, questions):
    t, collate = trainer(beta=.5); x = collate(rows_of(questions, 3)); a, ga = value_and_gradient(t, x); t.packed = False; b, gb = value_and_gradient(t, x)
    assert a == pytest.approx(b, abs=1e-5) and torch.allclose(ga, gb, atol=1e-5)

def test_a_step_makes_the_positive_likelier(trainer, questions):
    "The image side alone: the gradient lifts r_p - r_i."
    t, collate = trainer(beta=1., lambda_text=0.); x = collate(rows_of(questions, 3)); a, g = value_and_gradient(t, x)
    with torch.no_grad():
        for p in (p for p in t.model.parameters() if p.grad is not None): p -= .01*p.grad/g.norm()
    assert value_and_gradient(t, x)[0] < a and t._metrics['train']['gap'][1] > t._metrics['train']['gap'][0]

# ---- settings ----
WRONG = [(dict(strategy='saee'), 'did you mean sae'), (dict(negatives=0), 'at least 1'), (dict(misp_mode='sampled', strategy='uniform'), 'strategy=sae'),
         (dict(loss='hanorec'), 'needs'), (dict(loss='mdpo'), 'needs'), (dict(task='top3'), 'yes_no'), (dict(text_side='left'), 'positive'),
         (dict(sea_units=3), 'did you mean'), (dict(loss='sdpo', misp_mode='sampled'), 'a form of loss=misp'), (dict(beta=-1.), 'at least 0'),
         (dict(prefilter=0), 'at least 1'), (dict(sae_units=-1), 'at least 1'), (dict(preference_epochs=0), 'at least 1'), (dict(clip=-3.), 'at least 0')]
@pytest.mark.parametrize('what, says', WRONG)
def test_nonsense_is_one_line(what, says):
    with pytest.raises(WorkbenchError, match=says) as e: settled(what)
    assert '\n' not in str(e.value)

def test_settings_without_a_part_do_not_tell_runs_apart():
    of = lambda **k: settled(k)[1]
    assert of(temperature=.7) == of() and of(clip=3.) == of() and of(strategy='uniform', prefilter=9, sae_units=3, clip=3.) == of(strategy='uniform')
    assert of(misp_mode='sampled', div_weight=3.) == of(misp_mode='sampled') != of(misp_mode='sampled', temperature=.7) and of()['beta'] == .5

def test_no_pictures_is_one_line(tmp_path):
    from mmrec_wb.training.misp import check_data
    bare = load_dataset('toys', source='planted', planted_users=30, planted_items=60, pictures=False)
    with pytest.raises(WorkbenchError, match='no pictures to compare'): check_data(bare, {})

# ---- the notebook ----
def papermill(tmp, timeout=400, **params):
    out, runs = tmp/'out.ipynb', tmp/'runs'; args = [a for k, v in {'out_dir': runs, **params}.items() for a in ('-p', k, str(v))]
    p = subprocess.run([str(Path(sys.executable).parent/'papermill'), 'nbs/train_misp_dpo.ipynb', str(out), *args], cwd=ROOT,
        capture_output=True, text=True, timeout=timeout)
    return p, out, runs

def figures(out): return [o['data']['application/vnd.plotly.v1+json'] for c in nbformat.read(out, 4).cells if c.cell_type == 'code'
                          for o in c.outputs if 'application/vnd.plotly.v1+json' in o.get('data', {})]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('misp'); p, out, runs = papermill(tmp, **SMALL)
    assert p.returncode == 0, p.stderr[-3000:]
    return tmp, out, runs

def test_a_whole_run(whole):
    _, out, runs = whole; shown = figures(out)
    assert len(shown) >= 7 and out.stat().st_size < 3_000_000 and 'Traceback' not in out.read_text()
    assert all('planted' in json.dumps(f['layout']) for f in shown), 'a figure of planted data must say so'
    assert sorted(p.name.split('-')[0] for p in runs.iterdir()) == ['misp_dpo', 'sae', 'sft']
    run = load_run(next(runs.glob('misp_dpo-*'))); assert run.finished and run.params['sae_run'] == next(runs.glob('sae-*')).name
    sel, gaps = run.frame('explain/selection'), run.frame('explain/gaps'); picked = sel.filter(pl.col('pick').is_not_null())
    assert (picked.group_by('example').len()['len'] == 3).all() and sel['candidate'].ne_missing(sel['positive']).all() and sel['logq'].null_count() == len(sel)
    assert set(gaps['strategy']) == {'sae', 'uniform'} and set(gaps['stage']) == {'before', 'after'} and gaps['gap'].is_finite().all()
    names = set(run.frame('metrics').filter(split='preference')['name'])
    assert {'ess', 'weight_max', 'margin', 'margin_text', 'accuracy_text', 'loss'} <= names
    ranks = run.frame('ranks'); assert ranks['log_odds'].to_list() != ranks['log_odds_sft'].to_list()

def test_the_same_again_only_redraws(whole):
    tmp, _, runs = whole; before = {p: p.stat().st_mtime_ns for p in runs.rglob('*') if p.is_file()}; p, out, _ = papermill(tmp, **SMALL)
    assert p.returncode == 0 and len(figures(out)) >= 7 and {p: p.stat().st_mtime_ns for p in runs.rglob('*') if p.is_file()} == before

def test_drawn_instead_of_greedy_and_pictures_alone(whole):
    "misp_mode=sampled on the picture task: its own SFT, the same autoencoder; log q of each draw is recorded."
    tmp, _, runs = whole; p, _, _ = papermill(tmp, **SMALL, misp_mode='sampled', task='picture', negatives=2)
    assert p.returncode == 0, p.stderr[-3000:]
    run = next(r for r in map(load_run, runs.glob('misp_dpo-*')) if r.params['misp_mode'] == 'sampled')
    drawn = run.frame('explain/selection').filter(pl.col('pick').is_not_null())
    assert len(list(runs.glob('sae-*'))) == 1 and len(list(runs.glob('sft-*'))) == 2 and (drawn['logq'] < 0).all()
    assert set(run.frame('ranks')['task']) == {'picture'}

@pytest.mark.parametrize('what, says', [(dict(strategy='topk'), 'known: popularity, sae, uniform'), (dict(negatives=0), 'at least 1'),
                                        (dict(misp_mod='none'), 'did you mean misp_mode')])
def test_nonsense_in_the_notebook_leaves_nothing(tmp_path, what, says):
    p, _, runs = papermill(tmp_path, 120, **SMALL | what)
    assert p.returncode and says in p.stderr.strip().splitlines()[-1] and not runs.exists()

# ---- kill and resume ----
def train(out, kill_in=None):
    code = f'''
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.training.hanorec import train_sft
from mmrec_wb.training.misp import train_misp
data = add_features(load_dataset('toys', source='planted', planted_users=40, planted_items=60), progress=False)
how = dict(out_dir={str(out)!r}, epochs=1, batch_size=8, device='cpu')
print(train_misp(data, train_sft(data, **how), strategy='uniform', preference_epochs=2, **how))'''
    p = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True); killed = False
    for _ in range(6000):
        if p.poll() is not None: break
        if kill_in and list(Path(out).glob(f'{kill_in}-*/checkpoint/checkpoint-*/trainer_state.json')): p.kill(); killed = True; break
        time.sleep(.05)
    error = p.stderr.read(); p.wait(); return killed, p.returncode, error

def test_a_killed_run_goes_on_and_ends_the_same(tmp_path):
    a, b = tmp_path/'a', tmp_path/'b'; _, rc, error = train(a); assert rc == 0, error[-2000:]
    killed, rc, error = train(b, 'misp_dpo'); assert killed and rc == -signal.SIGKILL, error[-500:]
    assert not load_run(next(b.glob('misp_dpo-*'))).finished; _, rc, error = train(b); assert rc == 0, error[-2000:]
    one, two = (load_run(next(x.glob('misp_dpo-*'))) for x in (a, b)); assert one.path.name == two.path.name
    assert one.frame('ranks')['log_odds'].to_list() == two.frame('ranks')['log_odds'].to_list()
    steps = lambda r: r.frame('metrics').filter(split='preference').sort('step', 'name'); assert steps(one).equals(steps(two))
