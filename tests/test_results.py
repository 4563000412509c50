"The README's numbers are those under results/, and those say where they come from."
import importlib.util
import polars as pl, pytest
from mmrec_wb.core.paths import project_root

ROOT = project_root()
spec = importlib.util.spec_from_file_location('study_hanorec', ROOT/'benchmarks'/'study_hanorec.py')
study = importlib.util.module_from_spec(spec); spec.loader.exec_module(study)
SUMMARIES = sorted((ROOT/'results').glob('hanorec_*_summary.csv'))

def test_there_are_results(): assert SUMMARIES

@pytest.mark.parametrize('path', SUMMARIES, ids=lambda p: p.stem)
def test_readme_says_what_was_measured(path):
    assert study.readme_row(pl.read_csv(path)) in (ROOT/'README.md').read_text()

@pytest.mark.parametrize('path', SUMMARIES, ids=lambda p: p.stem)
def test_summary_follows_from_the_runs(path):
    runs, summary = pl.read_csv(str(path).replace('_summary', '_runs')), pl.read_csv(path)
    for row in summary.to_dicts():
        own = runs.filter(method=row['method'])
        assert own['seed'].n_unique() == row['seeds'] == own.height and abs(own['auc/model'].mean() - row['auc/model']) < 2e-4
        if 'planted' in row['dataset']: assert row['auc/model'] < row['auc/oracle']
