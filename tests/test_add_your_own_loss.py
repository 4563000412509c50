"The tutorial's loss against its formula and TRL; its commands; and a stranger who copies the notebook."
import json, math, os, re, shlex, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run
from mmrec_wb.my.exo import exo_pair
from mmrec_wb.preference.losses import LOSSES, get_loss
from test_losses import batch, ours, same, shop, value_and_gradient
ROOT, NAME = project_root(), 'mmrec_wb.my.exo:exo_pair'
NOTEBOOK = ROOT/'nbs/tutorials/06_add_your_own_loss.ipynb'

def cells(kind): return [''.join(c['source']) for c in json.loads(NOTEBOOK.read_text('utf-8'))['cells'] if c['cell_type'] == kind]

def test_it_is_new_and_short():
    assert 'exo_pair' not in LOSSES and get_loss(NAME) is exo_pair and len(json.loads(NOTEBOOK.read_text('utf-8'))['cells']) < 25

# ---- the loss ----
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(.01, 2.), st.floats(1e-6, .999), st.integers(1, 5))
def test_the_formula(seed, beta, eps, K):
    "The divergence between two distributions over {chosen, rejected}, one pair at a time."
    policy, reference = batch(seed, K=K); each = []
    for x in (policy - reference).numpy():
        kl = 0
        for d in x[0] - x[1:]:
            log_p = np.array([beta*x[0], beta*(x[0] - d)]); log_p = log_p - np.logaddexp(*log_p)
            kl += (np.exp(log_p)*(log_p - np.log([1 - eps, eps]))).sum()
        each.append(kl/K)
    got = exo_pair(policy, reference, beta=beta, eps=eps)
    torch.testing.assert_close(got, torch.tensor(each, dtype=torch.float64), rtol=1e-9, atol=1e-9); assert (got > -1e-12).all()

@pytest.mark.parametrize('eps', [.2, 1e-3])
def test_trl(shop, tmp_path, eps):
    "Value and gradient of a language model's LoRA, through our trainer and TRL's."
    from trl import DPOConfig, DPOTrainer
    from mmrec_wb.mllm.backbones import lora_config
    from mmrec_wb.mllm.prompts import Collator
    from mmrec_wb.training.trl_trainers import as_dataset, trainer_args
    data, processor, rows, model = shop; mine, examples = ours(shop, tmp_path, rows, NAME, .3, eps=eps)
    args = trainer_args(DPOConfig, tmp_path, 100, per_device_train_batch_size=4, report_to='none', beta=.3, loss_type=['exo_pair'], label_smoothing=eps)
    trl = DPOTrainer(model(), args=args, train_dataset=as_dataset(rows), processing_class=processor, data_collator=(pairs := Collator(data, processor, 'pair')),
        peft_config=lora_config(dropout=0.))
    a = value_and_gradient(mine, lambda m: mine._compute_loss(m, examples, False))
    b = value_and_gradient(trl, lambda m: trl._compute_loss(m, pairs(rows), False))
    same(a, b, exo_pair(torch.zeros(1, 2), torch.zeros(1, 2), beta=.3, eps=eps).item())

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('gap', [1e4, -1e4])
def test_extremes(dtype, gap):
    p = torch.tensor([[gap, 0., 0.]], dtype=dtype, requires_grad=True); l = exo_pair(p, torch.zeros_like(p), beta=1.); l.sum().backward()
    assert l.item() == pytest.approx(-math.log(1e-3) if gap < 0 else -math.log(1 - 1e-3), rel=1e-4) and p.grad.isfinite().all()

# ---- the commands ----
def test_the_commands():
    "Every parameter exists, and the study has the cells that it is said to have."
    import argparse
    from papermill import inspect_notebook
    from mmrec_wb.training.cli import add_study, study_arguments
    from mmrec_wb.training.studies import plan
    said = [shlex.split(line) for text in cells('markdown') for line in re.findall(r'^    ((?:papermill|mmrec-wb) .*)', text, re.M)]
    assert [words[0] for words in said] == ['papermill', 'mmrec-wb', 'papermill']
    for words in said:
        if words[0] == 'papermill': assert set(words[k + 1] for k, w in enumerate(words) if w == '-p') <= set(inspect_notebook(str(ROOT/words[1])))
    add_study(parser := argparse.ArgumentParser()); asked = study_arguments(parser.parse_args(said[1][2:]))
    made = plan(asked['notebooks'], asked['grid'], asked['seeds'])
    assert [(c['params']['loss'], c['seed']) for c in made] == [(loss, s) for loss in ('none', 'dpo', NAME) for s in (0, 1, 2)]

# ---- somebody else's loss ----
def texts(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}

@pytest.mark.slow
def test_a_stranger(clone, tmp_path):
    "Copies the notebook, changes module, name and equation; exports; trains from the command line. No other file is touched."
    text = NOTEBOOK.read_text('utf-8').replace('default_exp my.exo', 'default_exp my.theirs').replace('my.exo:exo_pair', 'my.theirs:theirs')
    text = re.sub(r'\bexo_pair\b', 'theirs', text).replace('eps: float=1e-3', 'eps: float=.2')
    (clone/'nbs/tutorials/theirs.ipynb').write_text(text, 'utf-8'); before = texts(clone)
    env, bin = {**os.environ, 'PYTHONPATH': str(clone), 'MMREC_DATA': ''}, Path(sys.executable).parent
    do = lambda *command: subprocess.run([str(a) for a in command], cwd=clone, env=env, capture_output=True, text=True, timeout=600)
    p = do(bin/'nbdev_export'); assert p.returncode == 0, p.stderr[-2000:]
    after = texts(clone); assert after.keys() - before.keys() == {'mmrec_wb/my/theirs.py'}
    assert {n for n in before if after[n] != before[n]} == {'mmrec_wb/_modidx.py'}
    tiny = dict(dataset='toys', source='planted', max_users=60, out_dir=tmp_path/'runs', loss='mmrec_wb.my.theirs:theirs', base_epochs=1, epochs=1,
        d=16, heads=1, layers=1, max_len=10, device='cpu')
    p = do(bin/'papermill', 'nbs/train_rodpo.ipynb', tmp_path/'out.ipynb', *[a for k, v in tiny.items() for a in ('-p', k, v)])
    assert p.returncode == 0, p.stderr[-3000:]; run = load_run(next((tmp_path/'runs').glob('rodpo-*')))
    assert run.finished and run.params['loss'] == tiny['loss'] and run.frame('ranks').height == 60
    [value] = run.frame('metrics').filter(split='train', name='preference')['value']
    assert value == pytest.approx(-math.log(2) - math.log(.2*.8)/2, abs=.02)      # the changed equation, where policy and reference hardly differ
