"compare_runs and the library behind it: what may be compared, scipy's p on the raw ranks, damage, escapes, sixty records."
import ast, json, shutil, subprocess, sys
from pathlib import Path
import nbformat, numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import wilcoxon
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import project_root
from mmrec_wb.core.record import load_run, open_run
from mmrec_wb.training.comparison import TESTS, choose, labels, paired_tests, summarise
from mmrec_wb.training.significance import compare, holm
from mmrec_wb.viz.comparison import comparison_html, comparison_latex, export

ROOT = project_root(); NOTEBOOK = ROOT/'nbs'/'compare_runs.ipynb'
sys.path.insert(0, str(ROOT/'benchmarks'))
from many_runs import synthetic

def record(folder, method='sasrec', seed=0, params=None, shift=0, fingerprint='f1', dataset='toys', protocol='all items ranked', source='raw', users=200,
           finish=True, **facts):
    "A record with random ranks; the larger `shift`, the better."
    with open_run(method, dataset, seed, params or {}, fingerprint, source, folder, protocol=protocol, **facts) as run:
        g = np.random.default_rng([seed, len(method), abs(shift)]); ranks = np.clip(g.geometric(.1, users) - shift, 1, None)
        run.save('ranks', pl.DataFrame(dict(user=np.arange(users), rank=ranks, rank_masked=np.clip(ranks - 1, 1, None))))
        gain = lambda r, k: float(np.where(r <= k, 1/np.log2(r + 1), 0).mean())
        run.log(0, 'test', **{'NDCG@10/model': gain(ranks, 10), 'NDCG@10 masked/model': gain(np.clip(ranks - 1, 1, None), 10), 'NDCG@10/popularity': .01})
        run.finish() if finish else run.flush()
    return run.path

def answers(folder, method, seed, strength, users=80):
    "A record of an MLLM: log-odds and labels; the questions are the seed's."
    with open_run(method, 'toys', seed, dict(beta=.1, seed=seed), 'f1', 'raw', folder, protocol='yes/no') as run:
        label = np.random.default_rng(seed).integers(0, 2, users); noise = np.random.default_rng([seed, len(method)]).normal(size=users)
        run.save('ranks', pl.DataFrame(dict(user=np.arange(users), label=label, log_odds=strength*label + noise)))
        run.log(0, 'test', **{'auc/model': .6, 'auc_hard/model': .6}); run.finish()
    return run.path

# --- arms and groups

def test_an_arm_is_method_and_parameters_without_the_seed(tmp_path):
    for s in (0, 1):
        for pool in (20, 50): record(tmp_path, 'rodpo', s, dict(pool=pool, seed=s, beta=.1))
        record(tmp_path, 'sasrec', s, dict(d=64, seed=s))
        sft = record(tmp_path, 'sft', s, dict(lr=.1, seed=s)); record(tmp_path, 'dpo', s, dict(sft=sft.name, seed=s))
    runs, lines = choose(tmp_path)
    arms = ('dpo', 'rodpo pool=20', 'rodpo pool=50', 'sasrec', 'sft')
    assert runs.group_by('arm', maintain_order=True).agg('seed').rows() == [(a, [0, 1]) for a in arms] and not lines

def test_other_data_and_other_protocols_stand_apart(tmp_path):
    record(tmp_path); record(tmp_path, 'rodpo'); record(tmp_path, 'duaf', fingerprint='f2', max_users=60)
    record(tmp_path, 'hanorec', protocol='yes/no, one negative')
    record(tmp_path, 'pop', source='planted', fingerprint='f3', planted_seed=1)
    runs, _ = choose(tmp_path)
    assert dict(runs.group_by('group').agg('method').rows()) == {'toys, all users, all items ranked': ['rodpo', 'sasrec'],
        'toys, max_users 60, all items ranked': ['duaf'], 'toys, all users, yes/no': ['hanorec'], 'toys (planted)': ['pop']}
    tests, lines = paired_tests(runs, 'sasrec', tmp_path, draws=100)
    assert tests['arm'].unique().to_list() == ['rodpo'] and len(lines) == 3
    assert any('all users against max_users 60; fingerprint f1 against f2' in line for line in lines)
    for arm, says in (('duaf', 'all users; fingerprint f2 against f1'), ('hanorec', 'protocol yes/no, one negative against all items ranked'),
                      ('pop', r'data set toys \(planted\) against toys')):
        with pytest.raises(WorkbenchError, match=f'cannot be compared: .*{says}') as e: paired_tests(runs, 'sasrec', tmp_path, arms=arm)
        assert '\n' not in str(e.value)
    shown = comparison_html(summarise(runs), tests, lines).data
    assert shown.count('<table') == 4 and 'fingerprint f1 against f2' in shown

PARAMS = st.dictionaries(st.sampled_from('abc'), st.one_of(st.none(), st.integers(0, 2), st.text(max_size=50), st.floats(0, 1)))

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['rodpo', 'sasrec']), PARAMS), max_size=8))
def test_labels_are_unique(arms):
    own = {f'{i:08x}': dict(method=m, params=p) for i, (m, p) in enumerate(arms)}
    got = labels(own)
    assert len(set(got.values())) == len(own) and all(got[k].startswith(a['method']) for k, a in own.items())

def test_filters(tmp_path):
    for p in (20, 50): record(tmp_path, 'rodpo', params=dict(pool=p, strategy='topk'))
    record(tmp_path); record(tmp_path, dataset='ml-100k', fingerprint='f5'); record(tmp_path, seed=7, finish=False)
    count = lambda **f: choose(tmp_path, **f)[0].height
    assert [count(), count(status='any'), count(datasets='ml-100k'), count(methods='rodpo')] == [4, 5, 1, 2]
    assert [count(params='pool=20'), count(params='pool=20|none, strategy=topk|none')] == [1, 3]
    for f, says in ((dict(datasets='toyz'), 'did you mean toys'), (dict(methods='rodppo'), 'did you mean rodpo'), (dict(params='pol=1'), 'did you mean pool'),
                    (dict(params='pool'), 'no condition')):
        with pytest.raises(WorkbenchError, match=says): count(**f)
    with pytest.raises(WorkbenchError, match='did you mean NDCG@10'): summarise(choose(tmp_path)[0], 'NDCG@11')

# --- tests

@pytest.mark.parametrize('metric, column', [('NDCG@10', 'rank'), ('NDCG@10 masked', 'rank_masked')])
def test_p_is_scipys_on_the_raw_ranks(tmp_path, metric, column):
    for s in (0, 1, 2):
        record(tmp_path, seed=s)
        for i in range(1, 4): record(tmp_path, 'rodpo', s, dict(pool=i), shift=i - 1)
    runs, _ = choose(tmp_path); tests, lines = paired_tests(runs, 'sasrec', tmp_path, metric, draws=200)
    def users(arm): # NDCG of every user, averaged over seeds, from the files
        ranks = [pl.read_parquet(tmp_path/r/'ranks.parquet').sort('user')[column].to_numpy() for r in runs.filter(arm=arm)['run']]
        return np.mean([np.where(r <= 10, 1/np.log2(r + 1), 0) for r in ranks], axis=0)
    p = [wilcoxon((users(a) - users('sasrec')).round(12)).pvalue for a in tests['arm']]
    np.testing.assert_allclose(tests['p'], p, rtol=1e-12); np.testing.assert_allclose(tests['p_holm'], holm(p), rtol=1e-12)
    np.testing.assert_allclose(tests['value'], [users(a).mean() for a in tests['arm']], rtol=1e-12)
    mean = dict(summarise(runs, metric).select('arm', 'mean').rows())
    np.testing.assert_allclose(tests['value'], [mean[a] for a in tests['arm']], rtol=1e-6)
    assert tests.height == 3 and not lines and min(p) < .05

def test_auc_of_mllm_runs(tmp_path):
    for s in (0, 1):
        for m, strength in (('sft', .5), ('dpo', 1.), ('hanorec', 2.)): answers(tmp_path, m, s, strength)
    runs, _ = choose(tmp_path); tests, lines = paired_tests(runs, 'sft', tmp_path)
    frames = {m: [load_run(tmp_path/r).frame('ranks') for r in runs.filter(method=m).sort('seed')['run']] for m in ('sft', 'dpo', 'hanorec')}
    said = ['arm', 'value', 'difference', 'low', 'high', 'p', 'p_holm']
    assert tests.select(said).equals(compare(frames, 'sft', 'auc').select(said).sort('arm'))
    assert lines == ['toys: auc_hard has no paired test'] and tests['metric'].unique().to_list() == ['auc']

def test_arms_with_other_seeds_are_tested_on_the_shared_ones(tmp_path):
    for s in (0, 1, 2): record(tmp_path, seed=s)
    for s in (0, 2, 5): record(tmp_path, 'rodpo', s, shift=1)
    record(tmp_path, 'duaf', 1); record(tmp_path, 'far', 9)
    runs, _ = choose(tmp_path); tests, lines = paired_tests(runs, 'sasrec', tmp_path, draws=200)
    assert dict(tests.filter(metric='NDCG@10').select('arm', 'seeds').rows()) == dict(rodpo='0 2', duaf='1')
    assert lines == ['far: not tested, it has no seed in common with sasrec']
    two = runs.filter(pl.col('seed').is_in([0, 2]), pl.col('arm').is_in(['rodpo', 'sasrec'])); only = paired_tests(two, 'sasrec', tmp_path, draws=200)[0]
    assert only['p'].to_list() == tests.filter(arm='rodpo')['p'].to_list()
    p = tests.filter(metric='NDCG@10'); np.testing.assert_allclose(p['p_holm'], holm(p['p']))                       # over both, though their seeds differ
    shown = comparison_html(summarise(runs), tests, lines).data; assert 'seeds 0 2' in shown and '0 2 5' in shown

def test_the_reference_by_folder_by_method_and_misspelt(tmp_path):
    a = record(tmp_path, 'rodpo', params=dict(pool=1)); record(tmp_path, 'rodpo', params=dict(pool=2)); record(tmp_path)
    runs, _ = choose(tmp_path); rivals = lambda ref: sorted(paired_tests(runs, ref, tmp_path, 'NDCG@10', draws=100)[0]['arm'])
    assert rivals(a.name) == ['rodpo pool=2', 'sasrec'] and rivals('rodpo pool=2') == ['rodpo pool=1', 'sasrec']
    assert rivals('sasrec') == ['rodpo pool=1', 'rodpo pool=2']
    for ref, says in (('rodpo', 'name one of rodpo pool=1, rodpo pool=2'), ('sasrek', 'did you mean sasrec')):
        with pytest.raises(WorkbenchError, match=says): rivals(ref)
    assert paired_tests(runs, 'sasrec', tmp_path, 'NDCG@10', 'rodpo pool=1', draws=100)[0]['arm'].to_list() == ['rodpo pool=1']

# --- whatever may lie in the folder

def test_damaged_foreign_and_copied_folders_are_lines(tmp_path):
    good = [record(tmp_path, m, s) for m in ('sasrec', 'rodpo') for s in (0, 1)]
    shutil.copytree(good[0], tmp_path/'copy'); (tmp_path/'foreign').mkdir(); (tmp_path/'.hidden').mkdir(); (tmp_path/'notes.txt').touch()
    half = record(tmp_path, 'duaf', finish=False); record(tmp_path/'deeper')
    for name, text in (('list', '[]'), ('cut', '{"method": "sas'), ('empty', ''), ('bytes', b'\xff\xfe')):
        (tmp_path/name).mkdir(); (tmp_path/name/'run.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, change in (('no-data', dict(fingerprint=None)), ('odd-seed', dict(seed=2**80)), ('odd-data', dict(fingerprint=['x']))):
        (tmp_path/name).mkdir(); (tmp_path/name/'run.json').write_text(json.dumps(load_run(good[0]).info | change))
    (good[3]/'ranks.parquet').write_bytes(b'PAR1')
    record(tmp_path, 'odd', params=dict(x=dict(method='y', z=[1, None]), y='a'*500))
    runs, lines = choose(tmp_path); tests, more = paired_tests(runs, 'sasrec', tmp_path, draws=100); text = '\n'.join(lines + more)
    assert len({line.split(':')[0] for line in lines}) == len(lines) == 11 and str(tmp_path) not in '\n'.join(lines)
    for says in (f'{half.name}: its status is unfinished', f'{good[0].name}: the same method, parameters and seed as copy', 'foreign: no run',
                 'deeper: no run (it has no run.json); it holds 1 runs', 'list: list/run.json is damaged', 'no-data: run.json has no usable fingerprint',
                 'odd-seed: run.json has no usable seed', f'{good[3].name}: not tested'): assert says in text, says
    assert sorted(runs['arm'].unique()) == ['odd', 'rodpo', 'sasrec'] and tests.filter(arm='rodpo')['seeds'].unique().to_list() == ['0']
    comparison_html(summarise(runs), tests, lines + more)

def test_cut_anywhere_it_never_breaks(tmp_path):
    paths = [record(tmp_path, m, s) for m in ('sasrec', 'rodpo') for s in (0, 1)]; g = np.random.default_rng(0)
    for i in range(40):
        files = [f for p in paths for f in p.rglob('*') if f.is_file()]; file = files[g.integers(len(files))]; whole = file.read_bytes()
        file.write_bytes(whole[:g.integers(len(whole))])
        runs, lines = choose(tmp_path)
        try: tests, more = paired_tests(runs, 'sasrec', tmp_path, draws=100)
        except WorkbenchError as e: more = [str(e)]; tests = pl.DataFrame(schema=TESTS)
        assert any(file.parent.name in line for line in lines + more) or file.name == 'items.parquet', file
        comparison_html(summarise(runs), tests, lines); file.write_bytes(whole)

def test_empty_folders(tmp_path):
    runs, lines = choose(tmp_path); summary = summarise(runs); tests, _ = paired_tests(runs, '')
    assert runs.is_empty() and not lines and summary.is_empty() and tests.is_empty() and r'\end{tabular}' in comparison_latex(summary, tests)
    with pytest.raises(WorkbenchError, match='is no folder'): choose(tmp_path/'nowhere')

# --- what is written

def test_nasty_names_are_escaped(tmp_path):
    nasty = '<script>&\\input{/etc}$x_1^2~#%\n,"'
    for s in (0, 1):
        for shift, name in enumerate((nasty, 'plain')): record(tmp_path, 'rodpo', s, dict(name=name), shift)
        record(tmp_path, seed=s)
    runs, lines = choose(tmp_path); summary = summarise(runs); tests, _ = paired_tests(runs, 'sasrec', tmp_path, draws=100)
    shown = comparison_html(summary, tests, [nasty]).data; assert '<script' not in shown and '&lt;script&gt;' in shown
    row = [line for line in comparison_latex(summary, tests).splitlines() if 'script' in line]
    assert len(row) == 1 and r'$<$script$>$\&\textbackslash{}input\{/etc\}\$x\_1' in row[0]
    assert row[0].replace(r'\&', '').count('&') == 2
    files = export(summary, tests, tmp_path/'out'); back = pl.read_csv(files[0], schema_overrides=summary.schema)
    assert back['arm'].to_list() == summary['arm'].to_list()
    assert sorted(f.name for f in (tmp_path/'out').iterdir()) == ['comparison.csv', 'comparison.tex', 'comparison_tests.csv']
    assert not [line for line in choose(tmp_path)[1] if line.startswith('out')]                                  # its own export is no foreign folder
    (tmp_path/'file').touch()
    with pytest.raises(WorkbenchError, match='cannot be written'): export(summary, tests, tmp_path/'file'/'x')

# --- the notebook

def papermill(tmp, **params):
    command = [str(Path(sys.executable).parent/'papermill'), str(NOTEBOOK), str(tmp/'out.ipynb'), *[str(x) for k, v in params.items() for x in ('-p', k, v)]]
    p = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    cells = nbformat.read(tmp/'out.ipynb', 4).cells
    outputs = [o for c in cells for o in c.get('outputs', [])]
    return p, '\n'.join(''.join(o.get('text', '')) + ''.join(o.get('data', {}).get('text/html', '')) for o in outputs)

def test_the_notebook_over_sixty_records(tmp_path):
    synthetic(tmp_path/'runs', arms=20, seeds=3, users=500); (tmp_path/'runs'/'foreign').mkdir()
    p, said = papermill(tmp_path, folder=tmp_path/'runs', reference='rodpo pool=1', out_dir=tmp_path/'out', metrics='NDCG@10,NDCG@5 masked')
    assert p.returncode == 0, p.stderr[-3000:]
    for text in ('60 runs, 20 arms, 1 tables; 1 folders left out', 'foreign: no run', 'rodpo pool=20', '▲', r'\begin{tabular}'): assert text in said
    tests = pl.read_csv(tmp_path/'out'/'comparison_tests.csv')
    assert tests.height == 38 and tests['p_holm'].min() < .05 and pl.read_csv(tmp_path/'out'/'comparison.csv').height == 40

NONSENSE = [(dict(referense='x'), "unknown parameter 'referense': did you mean reference"), (dict(status='done'), 'unknown value of status'),
            (dict(folder='nowhere/at/all'), 'is no folder'), (dict(reference='y'), "unknown arm 'y'")]

@pytest.mark.parametrize('params, says', NONSENSE, ids=lambda x: '-'.join(x) if isinstance(x, dict) else '')
def test_the_notebook_refuses_nonsense_in_one_line(tmp_path, params, says):
    record(tmp_path/'runs'); p, _ = papermill(tmp_path, **dict(folder=tmp_path/'runs', out_dir='') | params)
    last = p.stderr.strip().splitlines()[-1]
    assert p.returncode == 1 and last.startswith('WorkbenchError: ') and says in last

def test_the_notebooks_shape():
    cells = [c for c in json.loads(NOTEBOOK.read_text())['cells'] if c['cell_type'] == 'code']
    [given] = [c for c in cells if 'parameters' in c['metadata'].get('tags', [])]
    from papermill import inspect_notebook
    names = [n.target.id for n in ast.parse(''.join(given['source'])).body]; seen = inspect_notebook(str(NOTEBOOK))
    assert len(cells) <= 15 and not any('#| export' in ''.join(c['source']) for c in cells)
    assert all(seen[n]['help'] and seen[n]['inferred_type_name'] != 'None' for n in names)
