"""What reading a prompt once saves: preference steps beside TRL's DPOTrainer, and candidates scored together or one by one; one run, one thread.

    python benchmarks/packed_answers.py                        # about ten minutes on a quiet CPU; results/packed_answers.csv
    python benchmarks/packed_answers.py --repeats 1 --no-save  # does it run?

A small LLaVA with random weights and LoRA (which does something: policy and reference differ), prompts of about 600 tokens with pictures, answers of 15 tokens.
A step is collating the batch, policy forward and backward, and the reference: computed in the step, or, where the way is called `cached`, read from the
examples, as `mllm.reference` gives it. TRL gets messages, pictures and texts through its own collator; it knows pairs only, so K rejected answers are K pairs.
Where every answer shows a picture of its own (`own_picture`: a question about an item, the item last) TRL's collator has no place for it, and gets our rows.
`plain` is our trainer with a row for each answer. Ways that do the same are compared, and must give the same number.

The ways take turns; figures are medians, CPU seconds beside wall seconds. `floor`: tokens that go through the policy in our way, over those in the other: what
could be saved if time were tokens. A share can be below it: attention is quadratic, pictures are read once, and on a CPU TRL's head computes the logits of the
whole prompt too (not so on a GPU). `plain` does not, so `packed` beside `plain` shows packing alone. Memory: the highest resident memory of one step in a
process of its own, less what it held before.
"""
import argparse, multiprocessing, platform, statistics, subprocess, tempfile, time
from functools import cache
from typing import NamedTuple
import polars as pl, torch, transformers, trl
from peft import get_peft_model
from tqdm import tqdm
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.seeds import rng
from mmrec_wb.data import load_dataset
from mmrec_wb.data.encoders import quiet_transformers
from mmrec_wb.mllm.answers import answer_log_probs
from mmrec_wb.mllm.backbones import lora_config, tiny_model, tiny_processor
from mmrec_wb.mllm.prompts import NOTHING, Collator, prompt
from mmrec_wb.mllm.tasks import examples
from mmrec_wb.training.trl_trainers import PreferenceTrainer, as_dataset, trainer_args

PROMPT, ANSWER = 600, 15

class Way(NamedTuple):
    what: str      # step or score
    how: str       # packed, cached, plain, TRL; one by one
    K: int         # answers beside the first
    B: int         # prompts
    own: bool=False# does each answer show a picture of its own?

def policy_and_data():
    "A LLaVA of 256 dimensions and four layers; pictures of 16 tokens."
    quiet_transformers(); data = load_dataset('toys', source='planted', planted_users=200, planted_items=300)
    processor = tiny_processor(data.catalogue['title'].to_list(), image_size=128)
    return tiny_model(processor, seed=0, hidden=256, layers=4, heads=8), processor, data

def batch(data, processor, way):
    "Examples with histories long enough for the prompt; answers cut to their length, one chosen and K rejected, or K other items to ask about."
    g, collate, rows = rng(0, 'packed answers'), Collator(data, processor, 'none'), examples(data, 'yes_no', 'train', seed=0).head(way.B).to_dicts()
    tokenizer, tokens = processor.tokenizer, lambda e: collate([e])['input_ids'].shape[1]
    shown = [i for i in range(1, data.n_items + 1) if data.image(i) is not None]
    def answer():
        words = ', '.join(data.catalogue['title'][int(i)] or '' for i in g.integers(1, data.n_items + 1, size=2*ANSWER))
        return tokenizer.decode(tokenizer(words, add_special_tokens=False)['input_ids'][:ANSWER - 1]) # and the end of the turn
    for e in rows:
        e['history'] = []
        while tokens(e) < PROMPT: e['history'].append(int(g.integers(1, data.n_items + 1)))
        e |= dict(chosen=answer(), rejected=[answer() for _ in range(20)][:way.K], items=g.choice(shown, 20, replace=False)[:1 + way.K].tolist())
    return rows

def adapted(model):
    "With LoRA that does something: at the start policy and reference are one."
    for k, (n, p) in enumerate(model.named_parameters()):
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.02, generator=torch.Generator().manual_seed(k))
    return model

# ---- the batch: a function of nothing, timed
def beside(data, processor, rows, own):
    "Ours: every prompt once, its answers beside it; or their questions parted at the end, each answered Yes."
    collate = Collator(data, processor, 'all')
    if not own: return lambda: collate(rows)
    asked, yes = [[e | dict(target=i) for i in e['items']] for e in rows], [[collate.tail('Yes')]*len(e['items']) for e in rows]
    return lambda: collate.branches(asked, yes)

def pairs(data, processor, rows, own):
    "TRL's: its own collator, or with pictures of answers, which it has no place for, our rows; all first pairs, all second ones ..."
    K = range(len(rows[0]['rejected']))
    if own:
        collate = Collator(data, processor, 'none')
        asked = [e | dict(target=e['items'][n]) for first in (True, False) for k in K for e in rows for n in [0 if first else 1 + k]]
        return lambda: collate.batch(asked, [[collate.tail('Yes')]*len(asked)])
    collate, pictures = DataCollatorForVisionPreference(processor), Collator(data, processor, 'none').picture
    say = lambda text: [dict(role='assistant', content=text)]
    asked = [(*prompt(data, e), say(e['chosen']), say(e['rejected'][k])) for k in K for e in rows]
    return lambda: collate([dict(prompt=m, images=[pictures(i) for i in shown], chosen=c, rejected=r) for m, shown, c, r in asked])

# ---- the ways: functions that run once and return a number
def step(way):
    "One preference step; returns its loss."
    (model, processor, data), cls = policy_and_data(), DPOTrainer if way.how == 'TRL' else PreferenceTrainer
    rows = batch(data, processor, way); collate = (pairs if way.how == 'TRL' else beside)(data, processor, rows, way.own)
    with tempfile.TemporaryDirectory() as d:
        args, nothing = trainer_args(DPOConfig, d, 100, beta=.1, report_to='none'), as_dataset([dict(prompt='', chosen='', rejected='')])
        trainer = cls(model, args=args, train_dataset=nothing, processing_class=processor, data_collator=collate, peft_config=lora_config(dropout=0.))
    adapted(trainer.model).train(); trainer.packed = way.how != 'plain'
    cached = dict(reference=trainer.reference_log_probs(trainer.model, collate())) if way.how == 'cached' else {}
    if cached:
        trainer.state.global_step = 1                                        # the first step computes it anyway
        assert trainer.reference_log_probs(trainer.model, cached) is cached['reference']
    def run():
        loss = trainer._compute_loss(trainer.model, {**collate(), **cached}, False); loss.backward()
        trainer.model.zero_grad(); return loss.item()
    return run

def score(way):
    "1 + K candidates of each prompt; returns the sum. One by one: a forward for each candidate, the prompts processed once."
    model, processor, data = policy_and_data(); policy = adapted(get_peft_model(model, lora_config(dropout=0.))).eval()
    collate, one_by_one = beside(data, processor, batch(data, processor, way), False), way.how == 'one by one'
    def run():
        x = collate(); answers = x.pop('answers').split(1 if one_by_one else 1 + way.K, 1)
        with torch.no_grad(): return sum(answer_log_probs(policy, x, a, not one_by_one).total.sum().item() for a in answers)
    return run

def make(way): return dict(step=step, score=score)[way.what](way)

# ---- what is compared
def compared(B):
    "Pairs of ways, ours first: those that the targets speak of."
    trl, packed, cached = (Way('step', how, 1, B) for how in ('TRL', 'packed', 'cached')); three = lambda way: way._replace(K=3)
    return [(packed, trl), (cached, trl), (three(packed), trl), (three(cached), trl)]

def more(B):
    "The same problem in other ways, pictures in the answers, candidates."
    packed, trl = Way('step', 'packed', 3, B), Way('step', 'TRL', 1, B); plain, pairs = packed._replace(how='plain'), trl._replace(K=3)
    of_text = [(packed._replace(K=1), plain._replace(K=1)), (packed, plain), (packed, pairs)]
    of_pictures = [tuple(way._replace(own=True) for way in two) for two in ((packed, trl), (packed, plain), (packed, pairs))]
    return [*of_text, *of_pictures, (Way('score', 'packed', 19, B), Way('score', 'one by one', 19, B))]

COMPARED = [*compared(2), *more(2), *compared(4)]

@cache
def tokens(K, B, own):
    "Mean tokens of prompts and of answers."
    _, processor, data = policy_and_data(); x = beside(data, processor, batch(data, processor, Way('', '', K, B)), own)()
    return x['attention_mask'].sum().item()/B, (x['answers'] != NOTHING).sum().item()/x['answers'].shape[:2].numel()

def sizes(ours, other):
    "Tokens, and the floor."
    (P, A), rows = tokens(*ours[2:]), 2*other.K if other.how == 'TRL' else 1 + other.K
    return dict(prompt_tokens=P, answer_tokens=A, floor=(P + (1 + ours.K)*A)/(rows*(P + A)))

def timed(ways, repeats):
    "Median seconds of each way, taking turns, wall and CPU; and the number it gives."
    clocks, runs = dict(s=time.perf_counter, cpu_s=time.process_time), {w: make(w) for w in ways}
    given, seconds = {w: run() for w, run in runs.items()}, {(w, c): [] for w in ways for c in clocks}  # the first round warms up
    for w in tqdm(ways*repeats, desc='turns', mininterval=10):
        start = {c: clock() for c, clock in clocks.items()}; runs[w]()
        for c, clock in clocks.items(): seconds[w, c].append(clock() - start[c])
    return {w: {c: statistics.median(seconds[w, c]) for c in clocks} | dict(gives=given[w]) for w in ways}

def peak(way):
    "Peak resident memory of one step above that before it, in MB."
    def resident(key): return next(int(line.split()[1])/1024 for line in open('/proc/self/status') if line.startswith(key))
    run = make(way); before = resident('VmRSS'); run()
    return resident('VmHWM') - before

def main(repeats, save):
    ways = list(dict.fromkeys(w for pair in COMPARED for w in pair))
    with multiprocessing.get_context('fork').Pool(1, maxtasksperchild=1) as pool: peaks = pool.map(peak, ways, chunksize=1)
    found = {w: f | dict(peak_mb=mb) for (w, f), mb in zip(timed(ways, repeats).items(), peaks)}
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=project_root(), capture_output=True, text=True).stdout.strip()
    versions, rows = dict(torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__, machine=platform.machine(), commit=git), []
    for ours, other in COMPARED:
        a, b = found[ours], found[other]
        if ours.K == other.K: assert abs(a['gives'] - b['gives']) < 1e-4*max(1, abs(b['gives'])), f'{ours} and {other} give {a} and {b}'
        each = {f'{who}_{k}': f[k] for k in ('s', 'cpu_s', 'peak_mb') for who, f in (('ours', a), ('other', b))}
        rows.append(dict(what=ours.what, own_picture=ours.own, prompts=ours.B, ours=ours.how, answers=1 + ours.K, other=other.how, other_answers=1 + other.K,
            **sizes(ours, other), share_of_time=a['s']/b['s'], share_of_cpu=a['cpu_s']/b['cpu_s'], **each, repeats=repeats) | versions)
    table = pl.DataFrame(rows)
    if save: atomic_write(project_root()/'results'/'packed_answers.csv', lambda tmp: table.write_csv(tmp, float_precision=3))
    with pl.Config(tbl_cols=-1, tbl_rows=-1, tbl_width_chars=160, float_precision=3):
        print(table.drop(*versions, 'repeats', pl.selectors.matches('_s$|_tokens$')))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--repeats', type=int, default=7); a.add_argument('--no-save', action='store_true')
    a = a.parse_args(); torch.set_num_threads(1); main(a.repeats, not a.no_save)
