"The tasks, their batches, and how they are scored: facts, limits, and the model replaced by one whose answers are known."
from collections import Counter
from types import SimpleNamespace
import numpy as np, polars as pl, pytest, torch
from hypothesis import given, settings, strategies as st
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.data import load_dataset
from mmrec_wb.mllm.backbones import load_backbone
from mmrec_wb.mllm.prompts import Collator, prompt
from mmrec_wb.mllm.scoring import generate_answers, read_answer, score_candidates, score_yes_no
from mmrec_wb.mllm.tasks import TASKS, examples, folded, shown_title, yes_no_examples
from mmrec_wb.training.metrics import hit, ndcg, places, ranks, recall, uniform, valid_ratio
from test_backbones import folders

SPLITS, LISTS = ('train', 'valid', 'test'), ('top3', 'pick_one')

def planted(users=60, items=60): return load_dataset('toys', source='planted', planted_users=users, planted_items=items)

@pytest.fixture(scope='module')
def data(): return planted()

@pytest.fixture(scope='module')
def tiny(data): return load_backbone('tiny', data.catalogue['title'].to_list(), seed=0)

@pytest.fixture(params=['qwen', 'idefics3', 'llava']) # SmolVLM is Idefics3 with larger tiles: slower, nothing new here
def backbone(request, folders): return load_backbone(str(folders/request.param))

def retitled(titles: dict):
    "The planted data with other titles."
    d = planted()
    d.catalogue = d.catalogue.with_columns(title=pl.Series([titles.get(i, t) for i, t in enumerate(d.catalogue['title'])], dtype=pl.String))
    return d

# ---- examples ----
@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('seed', [0, 1, 2025])
def test_facts_of_every_example(data, task, split, seed):
    e = examples(data, task, split, seed)
    assert e.equals(examples(data, task, split, seed)) and e.schema['positive'] == e.schema['negative'] == pl.List(pl.Int32) and not sum(e.null_count().row(0))
    for r in e.to_dicts():
        items, times = (x.tolist() for x in data.sequence(r['user']))
        k = len(items) - 3 if task == 'top3' else dict(valid=len(items) - 2, test=len(items) - 1).get(split) or items.index(r['positive'][0])
        true = items[:-4:-1] if task == 'top3' else [items[k]]
        assert r['history'] == items[max(0, k - (3 if task == 'top3' else 5)):k] and r['times'] == times[:k][-len(r['history']):] and r['when'] == times[k]
        assert r['positive'] == true and len(r['negative']) == len(true) == len(set(r['negative']))
        shown = set(r.get('candidates', true + r['negative']))
        others, unseen_in = shown - set(true), items[:-2] if split == 'train' and task != 'top3' else items
        assert set(true) <= shown and set(r['negative']) <= others and not others & set(unseen_in) and all(1 <= i <= data.n_items for i in shown)
        if task == 'picture': assert data.image(true[0]) is not None and data.image(r['negative'][0]) is not None
        if task in ('yes_no', 'picture'):
            assert [r['target']] == (r['positive'] if r['label'] else r['negative'])
            assert (r['chosen'], *r['rejected'])[::1 if r['label'] else -1] == ('Yes', 'No'); continue
        assert r['target'] == true[0] and len(r['candidates']) == len(shown) == dict(top3=7, pick_one=10)[task]
        assert r['chosen'].split('\n') == [shown_title(data, i) for i in true] and r['rejected'][0].split('\n') == [shown_title(data, i) for i in r['negative']]
        assert len({folded(shown_title(data, i)) for i in shown}) == len(shown)
        if split == 'train' and task == 'pick_one': assert k < len(items) - 2

def test_yes_no_is_the_function_behind_it(data):
    for split in SPLITS: assert examples(data, 'yes_no', split, 3, history=4, per_user=2).equals(yes_no_examples(data, split, 3, 4, 2))

def test_top3_divides_users_once_and_for_all(data):
    parts = {seed: [set(examples(data, 'top3', s, seed)['user']) for s in SPLITS] for seed in (0, 7)}
    assert parts[0] == parts[7]
    train, valid, test = parts[0]
    assert not train & valid | train & test | valid & test and train | valid | test == set(np.flatnonzero(np.diff(data.offsets) >= 6))
    n = len(train | valid | test); assert (len(train), len(train | valid)) == (n*8//10, n*9//10)
    assert not examples(data, 'top3', 'train', 0)['candidates'].equals(examples(data, 'top3', 'train', 7)['candidates'])

def test_draws_are_uniform_and_shuffled(data):
    "One user's negatives over 400 seeds, and where the true items stand."
    drawn, place, left_over, n = Counter(), np.zeros((3, 7)), np.zeros(4), 400
    for seed in range(n):
        r = examples(data, 'top3', 'test', seed).row(0, named=True)
        others = [i for i in r['candidates'] if i not in r['positive']]; drawn.update(others)
        for j, p in enumerate(r['positive']): place[j, r['candidates'].index(p)] += 1
        left_over[[i in r['negative'] for i in others].index(False)] += 1
    titles = {folded(shown_title(data, i)) for i in r['history']}
    free = [i for i in range(1, data.n_items + 1) if i not in data.sequence(r['user'])[0] and folded(shown_title(data, i)) not in titles]
    assert set(drawn) == set(free)
    chi = lambda seen: ((np.asarray(seen) - np.mean(seen))**2/np.mean(seen)).sum()/(np.size(seen) - 1)     # about 1 if uniform
    assert chi(list(drawn.values())) < 1.6 and all(chi(p) < 3 for p in place) and chi(left_over) < 4

def test_no_wrong_titles():
    plain = planted(); sequences = [plain.sequence(u)[0] for u in range(plain.n_users)]
    last, twin = int(sequences[0][-1]), int(sequences[0][-2])
    d = retitled({last: '', twin: None, 5: '  owl\n OWL ', 6: 'Owl owl', **{i: 'The same' for i in range(30, 40) if i not in (last, twin)}})
    blank = {last, twin}
    for task in LISTS:
        for split in SPLITS:
            why = Counter(); e = examples(d, task, split, 0, left_out=why)
            for r in e.to_dicts():
                assert not blank & set(r['candidates']) and len({folded(shown_title(d, i)) for i in r['candidates']}) == len(r['candidates'])
                past = {folded(shown_title(d, i)) for i in r['history']}
                assert not any(folded(shown_title(d, i)) in past for i in r['candidates'] if i not in r['positive'])
                assert '\n' not in r['chosen'].replace('\n', '', len(r['positive']) - 1)
            if task == 'pick_one':
                gone = examples(plain, task, split, 0).filter(pl.col('target').is_in(list(blank))).height
                assert e.height == examples(plain, task, split, 0).height - gone and why['a true item without a title'] == gone
    both = sum(why.values()) + e.height; assert both == examples(plain, 'pick_one', 'test', 0).height
    why = Counter(); left = sum(examples(d, 'top3', s, 0, left_out=why).height for s in SPLITS)
    same = lambda s: len({folded(shown_title(d, i)) for i in s[-3:]}) < 3
    long = [s for s in sequences if len(s) >= 6]; untitled = [bool(blank & set(s[-3:].tolist())) for s in long]
    assert why['a true item without a title'] == sum(untitled)
    assert why['true items with the same title'] == sum(same(s) and not u for s, u in zip(long, untitled))
    assert left == sum(not u and not same(s) for s, u in zip(long, untitled))

def test_errors_name_the_remedy(data):
    wrong = [(('pick_two', 'test'), {}, 'top3'), (('top3', 'dev'), {}, 'valid'), (('pick_one', 'test'), dict(candidates=1), 'at least 2'),
             (('pick_one', 'test'), dict(candidates=58), 'too few unseen items')]
    for args, more, text in wrong:
        with pytest.raises(WorkbenchError, match=text) as e: examples(data, *args, 0, **more)
        assert '\n' not in str(e.value)
    with pytest.raises(WorkbenchError, match='without a title: '): examples(retitled(dict.fromkeys(range(1, 61), '')), 'pick_one', 'test', 0)
    short = load_dataset('toys', source='planted', planted_users=60, planted_items=60)
    short.offsets = np.arange(61)*5
    with pytest.raises(WorkbenchError, match='fewer than six items: 60'): examples(short, 'top3', 'test', 0)

# ---- prompts and batches ----
@pytest.mark.parametrize('task', TASKS)
def test_prompt_shows_what_is_asked_and_no_answer(data, task):
    for e in examples(data, task, 'test', 0).to_dicts():
        messages, shown = prompt(data, e); text = ''.join(c.get('text', '[picture]') for c in messages[0]['content'])
        pictured = e['history'] + ([e['target']] if task in ('yes_no', 'picture') else [])
        assert shown == [i for i in pictured if data.image(i) is not None]
        assert text.count('[picture]') == len(shown) and text.count('[picture]') + text.count('no picture') == len(pictured)
        if task == 'picture': assert text.endswith('[picture]') and shown_title(data, e['target']) not in text.splitlines()[-1]
        elif task != 'yes_no': assert text.splitlines()[-len(e['candidates']):] == [shown_title(data, i) for i in e['candidates']]
        assert (messages, shown) == prompt(data, e | dict(chosen='?', rejected=['?'], positive=e['positive'][::-1]))

@pytest.mark.parametrize('task', TASKS)
def test_answers_stand_behind_their_prompts(backbone, data, task):
    "The same prompt in every copy; chosen, then rejected, each with one end of turn; pictures once per copy; weights pass."
    processor, rows = backbone[1], [e | dict(weight=.5 + k) for k, e in enumerate(examples(data, task, 'train', 0).head(3).to_dicts())]
    none, right, pair = (Collator(data, processor, a)(rows) for a in ('none', 'right', 'pair'))
    said = lambda ids: processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    for k, e in enumerate(rows):
        ask = none['input_ids'][k][none['attention_mask'][k].bool()]
        for x, row, answer in ((right, k, e['chosen']), (pair, k, e['chosen']), (pair, 3 + k, e['rejected'][0])):
            ids = x['input_ids'][row][x['attention_mask'][row].bool()]
            mask = (x['labels'][row] != -100) if 'labels' in x else x['completion_mask'][row].bool()
            assert torch.equal(ids[:len(ask)], ask) and torch.equal(ids[len(ask):], x['input_ids'][row][mask]) and said(ids[len(ask):]) == answer
            assert ids[-1] == processor.tokenizer.eos_token_id and (ids[len(ask):] == ids[-1]).sum() == 1
    for name in set(none) - {'input_ids', 'attention_mask', 'mm_token_type_ids', 'token_type_ids'}:
        assert torch.equal(pair[name], torch.cat([none[name]]*2)) and torch.equal(right[name], none[name])
    assert pair['weight'].tolist() == [.5, 1.5, 2.5] and 'weight' not in right

def test_the_end_of_a_turn(data, tiny):
    "A template that writes more after it, and one that does not mark it (as LLaVA-1.5's)."
    processor = tiny[1]; chat = processor.chat_template
    try:
        processor.chat_template = chat.replace('</s>', '</s>\n'); c = Collator(data, processor, 'right')
        assert c.tail('Yes')[-1] == processor.tokenizer.eos_token_id == c.stops[0] and len(c.stops) == 1
        processor.chat_template = chat.replace('</s>', ' '); assert Collator(data, processor, 'right').tail('Yes') == c.tail('Yes')
        processor.chat_template = chat.replace("{{ c['text'] }}", "{{ c['text'] | upper }}")
        with pytest.raises(WorkbenchError, match='answer as it is'): Collator(data, processor, 'right')
    finally: processor.chat_template = chat

# ---- likelihood ----
@pytest.mark.parametrize('task', LISTS)
def test_scores_by_teacher_forcing(backbone, data, task):
    "A full forward over one prompt with one title, against batches of any size."
    model, processor = backbone; some = examples(data, task, 'test', 0, candidates=4).head(2); collate = Collator(data, processor, 'none')
    s = score_candidates(model, processor, data, some, batch_size=16, progress=False)
    for e, scores, rank, all_ranks in zip(some.to_dicts(), s['scores'].to_list(), s['rank'], s['ranks'].to_list()):
        for c, score in list(zip(e['candidates'], scores))[:4]:
            tail = collate.tail(shown_title(data, c), task == 'top3'); x = collate.batch([e], [[tail]]); x.pop('completion_mask')
            with torch.no_grad(): lp = model(**x).logits[0].log_softmax(-1)
            assert score == pytest.approx(sum(float(lp[-len(tail) - 1 + j, t]) for j, t in enumerate(tail)), abs=2e-3)
        assert all_ranks == [sum(x >= scores[e['candidates'].index(p)] for x in scores) for p in e['positive']] and rank == all_ranks[0]
    for size in (1, 3, 7):
        again = score_candidates(model, processor, data, some, batch_size=size, progress=False)
        np.testing.assert_allclose(np.stack(again['scores']), np.stack(s['scores']), atol=2e-3)

class Constant(torch.nn.Module):
    "Every token is as likely as every other."
    def __init__(self, n): super().__init__(); self.n, self.weight = n, torch.nn.Parameter(torch.zeros(1))
    def forward(self, input_ids, logits_to_keep=0, **k): return SimpleNamespace(logits=torch.zeros(*input_ids[:, -logits_to_keep:].shape, self.n))

def test_a_constant_scorer_is_last(tiny):
    signs = [c for c in map(chr, range(33, 127)) if c not in '<>' and c == c.lower()]                        # one token each
    d = planted(); d.catalogue = d.catalogue.with_columns(title=pl.Series(['', *signs[:60]]))
    n, processor = len(tiny[1].tokenizer), tiny[1]
    for task, places_ in (('top3', 7), ('pick_one', 10)):
        some = examples(d, task, 'valid', 0)
        lengths = {len(Collator(d, processor, 'none').tail(shown_title(d, i))) for i in some['candidates'].explode().unique()}
        s = score_candidates(Constant(n), processor, d, some, progress=False)
        assert lengths == {2} and set(s['rank']) == {places_} and set(s['ranks'].explode()) == {places_}
        np.testing.assert_allclose(np.stack(s['scores']), -2*np.log(n), rtol=1e-6)
        r = places(s['ranks']); assert hit(r[:, 0], 3).sum() == ndcg(r[:, 0], 3).sum() == recall(r, 3).sum() == 0
    with torch.no_grad(): broken = Constant(n); broken.forward = lambda **k: SimpleNamespace(logits=Constant(n)(**k).logits*float('nan'))
    with pytest.raises(WorkbenchError, match='NaN'): score_candidates(broken, processor, d, some, progress=False)

def test_who_knows_the_truth_beats_chance():
    "The oracle on planted data, in the metrics of the lists; a uniform ranking is at chance."
    from mmrec_wb.data.planted import Oracle
    d = planted(300, 120); oracle, g = Oracle(d.truth['items'], d.catalogue['raw_id'][1:].to_list()), torch.Generator().manual_seed(0)
    for task, split, k, n in (('top3', 'train', 3, 7), ('pick_one', 'test', 1, 10)):
        e = examples(d, task, split, 0); rows = e.to_dicts(); found = {}
        for who in ('oracle', 'random'):
            score = lambda r: oracle(r['history'], r['times'], r['when'], r['candidates']) if who == 'oracle' else torch.rand(n, generator=g)
            s = torch.stack([torch.as_tensor(score(r)) for r in rows])
            all_r = torch.stack([ranks(s, torch.tensor([r['candidates'].index(r['positive'][j]) for r in rows])) for j in range(len(rows[0]['positive']))], 1)
            found[who] = [float(hit(all_r[:, 0], k).mean()), float(ndcg(all_r[:, 0], k).mean()), float(recall(all_r, k).mean())]
        chance = [uniform(hit, k, n), uniform(ndcg, k, n), k/n]; error = 3*.5/len(rows)**.5
        assert all(o > c + error for o, c in zip(found['oracle'], chance)), found
        assert all(abs(r - c) < error for r, c in zip(found['random'], chance)), found

# ---- written answers ----
lines = st.lists(st.sampled_from(['Red Car', 'blue  boat', 'OWL', 'tree', 'Kite', '  ', '']), max_size=6)

@settings(max_examples=200, deadline=None)
@given(lines, st.integers(1, 3))
def test_reading_an_answer(said, asked):
    titles = {1: 'red car', 2: 'Blue Boat', 3: 'owl'}; known = {folded(t): i for i, t in titles.items()}
    named, valid, line = read_answer('\n'.join(said), titles, asked)
    kept = [known.get(folded(s)) for s in said if s.strip()]
    assert named == [i for k, i in enumerate(kept) if i and i not in kept[:k]] and valid == (None not in kept and len(kept) == len(set(kept)) == asked)
    assert set(line) == set(named) and all(kept[n - 1] == i and i not in kept[:n - 1] for i, n in line.items())

class Writer(torch.nn.Module):
    "Writes what it was told to, whatever it is asked; examples are recognised by their order."
    def __init__(self, collate, texts): super().__init__(); self.weight, self.collate, self.texts = torch.nn.Parameter(torch.zeros(1)), collate, iter(texts)
    def generate(self, input_ids, pad_token_id, max_new_tokens, **how):
        tails = [self.collate.tail(next(self.texts))[:max_new_tokens] for _ in input_ids]
        return torch.cat([input_ids, torch.tensor([t + [pad_token_id]*(max_new_tokens - len(t)) for t in tails])], 1)

def test_answers_known_beforehand(data, tiny):
    processor, e = tiny[1], examples(data, 'top3', 'train', 0)                                       # histories of one length: in their order
    write = lambda texts, **k: generate_answers(Writer(Collator(data, processor, 'none'), texts), processor, data, e, progress=False, **k)
    g = write(e['chosen'].to_list()); r = places(g['ranks'])
    assert g['valid'].all() and g['named'].to_list() == e['positive'].to_list() and g['answer'].equals(e['chosen'].rename('answer'))
    assert set(g['rank']) == {1} and r.tolist() == [[1, 2, 3]]*e.height
    assert recall(r, 3).mean() == hit(r[:, 0], 3).mean() == valid_ratio(g['valid'].to_list()) == 1
    g = write(e['rejected'].list.first().to_list()); r = places(g['ranks'])
    assert g['valid'].all() and g['named'].to_list() == e['negative'].to_list() and g['rank'].is_null().all() and recall(r, 3).sum() == 0
    last_two = ['\n'.join(t.split('\n')[:0:-1]) for t in e['chosen']]; g = write(last_two); r = places(g['ranks'])
    assert not g['valid'].any() and g['rank'].is_null().all() and [x[1:] for x in g['ranks'].to_list()] == [[2, 1]]*e.height
    assert torch.allclose(recall(r, 3), torch.tensor(2/3).double())
    assert not write(['I think:\n' + t for t in e['chosen']])['valid'].any() and set(write(['So:\n' + t for t in e['chosen']])['rank']) <= {2}
    assert not write([t.upper() for t in e['chosen']], max_new_tokens=2)['valid'].any()
    tokens = lambda i: len(Collator(data, processor, 'none').tail(shown_title(data, i)))
    limits = [sum(sorted(map(tokens, c))[-3:]) for c in e['candidates'].to_list()]                           # what the longest three titles need
    assert len(set(limits)) > 1 and write(['?'*(n + 1) for n in limits])['answer'].to_list() == ['?'*n for n in limits]

@pytest.mark.parametrize('task', LISTS)
def test_greedy_is_the_argmax_of_one_token_after_another(backbone, data, task):
    "Padded on the left in a batch, or alone; whatever the checkpoint's own settings of generation are."
    model, processor = backbone; e = examples(data, task, 'test', 0, candidates=4).head(3); collate = Collator(data, processor, 'none')
    model.generation_config.update(do_sample=True, temperature=1e-3, repetition_penalty=3., top_k=1)
    together = generate_answers(model, processor, data, e, batch_size=4, max_new_tokens=6, progress=False)
    assert together.equals(generate_answers(model, processor, data, e[::-1], batch_size=1, max_new_tokens=6, progress=False)[::-1])
    for r, text in zip(e.to_dicts(), together['answer']):
        tail = []
        while len(tail) < 6 and not set(tail) & set(collate.stops):
            x = collate.batch([r], [[tail]]); x.pop('completion_mask')
            with torch.no_grad(): tail.append(int(model(**x, use_cache=False).logits[0, -1].argmax()))
        assert text == processor.tokenizer.decode([t for t in tail if t not in collate.stops], skip_special_tokens=True).strip()

def test_sampling_is_reproducible(data, tiny):
    e, state = examples(data, 'pick_one', 'test', 0).head(4), torch.get_rng_state()
    draw = lambda seed, **k: generate_answers(*tiny, data, e, 'sampled', seed, max_new_tokens=6, progress=False, **k)
    assert draw(0).equals(draw(0)) and not draw(0).equals(draw(1)) and torch.equal(torch.get_rng_state(), state)
    y = examples(data, 'yes_no', 'test', 0); say = lambda seed, size=32: score_yes_no(*tiny, data, y, size, False, 'sampled', seed)
    assert say(0).select('answer').equals(say(0, 7).select('answer')) and not say(0).equals(say(1))
    assert say(0)['p_yes'].equals(score_yes_no(*tiny, data, y, progress=False)['p_yes'])
    for f in (generate_answers, score_yes_no):
        with pytest.raises(WorkbenchError, match='greedy'): f(*tiny, data, e, decoding='beam')

def test_what_was_learnt_is_what_is_written(data):
    "SFT's batches, likelihood and generation agree: three examples learnt by heart are ranked first and written word for word."
    model, processor = load_backbone('tiny', data.catalogue['title'].to_list(), seed=0)
    e = examples(data, 'top3', 'train', 0).head(3); x = Collator(data, processor, 'right')(e.to_dicts())
    before = score_candidates(model, processor, data, e, progress=False)
    step = torch.optim.AdamW(model.parameters(), 3e-3); model.train()
    for _ in range(120):
        loss = model(**x, use_cache=False).loss; loss.backward(); step.step(); step.zero_grad()
        if loss < .005: break
    g = generate_answers(model, processor, data, e, batch_size=2, progress=False); after = score_candidates(model, processor, data, e, progress=False)
    assert loss < .05 and model.training and g['answer'].to_list() == e['chosen'].to_list() and g['valid'].all()
    assert g['rank'].to_list() == after['rank'].to_list() == [1, 1, 1]
    assert (np.stack(after['scores']).max(1) > np.stack(before['scores']).max(1)).all()
