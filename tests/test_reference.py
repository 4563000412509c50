"The reference's log-probabilities, kept on disk: what they are, what finds them again, what does not, and what can go wrong."
import json, signal, subprocess, sys, time
from shutil import copytree
import polars as pl, pytest, torch
from PIL import Image
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import project_root
from mmrec_wb.mllm import reference as R
from mmrec_wb.mllm.answers import answer_log_probs, why_plain
from mmrec_wb.mllm.backbones import load_backbone, lora_config
from mmrec_wb.mllm.prompts import Collator
from mmrec_wb.mllm.reference import reference_fingerprint, reference_log_probs
from mmrec_wb.mllm.tasks import examples
from test_backbones import data, folders, mixed
from test_bad_input import mounted

ROOT, FAMILIES = project_root(), ('qwen', 'idefics3', 'llava')

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A root of its own."
    monkeypatch.setattr('mmrec_wb.core.paths.project_root', lambda: tmp_path)
    return tmp_path/'data'/'cache'/'reference'

@pytest.fixture
def computed(monkeypatch):
    "How many prompts each batch had whose reference was computed."
    counts, real = [], R.answer_log_probs
    monkeypatch.setattr(R, 'answer_log_probs', lambda model, x, *a: counts.append(len(x['input_ids'])) or real(model, x, *a))
    return counts

@pytest.fixture(params=FAMILIES)
def family(request, folders): return folders/request.param

def with_rejected(rows, *more): return [e | dict(rejected=[*e['rejected'], *more]) for e in rows]
def ask(backbone, data, rows, batch_size=4): return reference_log_probs(backbone[0], Collator(data, backbone[1], 'all'), rows, batch_size, progress=False)
def file_in(cache): file, = cache.rglob('*.parquet'); return file
def off(a, b): return (torch.tensor(a) - torch.tensor(b)).abs().max().item()

def alone(model, processor, data, rows):
    "Each prompt alone, its answers one by one."
    collate, out = Collator(data, processor, 'all'), []
    for e in rows:
        x = collate([e])
        with torch.no_grad(): out += answer_log_probs(model, x, x.pop('answers'), packed=False).total.tolist()
    return out

# ---- what is kept
def test_cached_is_recomputed(family, data, cache):
    "Prompts with no, one, two and six pictures, ragged answers; through memory and through the disk."
    backbone, rows = load_backbone(str(family)), with_rejected(mixed(data).to_dicts(), 'Perhaps', 'first')
    first, again = (ask(backbone, data, rows) for _ in range(2))
    expected = alone(*backbone, data, rows)
    print(f'{family.name}: {off(first, expected):.1e}')
    assert first == again and off(first, expected) < 1e-5*max(1, torch.tensor(expected).abs().max()) and torch.tensor(first).shape == (5, 4)
    assert pl.read_parquet(file_in(cache)).height == 20 and min(abs(a - b) for a, b, *_ in first) > 1e-3

def test_a_hit_needs_no_forward(family, data, cache):
    "In other company, in another order, with another batch size, from another folder."
    backbone, rows = load_backbone(str(family)), with_rejected(mixed(data).to_dicts(), 'Perhaps')
    first = ask(backbone, data, rows)
    copytree(family, cache.parent.parent/'elsewhere'); other = load_backbone(str(cache.parent.parent/'elsewhere')); other[0].train()
    other[0].register_forward_pre_hook(lambda *a: pytest.fail('a forward'))
    assert ask(other, data, rows[::-1], 2) == first[::-1] and ask(other, data, rows[3:4]) == first[3:4]
    assert ask(other, data, [e | dict(rejected=e['rejected'][::-1]) for e in rows]) == [[a, c, b] for a, b, c in first] and other[0].training
    before = file_in(cache).stat().st_mtime_ns; ask(other, data, rows); assert file_in(cache).stat().st_mtime_ns == before

@pytest.mark.parametrize('what', ['one weight', 'a buffer', 'attention', 'half precision', 'config'])
def test_another_model(family, data, what):
    model, processor = load_backbone(str(family)); before = reference_fingerprint(model, processor)
    assert reference_fingerprint(*load_backbone(str(family))) == before
    if what == 'one weight': list(model.parameters())[-1].data.view(-1)[0] += 1e-5
    if what == 'a buffer': model.register_buffer('more', torch.ones(1))
    if what == 'attention': model.set_attn_implementation('eager')
    if what == 'half precision': model.bfloat16()
    if what == 'config': model.config.get_text_config().rms_norm_eps = 1e-4
    assert reference_fingerprint(model, processor) != before

@pytest.mark.parametrize('name', ['qwen', 'idefics3'])
def test_another_size_of_pictures(folders, data, cache, computed, name):
    small = load_backbone(str(folders/name), max_pixels=32*32); rows = mixed(data).to_dicts()
    a, b = ask(load_backbone(str(folders/name)), data, rows), ask(small, data, rows)
    assert sum(computed) == 10 and len(list(cache.rglob('*.parquet'))) == 2 and off(a[:1], b[:1]) < 1e-5 < off(a[1:], b[1:])

def test_only_what_changed_is_computed_again(folders, data, cache, computed):
    "Another answer, another picture, another number of answers."
    backbone, rows = load_backbone(str(folders/'qwen')), mixed(data).to_dicts(); first = ask(backbone, data, rows); assert sum(computed) == 5
    answered = [dict(rows[0], rejected=['Perhaps']), *rows[1:]]; computed.clear(); second = ask(backbone, data, answered)
    assert computed == [1] and second[1:] == first[1:] and second[0][0] == first[0][0] and second[0][1] != first[0][1]
    item, image = rows[1]['target'], data.image; computed.clear()
    data.image = lambda i: Image.new('RGB', (64, 64), (210, 20, 90)) if i == item else image(i)
    try: third = ask(backbone, data, rows)
    finally: del data.image
    assert computed == [1] and off(third[1], first[1]) > 1e-3 and [*third[:1], *third[2:]] == [*first[:1], *first[2:]]
    computed.clear(); fourth = ask(backbone, data, with_rejected(rows, 'first'))
    assert sum(computed) == 5 and [r[:2] for r in fourth] == first               # a value that is there stays

def test_an_example_that_comes_twice_is_computed_once(folders, data, cache, computed):
    rows = mixed(data).to_dicts(); twice = ask(load_backbone(str(folders/'llava')), data, rows + rows)
    assert sum(computed) == 5 and twice[:5] == twice[5:]

def test_a_model_that_diverged(folders, data, cache):
    backbone = load_backbone(str(folders/'llava')); why_plain(*backbone); backbone[0].get_input_embeddings().weight.data.fill_(float('nan'))
    with pytest.raises(WorkbenchError, match='NaN or inf'): ask(backbone, data, mixed(data).to_dicts())
    assert not cache.exists()

# ---- what can go wrong
@pytest.mark.parametrize('how', ['half', 'empty', 'no parquet', 'other columns', 'NaN'])
def test_a_damaged_file_is_computed_again(folders, data, cache, capsys, how):
    backbone, rows = load_backbone(str(folders/'llava')), mixed(data).to_dicts(); first = ask(backbone, data, rows); file = file_in(cache)
    if how == 'half': file.write_bytes(file.read_bytes()[:file.stat().st_size//2])
    if how == 'empty': file.write_bytes(b'')
    if how == 'no parquet': file.write_bytes(b'\x80\x04pickle')
    if how == 'other columns': pl.DataFrame(dict(key=['a'], log_prob=[1.])).write_parquet(file)
    if how == 'NaN': pl.read_parquet(file).with_columns(log_prob=pl.lit(float('nan'), pl.Float32)).write_parquet(file)
    capsys.readouterr(); again = ask(backbone, data, rows); said = capsys.readouterr().out.strip()
    assert again == first and said.startswith('warning: ') and 'is damaged' in said and '\n' not in said
    ask(backbone, data, rows); assert not capsys.readouterr().out

SCRIPT = '''
import json, os, sys, time
from pathlib import Path
import torch
import mmrec_wb.core.paths as paths
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.data import load_dataset
from mmrec_wb.mllm import reference as R
from mmrec_wb.mllm.backbones import load_backbone
from mmrec_wb.mllm.prompts import Collator
from mmrec_wb.mllm.tasks import examples
data = load_dataset('toys', source='planted', planted_users=40, planted_items=60)
model, processor = load_backbone('tiny', data.catalogue['title'].to_list(), seed=0)
rows = examples(data, 'yes_no', 'train', seed=0).to_dicts()[:60]
computed, real, R.SAVE_EVERY = [], R.answer_log_probs, -1
def log_probs(model, x, *a): computed.append(len(x['input_ids'])); return real(model, x, *a)
R.answer_log_probs = log_probs
def ask(rows): return R.reference_log_probs(model, Collator(data, processor, 'all'), rows, batch_size=4, progress=False)
'''

def started(root, script, *args):
    "A process of its own, with the cache under `root`."
    code = SCRIPT + f'paths.project_root = lambda: Path({str(root)!r})\n' + script
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def said(p):
    out, err = p.communicate(timeout=200); assert p.returncode == 0, err[-3000:]
    return json.loads(out.strip().splitlines()[-1])

def test_two_processes_lose_nothing(tmp_path):
    "Different, overlapping parts of the examples, written after every batch, beginning at the same moment; whoever comes next has nothing to compute."
    wait = '(Path(sys.argv[1])/sys.argv[2]).touch()\nwhile len(list(Path(sys.argv[1]).glob("ready*"))) < 2: time.sleep(.001)\n'
    work = 'print(json.dumps(ask(rows[slice(*map(int, sys.argv[3:]))])))'
    a, b = (started(tmp_path, wait + work, tmp_path, f'ready{n}', *part) for n, part in enumerate([(0, 40), (20, 60)]))
    a, b = said(a), said(b)
    values, n = said(started(tmp_path, 'print(json.dumps([ask(rows), sum(computed)]))'))
    assert n == 0 and off(values[:40], a) < 1e-5 and off(values[20:], b) < 1e-5
    assert not list(tmp_path.rglob('*.tmp'))

def test_a_killed_fill_goes_on(tmp_path):
    "kill -9 after some batches: the rest is computed, in the same batches, and every bit is as it would have been."
    slowly = 'keep = R._keep\ndef _keep(*a): keep(*a); time.sleep(.1)\nR._keep = _keep\n'
    p, end = started(tmp_path/'killed', slowly + 'ask(rows)'), time.time() + 120
    while not list((tmp_path/'killed').rglob('log_probs.parquet')): assert p.poll() is None and time.time() < end; time.sleep(.01)
    time.sleep(.25); p.send_signal(signal.SIGKILL); p.communicate()
    report = 'print(json.dumps([ask(rows), sum(computed)]))'
    (resumed, rest), (straight, whole) = (said(started(tmp_path/k, report)) for k in ('killed', 'straight'))
    assert 0 < rest < whole == 60 and rest % 4 == 0 and resumed == straight
    assert not list(tmp_path.rglob('*.tmp'))

def test_the_processes_of_one_training_share_the_work(tmp_path):
    group = 'torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)\n'
    report = 'print(json.dumps([ask(rows), sum(computed)]))'
    a, b = [said(p) for p in [started(tmp_path/'two', group + report, tmp_path/'meet', rank) for rank in (0, 1)]]
    one, n = said(started(tmp_path/'one', report))
    assert a[0] == b[0] and (a[1], b[1]) == (32, 28) and n == 60 and off(a[0], one) < 1e-5

def test_a_full_disk_is_one_line(tmp_path):
    script = SCRIPT + '''
paths.project_root = lambda: place
(place/"ballast").write_bytes(b"0"*(os.statvfs(place).f_bavail*os.statvfs(place).f_frsize))
said = error(lambda: ask(rows)); left = [str(p) for p in place.rglob("*.tmp")]; (place/"ballast").unlink()
print(json.dumps(dict(said=said, left=left, n=len(ask(rows)))))
'''
    r = mounted(tmp_path/'small', 'size=2m', script)
    assert r['said'] and 'No space left on device' in r['said'] and '\n' not in r['said'] and not r['left'] and r['n'] == 60

# ---- in training
@pytest.mark.parametrize('loss, noise', [('dpo', 0.), ('hanorec', 0.), ('hanorec', .05)])
@pytest.mark.parametrize('eta_over', ['micro_batch', 'step'])
def test_the_trainer_gets_the_same_losses(folders, data, cache, tmp_path, loss, noise, eta_over):
    "Eight optimiser steps of two micro-batches, with the draws of noise the same. At the start all gaps are zero, and have to stay it: eta knows no scale."
    from trl import DPOConfig
    from mmrec_wb.training.trl_trainers import PreferenceTrainer, as_dataset, quiet, trainer_args
    rows = [e | dict(weight=1 + .1*k) for k, e in enumerate(with_rejected(examples(data, 'yes_no', 'train', seed=0).to_dicts()[:16], 'Perhaps'))]
    def losses(known):
        model, processor = load_backbone(str(folders/'qwen')); collate = Collator(data, processor, 'all')
        if known: given = [e | dict(reference=r) for e, r in zip(rows, reference_log_probs(model, collate, rows, 8, progress=False))]
        args = trainer_args(DPOConfig, tmp_path/str(known), 100, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2,
                            learning_rate=1e-3, report_to='none', seed=0)
        trainer = PreferenceTrainer(model, args=args, train_dataset=as_dataset(given if known else rows), processing_class=processor, data_collator=collate,
            peft_config=lora_config(dropout=0.), loss=loss, beta=.1, eta_over=eta_over, noise=noise)
        asked = []; trainer.log_probs = (lambda real: lambda *a: asked.append(1) or real(*a))(trainer.log_probs)
        quiet(trainer).train(); return [l['loss'] for l in trainer.state.log_history if 'loss' in l], len(asked)
    (a, n), (b, m) = losses(False), losses(True)
    print(f'{loss} {noise} {eta_over}: {off(a, b):.1e}, {n} and {m} forwards')
    assert len(a) == 8 and off(a, b) < 1e-5 and max(a) - min(a) > 1e-3 and n == m + 14     # two in the first step, which computes its own

def test_losses_and_seeds_share_it(data, cache, computed, tmp_path):
    "Whatever starts from one SFT run; another SFT run does not."
    from mmrec_wb.training.hanorec import train_preference, train_sft
    how = dict(out_dir=tmp_path/'runs', epochs=1, batch_size=16, preference_epochs=1)
    sft = train_sft(data, **how); train_preference(data, sft, **how); first = sum(computed); assert first > 0
    for other in (dict(loss='dpo'), dict(seed=5), dict(loss='dpo', preference_lr=1e-3, beta=.5)): train_preference(data, sft, **how | other)
    assert sum(computed) == first and len(list(cache.iterdir())) == 1
    train_preference(data, train_sft(data, **how, seed=5), **how, seed=5)
    assert sum(computed) == 2*first and len(list(cache.iterdir())) == 2
