"Tuning, study and truth of the score-based recommenders: their tables under results/ hold together, and the ceiling is one."
import sys
import numpy as np, polars as pl, pytest
from mmrec_wb.core.paths import project_root

ROOT = project_root(); RESULTS = ROOT/'results'
sys.path.insert(0, str(ROOT/'benchmarks'))
import study_recommenders as study, tune_recommenders as tuning
SUMMARIES, TUNED = sorted(RESULTS.glob('recommenders_*_summary.csv')), sorted(RESULTS.glob('tune_recommenders_*.csv'))

@pytest.mark.parametrize('path', TUNED, ids=lambda p: p.stem)
def test_every_model_had_the_same_budget(path):
    "Six trials each (ml-100k: two), those that the script names, on valid."
    table = pl.read_csv(path); keys = ('model', 'lr', 'dropout', 'tau'); n = 2 if 'ml-100k' in path.stem else 6
    assert table['model'].value_counts().sort('model').rows() == [('duaf_mat', n), ('sasrec', n)] and not [c for c in table.columns if 'test' in c.lower()]
    named = tuning.trials(path.stem.removeprefix('tune_recommenders_'))
    assert {tuple(r[k] for k in keys) for r in table.to_dicts()} == {tuple(t.get(k) for k in keys) for t in named}

@pytest.mark.parametrize('path', SUMMARIES, ids=lambda p: p.stem)
def test_summary_follows_from_the_runs(path):
    runs, summary = pl.read_csv(str(path).replace('_summary', '_runs')), pl.read_csv(path)
    for row in summary.filter(pl.col('seeds') > 0).to_dicts():
        own = runs.filter(arm=row['arm']); assert own['seed'].n_unique() == own.height == row['seeds']
        for c in study.COLUMNS: assert abs(own[c].mean() - row[c]) < 2e-6
    best = {r['arm']: r for r in summary.to_dicts()}
    if 'oracle' in best: assert all(v['NDCG@10 masked'] <= best['oracle']['NDCG@10 masked'] for v in best.values() if v['NDCG@10'])
    assert all(r['note'] for a, r in best.items() if a in study.ARMS and not r['seeds']), 'an arm that was not run says why'

def test_readme_says_what_was_measured():
    summaries, said = [pl.read_csv(p) for p in SUMMARIES], (ROOT/'results'/'README.md').read_text()
    for name in {s['dataset'][0] for s in summaries}:
        for row in study.readme_rows([s for s in summaries if s['dataset'][0] == name]): assert row in said
    for name in ('toys_duaf', 'toys1k', 'ml-100k', 'toys_planted_g1'):
        row = study.difference_row(pl.read_csv(RESULTS/f'recommenders_{name}_tests.csv')); assert row in said, row
    for name in ('toys1k', 'toys_planted_g1'):
        tests = pl.read_csv(RESULTS/f'recommenders_{name}_before_tests.csv')
        for masked in (False, True): assert study.difference(tests, 'duaf_mat', 'state before', masked) in said

@pytest.mark.parametrize('path', [p for p in SUMMARIES if (RESULTS/p.name.replace('_summary', '_tests')).exists()], ids=lambda p: p.stem)
def test_differences_are_those_of_the_arms(path):
    tests, m = pl.read_csv(str(path).replace('_summary', '_tests')), {r['arm']: r for r in pl.read_csv(path).to_dicts()}
    for r in tests.to_dicts():
        c = 'NDCG@10' + ' masked'*r['history masked']; difference = m[r['arm']][c] - m[r['baseline']][c]
        assert abs(r['difference'] - difference) < 3e-6 and r['low'] <= r['difference'] <= r['high'] and r['p'] <= r['p_holm']

def test_arms_that_cannot_differ_are_left_out():
    assert [a for a in study.ARMS if study.left_out(a, 'none')] == ['-MAT-MoE', '-CSCL'] and [a for a in study.ARMS if study.left_out(a, 'all')] == ['-MAT-MoE']
    assert not any(study.left_out(a, 'some') for a in study.ARMS)

def test_the_oracle_knows_more_of_attention_than_nothing():
    "Its filter is calibrated: where it says .7, people read the words seven times of ten."
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.planted import Oracle
    from truth_duaf_mat import attention_known
    data = load_dataset('toys', source='planted', planted_users=120, planted_items=150, pictures=False)
    oracle = Oracle(data.truth['items'], data.catalogue['raw_id'][1:].to_list()); events = data.truth['events']
    planted = {(r, a, t): s for r, a, t, s in events.select('reviewerID', 'asin', 'timestamp', 'text_attention').iter_rows()}
    rows = [(k, planted[data.users[u], data.catalogue['raw_id'][int(i)], int(t)]) for u in range(data.n_users)
            for k, i, t in zip(attention_known(oracle, *data.sequence(u)), *data.sequence(u))]
    known, true = np.array(rows).T
    assert np.corrcoef(known, true)[0, 1] > .3 and abs(known.mean() - true.mean()) < .06

def test_weights_follow_from_what_the_probes_read_and_from_what_is_told():
    from mmrec_wb.data import load_dataset
    from mmrec_wb.data.features import add_features
    from mmrec_wb.models.duaf_mat import DuAFMAT
    from mmrec_wb.models.explain import attention_found, fusion_weights
    from why_attention import Told, attention, inside
    data = add_features(load_dataset('toys', source='planted', planted_users=200, planted_items=120), progress=False)
    for fusion in ('dual', 'user'):
        event, share, timeless, terms, vectors, time = inside(DuAFMAT(data, d=8, fusion=fusion).eval(), data)
        words, picture = terms[:, :8].sum(1), terms[:, 8:].sum(1)
        assert np.allclose(share, 1/(1 + np.exp(picture - words)), atol=1e-6) and vectors.shape == (len(event), 24)                   # (7)
        assert np.allclose(share, timeless, atol=1e-6) == (fusion == 'user') == (not time.any())
        assert share.std() > 1e-5 and data.features['image'].present[data.items[event]].all()
    assert attention_found(fusion_weights(Told(data, d=8).eval(), data))['pooled'] > .9999
    assert attention(data).std() > .1

def test_readme_says_what_was_measured_of_attention():
    said, short = (ROOT/'results'/'README.md').read_text(), lambda x: f'{x:.2f}'.replace('0.', '.', 1)
    arms, timeless = ('dual', '-CSCL', '-VSCL', '-CSCL -VSCL', 'user'), ('dual', '-CSCL', '-VSCL', '-CSCL -VSCL')
    probes, told = (pl.read_csv(RESULTS/f'why_attention_{n}.csv') for n in ('probes', 'told'))
    truth = pl.read_csv(RESULTS/'truth_duaf_mat_attention.csv').group_by('arm').agg(pl.col('pooled', 'within').mean())
    truth = truth.rows_by_key('arm', named=True, unique=True); before = {f'{a}, state before' for a in ('dual', '-CSCL -VSCL', 'user')}
    assert set(truth) == {*arms, *before, 'static', 'oracle'} and truth['static']['pooled'] is None
    both = lambda r: f"{short(r['pooled'])}, {short(r['within'])}"
    line = lambda name, found: f'| {name} | ' + ' | '.join(both(found[a]) if a in found else '–' for a in arms) + ' |'
    assert line('state at the item (default)', truth) in said and line('state before it', {a.split(', ')[0]: truth[a] for a in before}) in said
    assert f"oracle has {both(truth['oracle'])}" in said
    own = probes.filter(read='the same without time').group_by('arm').agg(pl.col('pooled', 'time_size').mean()).rows_by_key('arm', named=True, unique=True)
    assert '| the same models, Eq. 7 without its time | ' + ' | '.join(short(own[a]['pooled']) for a in timeless) + ' | |' in said
    assert '| time embedding, in units of words and picture | ' + ' | '.join(f'{own[a]["time_size"]:.0f}' for a in timeless) + ' | |' in said
    assert f'reaches {short(probes.filter(read="likeness of frozen vectors")["pooled"].item())}, so' in said
    for r in told.to_dicts():
        d, low, high = (f'{r[k]:.4f}'.replace('0.', '.', 1) for k in ('difference', 'low', 'high'))
        forms = (f'{d} (95% {low} to {high})', f'{d}, 95% {low} to {high}', f'{d} ({low} to {high}')
        assert (r['arm'] == 'told' and r['history masked']) or any(form in said for form in forms)

def test_readme_says_what_was_measured_of_pictures():
    said, short = (ROOT/'results'/'README.md').read_text(), lambda x: f'{x:.2f}'.replace('0.', '.', 1)
    f = pl.read_csv(RESULTS/'truth_duaf_mat_pictures.csv').group_by('arm', 'method').agg(pl.col('cosine', 'squared_error', 'scaled_error').mean())
    m = {(r['arm'], r['method']): r for r in f.to_dicts()}; of = lambda method, what, arm='dual': short(m[arm, method][what])
    called = dict(generated='generated', category_mean="the category's mean", text_nearest='the picture of the item with the nearest text',
                  mean='the mean picture', oracle='oracle (ceiling)')
    for method, name in called.items():
        row = ' | '.join([name, of(method, 'cosine'), of(method, 'squared_error'), of(method, 'scaled_error') if method != 'mean' else '–'])
        assert f'| {row} |' in said, row
    assert f"generated vectors have {of('generated', 'cosine', '-CSCL')}, the category's mean {of('category_mean', 'cosine', '-CSCL')}" in said
