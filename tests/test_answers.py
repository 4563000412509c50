"Packed answers against plain ones, on tiny checkpoints of the families; and what must not agree."
import re, warnings
import numpy as np, pytest, torch
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.mllm import answers as A
from mmrec_wb.mllm.answers import answer_log_probs, unwrapped, why_plain
from mmrec_wb.mllm.backbones import load_backbone, lora_config
from mmrec_wb.mllm.prompts import NOTHING, TOKENWISE, Collator
from mmrec_wb.mllm.scoring import score_candidates
from mmrec_wb.mllm.tasks import examples
from mmrec_wb.preference.noise import lora_noise, noisy_logits
from test_backbones import data, folders, mixed

FAMILIES = ('qwen', 'idefics3', 'llava')
TEXTS = [['Red toy', 'No', 'a blue game, item'], ['Yes', 'Will this person', 'x'], ['No picture', 'Yes', 'Answer'], ['Yes', 'No', 'first'],
         ['oldest', 'take this item next', 'No']] # of different lengths

def tokens(collate, K=2): return [[collate.tail(t) for t in texts[:1 + K]] for texts in TEXTS]

def to_the_left(x):
    "The same prompts, padded on the left."
    move = (x['attention_mask'] == 0).sum(1).tolist()
    return x | {k: torch.stack([r.roll(m) for r, m in zip(x[k], move)]) for k in (*TOKENWISE, 'attention_mask') if k in x}

def loaded(folders, name, attention='sdpa'):
    model, processor = load_backbone(str(folders/name)); model.set_attn_implementation(attention); return model, processor

def adapted(model):
    "With LoRA that does something."
    from peft import get_peft_model
    torch.manual_seed(0); policy = get_peft_model(model, lora_config(dropout=0.))
    for n, p in policy.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.05, generator=torch.Generator().manual_seed(len(n)))
    return policy

def both(model, x, answers, grad=None, **how):
    "Log-probabilities, and gradients of a weighted sum of them, packed and plain; the largest differences of each."
    params, found = [p for p in (grad or model).parameters() if p.requires_grad], []
    for packed in (True, False):
        torch.manual_seed(0); lp = answer_log_probs(model, x, answers, packed=packed, **how)
        (lp.total*torch.tensor([1., -2., .5]).repeat(3)[:lp.total.shape[1]]).sum().backward()
        found.append((lp, [p.grad for p in params])); [setattr(p, 'grad', None) for p in params]
    (a, ga), (b, gb) = found
    assert torch.equal(a.lengths, b.lengths) and all((g is None) == (h is None) for g, h in zip(ga, gb))
    assert max(g.abs().max() for g in gb if g is not None) > 1e-3
    return (a.tokens - b.tokens).abs().max().item(), max(((g - h).abs().max()/(1 + h.abs().max())).item() for g, h in zip(ga, gb) if g is not None), a

ALL = [(name, attention, side) for name in FAMILIES for attention in ('sdpa', 'eager') for side in ('right', 'left')]
ALL += [('smolvlm', 'sdpa', 'right')] # Idefics3 with larger tiles: slow

@pytest.mark.parametrize('name, attention, side', ALL)
def test_packed_is_plain(folders, data, name, attention, side):
    "Log-probabilities and the gradients of all weights; prompts with no, one, several and six pictures, ragged answers."
    model, processor = loaded(folders, name, attention); collate = Collator(data, processor, 'none')
    rows = mixed(data).to_dicts()[:3 if name == 'smolvlm' else 5]
    x, answers = collate(rows), tokens(collate)[:len(rows)]
    off, tilt, lp = both(model, to_the_left(x) if side == 'left' else x, answers)
    print(f'{name} {attention} {side}: log-probs {off:.1e}, gradients {tilt:.1e}')
    assert off < 1e-5 and tilt < 1e-5
    assert lp.lengths.tolist() == [[len(t) for t in r] for r in answers] and torch.allclose(lp.tokens.sum(2), lp.total)

@pytest.mark.parametrize('name', FAMILIES)
def test_plain_is_what_a_forward_per_answer_gives(folders, data, name):
    "The oracle itself: full logits of one row at a time, without our bookkeeping."
    model, processor = loaded(folders, name); collate = Collator(data, processor, 'none'); rows = mixed(data).to_dicts(); answers = tokens(collate)
    with torch.no_grad():
        together = answer_log_probs(model, collate(rows), answers, packed=False).total
        for b, r in enumerate(rows):
            for k, t in enumerate(answers[b]):
                x = collate.batch([r], [[t]]); mask = x.pop('completion_mask').bool()[0, 1:]
                lp = model(**x, use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, x['input_ids'][0, 1:, None])[:, 0]
                assert abs(lp[mask].sum() - together[b, k]) < 2e-4

# ---- with what training adds
@pytest.mark.parametrize('name', FAMILIES)
def test_with_lora(folders, data, name):
    "Through peft's wrapper; the reference (LoRA switched off) too."
    model, processor = loaded(folders, name); collate = Collator(data, processor, 'none'); x, answers = collate(mixed(data).to_dicts()), tokens(collate)
    policy = adapted(model).train(); off, tilt, lp = both(policy, x, answers); assert off < 1e-5 and tilt < 1e-5
    with torch.no_grad(), policy.disable_adapter():
        a, b = (answer_log_probs(policy, x, answers, packed=p).total for p in (True, False))
    assert (a - b).abs().max() < 2e-5 and (a - lp.total).abs().max() > 1e-2 and not a.requires_grad

@pytest.mark.parametrize('name', FAMILIES)
def test_with_noise_on_lora(folders, data, name):
    "One draw a forward, so all answers share it in both ways; the same seed gives the same draw."
    model, processor = loaded(folders, name); collate = Collator(data, processor, 'none'); x, answers = collate(mixed(data).to_dicts()), tokens(collate)
    policy = adapted(model).train(); clean = answer_log_probs(policy, x, answers).total
    with lora_noise(policy, .05): off, tilt, lp = both(policy, x, answers)
    assert off < 1e-5 and tilt < 1e-5 and (lp.total - clean).abs().max() > 1e-2

@pytest.mark.parametrize('name', FAMILIES)
def test_with_noise_on_logits(folders, data, name):
    "Position j of all answers to a prompt sees the same noise, as in `noisy_logits`."
    model, processor = loaded(folders, name); collate = Collator(data, processor, 'none'); x = collate(mixed(data).to_dicts())
    answers = [[a, a, b] for a, b, _ in tokens(collate)]
    off, tilt, lp = both(model, x, answers, on_logits=lambda z, counts: noisy_logits(z, counts, .5, copies=3))
    assert off < 1e-5 and tilt < 1e-5 and (lp.total - answer_log_probs(model, x, answers).total).abs().max() > .1
    assert (lp.tokens[:, 0] - lp.tokens[:, 1]).abs().max() < 1e-5              # two equal answers stay equal

@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_with_gradient_checkpointing(folders, data, name, reentrant):
    "Both kinds, with noise on LoRA: the recomputed forward is the first one again."
    def one(checkpointing, packed):
        calls = []; model, processor = loaded(folders, name); collate = Collator(data, processor, 'none')
        policy = adapted(model).train()
        [m for n, m in policy.named_modules() if n.endswith('layers.1.mlp')][-1].register_forward_pre_hook(lambda *a: calls.append(1))
        if checkpointing: policy.enable_input_require_grads(); policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
        torch.manual_seed(0)
        with lora_noise(policy, .05): lp = answer_log_probs(policy, collate(mixed(data).to_dicts()), tokens(collate), packed=packed).total
        (lp*torch.tensor([1., -2., .5])).sum().backward()
        return lp.detach(), {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}, len(calls)
    (a, ga, once), (b, gb, twice), (c, gc, _) = one(False, True), one(True, True), one(True, False)
    assert (once, twice) == (1, 2) and len(ga) == 28
    for lp, g in ((b, gb), (c, gc)): assert (lp - a).abs().max() < 2e-5 and max((g[n] - ga[n]).abs().max()/(1 + ga[n].abs().max()) for n in ga) < 1e-5

def test_inside_wrappers(folders, data):
    "Called through DistributedDataParallel, so that gradients are shared; its model found inside."
    import torch.distributed as dist, tempfile
    model, processor = loaded(folders, 'qwen'); collate = Collator(data, processor, 'none'); x, answers = collate(mixed(data).to_dicts()), tokens(collate)
    policy = adapted(model).train(); before = both(policy, x, answers)
    with tempfile.NamedTemporaryFile() as f:
        dist.init_process_group('gloo', init_method=f'file://{f.name}', rank=0, world_size=1)
        try:
            calls = []; wrapped = torch.nn.parallel.DistributedDataParallel(policy); wrapped.register_forward_pre_hook(lambda *a: calls.append(1))
            assert unwrapped(wrapped) is model
            off, tilt, lp = both(wrapped, x, answers)
        finally: dist.destroy_process_group()
    assert off < 1e-5 and tilt < 1e-5 and torch.equal(lp.total, before[2].total) and len(calls) == 2

# ---- answers of many shapes
def test_any_number_and_length(folders, data):
    "One answer, nine, of one token and of forty, -100 tensors and lists, no pictures at all."
    model, processor = loaded(folders, 'qwen'); collate = Collator(data, processor, 'none'); some = mixed(data).to_dicts()
    g = torch.Generator().manual_seed(0); draw = lambda n: torch.randint(7, len(processor.tokenizer), (n,), generator=g).tolist()
    for rows, lengths in ((some, [[3]]*5), (some[:2], [[1]*9]*2), (some[2:], [[1, 40, 2], [7, 1, 1], [2, 2, 2]]), ([some[0], some[4]], [[1, 2], [5, 1]])):
        x, answers = collate(rows), [[draw(n) for n in ns] for ns in lengths]
        off, tilt, lp = both(model, x, answers); assert off < 1e-5 and tilt < 1e-5 and lp.lengths.tolist() == lengths
    with pytest.raises(WorkbenchError, match='different numbers of answers'): answer_log_probs(model, x, [[[1], [2]], [[3]]])
    for wrong in (torch.full((2, 2, 3), NOTHING), torch.ones(3, 2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)):
        with pytest.raises(WorkbenchError, match='do not fit 2 prompts'): answer_log_probs(model, x, wrong)

@pytest.mark.parametrize('name', FAMILIES)
def test_the_other_answers_do_not_matter(folders, data, name):
    "Alone, in another order, beside others: an answer's log-probability is its own."
    model, processor = loaded(folders, name); collate = Collator(data, processor, 'none'); x, answers = collate(mixed(data).to_dicts()), tokens(collate)
    with torch.no_grad():
        lp = answer_log_probs(model, x, answers).total
        assert (answer_log_probs(model, x, [a[::-1] for a in answers]).total.flip(1) - lp).abs().max() < 1e-5
        for k in range(3): assert (answer_log_probs(model, x, [a[k:k + 1] for a in answers]).total[:, 0] - lp[:, k]).abs().max() < 1e-5

def test_the_collator_reads_each_picture_once(folders, data):
    "A list of rejected answers, one prompt: the pictures of one copy, and the rows of 'pair' when taken apart."
    model, processor = loaded(folders, 'qwen'); some = mixed(data).to_dicts(); seen = []
    collate = Collator(data, processor, 'all'); picture, collate.picture = collate.picture, lambda i: (seen.append(i), picture(i))[1]
    x = collate([e | dict(chosen=t[0], rejected=t[1:], weight=1. + k) for k, (e, t) in enumerate(zip(some, TEXTS))])
    assert len(seen) == len(x['image_grid_thw']) == 9 and x['answers'].shape[:2] == (5, 3) and x['weight'].tolist() == [1., 2., 3., 4., 5.]
    pair = Collator(data, processor, 'pair')([e | dict(chosen=t[0], rejected=t[1]) for e, t in zip(some, TEXTS)])
    mask, answers = pair.pop('completion_mask').bool(), x.pop('answers'); x.pop('weight')
    with torch.no_grad():
        z = model(**pair, use_cache=False).logits.log_softmax(-1)[:, :-1].gather(2, pair['input_ids'][:, 1:, None])[..., 0]
        assert ((z*mask[:, 1:]).sum(1).view(2, 5).T - answer_log_probs(model, x, answers).total[:, :2]).abs().max() < 1e-4
    with pytest.raises(WorkbenchError, match='different numbers of answers'):
        collate([e | dict(chosen='Yes', rejected=['No']*(1 + k)) for k, e in enumerate(some)])

# ---- answers with a picture of their own
def questions(data):
    "Two histories; three items in question each, with and without pictures."
    there = [i for i in range(1, data.n_items + 1) if data.image(i) is not None]; gone = [i for i in range(1, data.n_items + 1) if data.image(i) is None]
    e = mixed(data).to_dicts()
    return [[e[2] | dict(target=t) for t in (there[5], gone[3], there[6])], [e[3] | dict(target=t) for t in (there[9], there[10], gone[1])]]

@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@pytest.mark.parametrize('name', [*FAMILIES, 'smolvlm'])
def test_a_picture_in_a_branch(folders, data, name, attention):
    "The item in question last: packed, plain, and each whole prompt by itself are the same."
    model, processor = loaded(folders, name, attention); collate, asked = Collator(data, processor, 'none'), questions(data)
    said = [[collate.tail(t) for t in ('Yes', 'No', 'Yes')]]*2
    x = collate.branches(asked, said); how = {k: x.pop(k) for k in ('answers', 'counts', 'pictures')}
    for side in (lambda x: x, to_the_left):
        off, tilt, lp = both(model, side(x), **how); print(f'{name} {attention} picture branches: {off:.1e}, gradients {tilt:.1e}')
        assert off < 1e-5 and tilt < 1e-5
    assert lp.lengths.tolist() == [[len(t) for t in r] for r in said]
    with torch.no_grad():
        others = how | dict(pictures={k: v.flip(0) for k, v in how['pictures'].items()})           # the pictures reach the model, each in its place
        assert (answer_log_probs(model, x, **others).total - lp.total).abs().max() > 1e-3
        for b in range(2):
            for k in range(3): assert abs(answer_log_probs(model, collate([asked[b][k]]), [[said[b][k]]]).total[0, 0] - lp.total[b, k]) < 2e-4

# ---- what must not agree
def mutant(monkeypatch, how):
    if how == 'positions run on':
        on = lambda row: row._replace(step=torch.arange(row.step.shape[1]).expand_as(row.step))
        monkeypatch.setattr(A, 'positions', lambda base, x, answers, row, grid=None, f=A.positions: f(base, x, answers, on(row), grid))
    if how == 'answers see each other':
        monkeypatch.setattr(A, 'visible', lambda prompt, row, f=A.visible: f(prompt, row._replace(branch=torch.zeros_like(row.branch))))
    if how == 'padding is seen': monkeypatch.setattr(A, 'visible', lambda prompt, row, f=A.visible: f(torch.ones_like(prompt), row))
    if how == 'a boolean mask under eager': monkeypatch.setattr(A, 'as_mask', lambda see, attention, dtype: see[:, None])
    if how == 'a 0/1 float under sdpa': monkeypatch.setattr(A, 'as_mask', lambda see, attention, dtype: see[:, None].to(dtype))

MUTANTS = {'positions run on': 'sdpa', 'answers see each other': 'sdpa', 'padding is seen': 'sdpa',
           'a boolean mask under eager': 'eager', 'a 0/1 float under sdpa': 'sdpa'}

@pytest.mark.parametrize('how', MUTANTS)
@pytest.mark.parametrize('name', FAMILIES)
def test_mutants_are_caught(folders, data, monkeypatch, name, how):
    "By the comparison of these tests, and by the trial at the start."
    model, processor = loaded(folders, name, MUTANTS[how]); collate = Collator(data, processor, 'none')
    x, answers = to_the_left(collate(mixed(data).to_dicts())), tokens(collate)
    assert both(model, x, answers)[0] < 1e-5 and why_plain(model, processor) is None
    mutant(monkeypatch, how); A._verdicts.clear()
    off, tilt, _ = both(model, x, answers); print(f'{name} {how}: log-probs {off:.2g}, gradients {tilt:.2g}')
    assert off > .01 and tilt > 1e-3
    with pytest.warns(UserWarning, match='packed and plain differ'): assert why_plain(model, processor)

@pytest.mark.parametrize('how', [None, *(m for m in MUTANTS if m != 'padding is seen')])
@pytest.mark.parametrize('name', FAMILIES)
def test_the_trial_in_half_precision(folders, monkeypatch, name, how):
    "Rounding passes, mutants do not (padding that is seen turns tiny LLaVA's gradient by 4.6 % only, close to the bound)."
    model, processor = loaded(folders, name, MUTANTS.get(how, 'sdpa')); model.to(torch.bfloat16); A._verdicts.clear()
    if how is None:
        with warnings.catch_warnings(): warnings.simplefilter('error'); assert why_plain(model, processor) is None
    else:
        mutant(monkeypatch, how)
        with pytest.warns(UserWarning, match='packed and plain differ'): assert why_plain(model, processor)

# ---- the fallback
def test_the_fallback_warns_once(folders, data, monkeypatch):
    "Flash attention, windows, an architecture that takes no packed rows: plain, one warning with the reason, the same numbers."
    model, processor = loaded(folders, 'llava'); collate = Collator(data, processor, 'none'); x, answers = collate(mixed(data).to_dicts()), tokens(collate)
    want = answer_log_probs(model, x, answers).total; text = model.config.get_text_config()
    def falls_back(why, processor=None):
        A._verdicts.clear(); ways = []
        for way in ('_packed', '_plain'): monkeypatch.setattr(A, way, lambda *a, f=getattr(A, way), way=way: (ways.append(way), f(*a))[1])
        with pytest.warns(UserWarning) as seen:
            why_plain(model, processor); ways.clear()
            got = [answer_log_probs(model, x, answers).total for _ in range(2)]
        assert re.search(why, str(seen[0].message))
        assert len(seen) == 1 and 'LlavaForConditionalGeneration' in str(seen[0].message) and ways == ['_plain']*2 and torch.allclose(got[0], want, atol=1e-4)
        monkeypatch.undo()
    for name, value, why in (('sliding_window', 8, 'sliding_attention'), ('layer_types', ['full_attention', 'chunked_attention'], 'chunked_attention')):
        setattr(text, name, value); falls_back(why); setattr(text, name, None)
    monkeypatch.setattr(A, '_attention', lambda base: 'flash_attention_2'); falls_back("'flash_attention_2' takes no mask of ours")
    monkeypatch.setattr(A, 'TESTED', ()); falls_back('nobody has tried')
    monkeypatch.setattr(A, 'positions', lambda *a: torch.zeros(1, 7, dtype=torch.long)); falls_back('does not take packed rows', processor)

def test_the_trial_leaves_no_trace(folders):
    "Modes, gradients and random numbers are as before; a new architecture that passes is packed."
    model, processor = loaded(folders, 'idefics3'); policy = adapted(model).train(); state = torch.get_rng_state(); A._verdicts.clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error'); assert why_plain(policy, processor) is None
    assert all(m.training for m in model.modules()) and torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings().weight.requires_grad

# ---- who uses it
@pytest.mark.parametrize('task', ['top3', 'pick_one'])
@pytest.mark.parametrize('name', FAMILIES)
def test_candidates_from_one_prompt(folders, data, monkeypatch, name, task):
    "Scores as from a forward per candidate; a forward a batch, each picture read once."
    model, processor = loaded(folders, name); some = examples(data, task, 'test', 0)[:6]; rows = []
    model.register_forward_pre_hook(lambda m, args, x: rows.append(len(x['input_ids'])), with_kwargs=True)
    why_plain(model, processor); rows.clear(); packed = score_candidates(model, processor, data, some, progress=False); assert rows == [some.height]
    monkeypatch.setattr('mmrec_wb.mllm.scoring.why_plain', lambda *a: 'a test'); rows.clear(); n = len(some['candidates'][0])
    plain = score_candidates(model, processor, data, some, batch_size=n, progress=False); assert rows == [n]*some.height
    np.testing.assert_allclose(np.stack(packed['scores']), np.stack(plain['scores']), rtol=1e-6, atol=1e-5)
    assert packed['ranks'].equals(plain['ranks'])

@pytest.mark.parametrize('noise, noise_on', [(0., 'lora'), (.05, 'lora'), (.5, 'logits')])
def test_twenty_steps(folders, data, tmp_path, noise, noise_on, name='qwen'):
    "The losses of a training, packed and plain, with three rejected answers and the same draws of noise."
    from trl import DPOConfig
    from mmrec_wb.training.trl_trainers import PreferenceTrainer, as_dataset, trainer_args
    rows = [e | dict(chosen=t[0], rejected=[*t[1:], 'Perhaps'], weight=1.) for e, t in zip(mixed(data).to_dicts(), TEXTS)]; curves = {}
    for packed in (True, False):
        model, processor = load_backbone(str(folders/name))
        args = trainer_args(DPOConfig, tmp_path/str(packed), 100, per_device_train_batch_size=2, max_steps=20, learning_rate=1e-3, seed=0, report_to='none')
        trainer = PreferenceTrainer(model, args=args, train_dataset=as_dataset(rows), processing_class=processor,
            data_collator=Collator(data, processor, 'all'), peft_config=lora_config(dropout=0.), loss='hanorec', noise=noise, noise_on=noise_on)
        assert trainer.packed; trainer.packed = packed; trainer.train()
        curves[packed] = np.array([l['loss'] for l in trainer.state.log_history if 'loss' in l])
    print(name, noise, noise_on, np.abs(curves[True]/curves[False] - 1).max(), curves[True][[0, -1]])
    assert len(curves[True]) == 20 and np.ptp(curves[True]) > 1e-2
    np.testing.assert_allclose(curves[True], curves[False], rtol=1e-4)
