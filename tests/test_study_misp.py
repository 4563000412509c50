"The studies of MISP-DPO and of the autoencoder's truth: their tables hold together, and results/README.md says what they say."
import sys
import polars as pl, pytest
from mmrec_wb.core.paths import project_root

ROOT = project_root(); RESULTS = ROOT/'results'; README = (ROOT/'results'/'README.md').read_text()
sys.path.insert(0, str(ROOT/'benchmarks'))
import study_misp as study
SUMMARIES = sorted(RESULTS.glob('misp_*_summary.csv'))
of = lambda path, part: pl.read_csv(str(path).replace('_summary', f'_{part}'))
each = pytest.mark.parametrize('path', SUMMARIES, ids=lambda p: p.stem)

def test_there_are_results(): assert SUMMARIES and study.FILE.exists()

def test_both_arms_had_the_same_budget_on_valid():
    table = pl.read_csv(study.FILE); assert not [c for c in table.columns if 'test' in c] and table['generator_seed'].unique().to_list() == [0]
    for arm in ('sdpo', 'misp_3'): assert [{k: r[k] for k in ('beta', 'preference_lr')} for r in table.filter(arm=arm).to_dicts()] == study.GRID

@each
def test_settings_are_those_that_valid_chose(path):
    tuned = study.best()
    for r in of(path, 'runs').filter(pl.col('arm') != 'sft').to_dicts(): assert {k: r[k] for k in ('beta', 'preference_lr')} == tuned[r['arm']]

@each
def test_summary_and_differences_follow_from_the_runs(path):
    runs, m = of(path, 'runs'), {r['arm']: r for r in pl.read_csv(path).to_dicts()}
    for arm, r in m.items():
        own = runs.filter(arm=arm); assert own['seed'].n_unique() == own.height == r['seeds'] and abs(own['auc'].mean() - r['auc']) < 2e-6
    for r in of(path, 'tests').to_dicts():
        assert abs(r['difference'] - (m[r['arm']]['auc'] - m[r['baseline']]['auc'])) < 3e-6
        assert r['low'] <= r['difference'] <= r['high'] and r['p'] <= r['p_holm']

@each
def test_readme_says_what_was_measured(path): assert study.readme_row(pl.read_csv(path)) in README

def test_units_and_directions():
    "results/README.md's rows of the autoencoder's truth; where it says that the units win, they do in every seed."
    import truth_sae
    table = pl.read_csv(RESULTS/'truth_sae.csv')
    for line in truth_sae.readme_rows(table): assert line in README, line
    for r in table.filter(seed='all', kind='items', visual='text').to_dicts(): assert r['wins'] and r['sae'] > max(r['pca'], r['random'])
