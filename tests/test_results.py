"The numbers of results/README.md are those of the tables beside it, and those say where they come from."
import importlib.util, sys
import polars as pl, pytest
from mmrec_wb.core.paths import project_root

ROOT = project_root()
sys.path.insert(0, str(ROOT/'benchmarks'))
spec = importlib.util.spec_from_file_location('study_hanorec', ROOT/'benchmarks'/'study_hanorec.py')
study = importlib.util.module_from_spec(spec); spec.loader.exec_module(study)
SUMMARIES = sorted((ROOT/'results').glob('hanorec_*_summary.csv'))

def test_there_are_results(): assert SUMMARIES

@pytest.mark.parametrize('path', SUMMARIES, ids=lambda p: p.stem)
def test_readme_says_what_was_measured(path):
    assert study.readme_row(pl.read_csv(path)) in (ROOT/'results'/'README.md').read_text()

@pytest.mark.parametrize('path', SUMMARIES, ids=lambda p: p.stem)
def test_summary_follows_from_the_runs(path):
    runs, summary = pl.read_csv(str(path).replace('_summary', '_runs')), pl.read_csv(path)
    assert summary['arm'].to_list() == [a for a in study.ARMS if a in summary['arm']] and {'sft', 'dpo', 'hanorec'} <= set(summary['arm'])
    for row in summary.to_dicts():
        own = runs.filter(arm=row['arm'])
        assert own['seed'].n_unique() == row['seeds'] == own.height == 3 and abs(own['auc/model'].mean() - row['auc/model']) < 2e-4
        if 'planted' in row['dataset']: assert row['auc/model'] < row['auc/oracle']

@pytest.mark.parametrize('path', SUMMARIES, ids=lambda p: p.stem)
def test_differences_are_those_of_the_arms(path):
    tests, m = pl.read_csv(str(path).replace('_summary', '_tests')), {r['arm']: r['auc/model'] for r in pl.read_csv(path).to_dicts()}
    arms = list(m)
    assert {(r['baseline'], r['arm']) for r in tests.to_dicts()} == {(b, a) for b in ('sft', 'dpo') for a in arms if arms.index(a) > arms.index(b)}
    for r in tests.to_dicts():
        assert abs(r['difference'] - (m[r['arm']] - m[r['baseline']])) < 3e-4 and r['low'] <= r['difference'] <= r['high'] and r['p'] <= r['p_holm']

def test_every_arm_was_tuned_alike():
    "Six trials each, on valid."
    table = pl.read_csv(ROOT/'results'/'tune_hanorec_toys_planted.csv')
    assert dict(table.group_by('loss').len().iter_rows()) == dict(dpo=6, hanorec=6) and not [c for c in table.columns if 'test' in c]
