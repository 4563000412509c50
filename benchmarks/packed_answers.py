"""What reading a prompt once saves: preference steps beside TRL's DPOTrainer, and candidates scored together or one by one; one run, one thread.

    python benchmarks/packed_answers.py                        # about ten minutes on a quiet CPU; results/packed_answers.csv
    python benchmarks/packed_answers.py --repeats 1 --no-save  # does it run?

A small LLaVA with random weights and LoRA, prompts of about 600 tokens with pictures, answers of about 15 tokens. A step is collating the batch, policy forward
and backward, and the reference. With K rejected answers TRL gets K pairs of each prompt, we get one prompt and 1 + K answers; the losses are compared and must
be equal. TRL's rows come from our collator, which puts each pair's pictures through the processor once. The ways take turns; figures are medians, CPU seconds
beside wall seconds. `floor`: tokens of the packed way over those of the other, what could be saved if time were tokens. Memory: the highest resident memory
of one step in a process of its own, less what it held before.
"""
import argparse, json, platform, statistics, subprocess, sys, tempfile, time
import polars as pl, torch, transformers, trl
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.seeds import rng
from mmrec_wb.data import load_dataset
from mmrec_wb.data.encoders import quiet_transformers
from mmrec_wb.mllm.answers import answer_log_probs
from mmrec_wb.mllm.backbones import lora_config, tiny_model, tiny_processor
from mmrec_wb.mllm.prompts import Collator, answers_of
from mmrec_wb.mllm.tasks import examples
from mmrec_wb.training.trl_trainers import PreferenceTrainer, as_dataset, trainer_args

PROMPT, ANSWER, BATCH, CANDIDATES = 600, 15, 2, 20

def policy_and_data():
    "A LLaVA of 256 dimensions and four layers; pictures of 16 tokens."
    quiet_transformers(); data = load_dataset('toys', source='planted', planted_users=200, planted_items=300)
    processor = tiny_processor(data.catalogue['title'].to_list(), image_size=128)
    return tiny_model(processor, seed=0, hidden=256, layers=4, heads=8), processor, data

def batch(data, processor, K):
    "Examples with histories long enough for the prompt, and answers cut to their length: one chosen, K rejected."
    g, collate, rows = rng(0, 'packed answers', K), Collator(data, processor, 'none'), examples(data, 'yes_no', 'train', seed=0).head(BATCH).to_dicts()
    tokenizer, tokens = processor.tokenizer, lambda e: collate([e])['input_ids'].shape[1]
    def answer():
        words = ', '.join(data.catalogue['title'][int(i)] or '' for i in g.integers(1, data.n_items + 1, size=2*ANSWER))
        return tokenizer.decode(tokenizer(words, add_special_tokens=False)['input_ids'][:ANSWER - 1]) # and the end of the turn
    for e in rows:
        e['history'] = []
        while tokens(e) < PROMPT: e['history'].append(int(g.integers(1, data.n_items + 1)))
        e |= dict(chosen=answer(), rejected=[answer() for _ in range(K)], weight=1.)
    return rows

def adapted(model):
    "With LoRA that does something: at the start policy and reference are one."
    for k, (n, p) in enumerate(model.named_parameters()):
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.02, generator=torch.Generator().manual_seed(k))
    return model

def step(cls, K):
    "A function that runs one preference step of a trainer and returns its loss."
    (model, processor, data), ours = policy_and_data(), cls is PreferenceTrainer
    rows, collate = batch(data, processor, K), Collator(data, processor, 'all' if ours else 'pair')
    if not ours: rows = [{k: v for k, v in e.items() if k != 'weight'} | dict(rejected=e['rejected'][k]) for k in range(K) for e in rows]
    with tempfile.TemporaryDirectory() as d:
        trainer = cls(model, args=trainer_args(DPOConfig, d, 100, beta=.1, per_device_train_batch_size=len(rows), report_to='none'),
            train_dataset=as_dataset(rows), processing_class=processor, data_collator=collate, peft_config=lora_config(dropout=0.))
    adapted(trainer.model).train()
    def run():
        loss = trainer._compute_loss(trainer.model, collate(rows), False); loss.backward()
        trainer.model.zero_grad(); return loss.item()
    return run

def score(packed, K):
    "A function that scores 1 + K candidates of each prompt and returns the sum."
    model, processor, data = policy_and_data(); policy = adapted(get_peft_model(model, lora_config(dropout=0.))).eval()
    rows, collate = batch(data, processor, K), Collator(data, processor, 'all')
    def run():
        x = collate(rows); answers = x.pop('answers'); x.pop('weight')
        with torch.no_grad(): return answer_log_probs(policy, x, answers, packed).total.sum().item()
    return run

WAYS = dict(step=(lambda K: step(PreferenceTrainer, K), lambda K: step(DPOTrainer, K)), score=(lambda K: score(True, K), lambda K: score(False, K)))

def sizes(K, pairs):
    "Mean tokens of prompts and of answers, and the floor against rows of prompt and answer: two of each pair, or one of each answer."
    _, processor, data = policy_and_data(); rows = batch(data, processor, K); collate = Collator(data, processor, 'none')
    P = collate(rows)['attention_mask'].sum().item()/BATCH
    A = statistics.mean(len(collate.tail(a)) for e in rows for a in answers_of(e))
    return dict(prompt_tokens=P, answer_tokens=A, floor=(P + (1 + K)*A)/((2*K if pairs else 1 + K)*(P + A)))

def timed(what, K, repeats):
    "Median seconds of both ways, taking turns; they must give the same number."
    clocks, runs = dict(s=time.perf_counter, cpu_s=time.process_time), [make(K) for make in WAYS[what]]
    a, b = (run() for run in runs)                                           # the first round warms up
    assert abs(a - b) < 1e-4*max(1, abs(b)), f'{what}, K={K}: {a} and {b} differ'
    seconds = {(k, c): [] for k in (0, 1) for c in clocks}
    for k in (0, 1)*repeats:
        start = {c: clock() for c, clock in clocks.items()}; runs[k]()
        for c, clock in clocks.items(): seconds[k, c].append(clock() - start[c])
    m = {k: statistics.median(t) for k, t in seconds.items()}
    took = {f'{name}_{c}': m[k, c] for c in clocks for k, name in enumerate(('packed', 'other'))}
    return took | dict(share_of_time=m[0, 's']/m[1, 's'], share_of_cpu=m[0, 'cpu_s']/m[1, 'cpu_s'])

def peak(what, K, way):
    "Peak resident memory of one step above that before it, in MB."
    def resident(key): return next(int(line.split()[1])/1024 for line in open('/proc/self/status') if line.startswith(key))
    run = WAYS[what][way](K); before = resident('VmRSS'); run()
    return resident('VmHWM') - before

def main(repeats, save):
    child = lambda *a: float(subprocess.run([sys.executable, __file__, '--child', *map(str, a)], capture_output=True, text=True, check=True).stdout.split()[-1])
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=project_root(), capture_output=True, text=True).stdout.strip()
    versions, rows = dict(torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__, machine=platform.machine(), commit=git), []
    for what, K, other in (('step', 1, 'TRL DPOTrainer'), ('step', 3, 'TRL DPOTrainer, 3 pairs'), ('score', CANDIDATES - 1, 'a row for each candidate')):
        memory = dict(zip(('packed_peak_mb', 'other_peak_mb'), (child(what, K, way) for way in (0, 1))))
        figures = sizes(K, what == 'step') | timed(what, K, repeats) | memory
        rows.append(dict(what=what, answers=1 + K, other=other, batch=BATCH, **figures, repeats=repeats) | versions)
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items() if k not in versions}), flush=True)
    if save: atomic_write(project_root()/'results'/'packed_answers.csv', lambda tmp: pl.DataFrame(rows).write_csv(tmp, float_precision=3))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--repeats', type=int, default=9); a.add_argument('--no-save', action='store_true')
    a.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    a = a.parse_args(); torch.set_num_threads(1)
    if a.child: print(peak(a.child[0], int(a.child[1]), int(a.child[2])))
    else: main(a.repeats, not a.no_save)
