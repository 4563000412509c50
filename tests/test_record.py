"runs_table over whatever may lie in a runs folder, and runs that another process writes."
import importlib, json, sys, time
from pathlib import Path
import numpy as np, polars as pl, pytest
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.record import COLUMNS, load_run, open_run, own_code, runs_table

def make(folder, method='dpo', seed=0, source='planted', finish=True, **values):
    "A small run with test numbers; its folder."
    with open_run(method, 'toys', seed, dict(beta=.1, lr=1e-4), 'f00', source, folder, protocol='yes/no') as run:
        for step in range(50): run.log(step, 'preference', loss=1/(step + 1))
        run.log(10, 'valid', **{'auc/model': .6}); run.log(0, 'test', **values)
        run.finish() if finish else run.flush()
    return run.path

def row(folder, name): return runs_table(folder).row(by_predicate=pl.col('run') == Path(name).name, named=True)

def test_one_row_a_run(tmp_path):
    made = [make(tmp_path, 'dpo', s, **{'auc/model': .7 + s/10}) for s in (0, 1)] + [make(tmp_path, 'sasrec', source='raw', **{'ndcg@10': .2})]
    table = runs_table(tmp_path)
    assert table['run'].to_list() == sorted(p.name for p in made) and table.columns == [*COLUMNS, 'auc/model', 'ndcg@10', 'valid/auc/model']
    assert table['auc/model'].to_list() == [.7, .7 + 1/10, None] and table['ndcg@10'].to_list() == [None, None, .2]
    assert table['dataset'].to_list() == ['toys (planted)']*2 + ['toys'] and table['source'].to_list() == ['planted', 'planted', 'raw']
    assert table['problem'].null_count() == 3 and (table['wall_seconds'] >= 0).all() and (table['peak_memory_mb'] > 10).all()
    assert table['params'].n_unique() == 1 and float(table['params'].str.json_path_match('$.beta')[0]) == .1

def test_empty_and_absent(tmp_path):
    assert runs_table(tmp_path).shape == (0, len(COLUMNS))
    with pytest.raises(WorkbenchError, match='is no folder'): runs_table(tmp_path/'nowhere')
    (tmp_path/'file').touch()
    with pytest.raises(WorkbenchError, match='is no folder'): runs_table(tmp_path/'file')

def test_an_unfinished_run_shows_what_it_has(tmp_path):
    path = make(tmp_path, finish=False)
    assert row(tmp_path, path)['status'] == 'unfinished' and row(tmp_path, path)['valid/auc/model'] == .6
    (path/'metrics.parquet').unlink()
    assert row(tmp_path, path)['status'] == 'unfinished'

FOREIGN = {'a list': '[1, 2]', 'no seed': '{"method": "x", "dataset": "x", "source": "raw", "params": {}, "status": "finished"}',
    'half': '{"method": "dpo", "da', 'empty': '', 'deep': '['*100_000,
    'seed is text': '{"method": "x", "dataset": "x", "source": "raw", "seed": "0", "params": {}, "status": "finished"}', 'bytes': b'\xff\xfe\x00'}

@pytest.mark.parametrize('what', FOREIGN)
def test_a_damaged_run_json_is_a_row(tmp_path, what):
    make(tmp_path, **{'auc/model': .7})
    bad = tmp_path/'zz'; bad.mkdir(); text = FOREIGN[what]
    (bad/'run.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    table = runs_table(tmp_path)
    assert table['status'].to_list() == ['finished', 'damaged'] and 'zz/run.json' in table['problem'][1] and '\n' not in table['problem'][1]
    with pytest.raises(WorkbenchError, match='damaged'): load_run(bad)

def test_what_is_no_run_is_passed_over(tmp_path):
    path = make(tmp_path, **{'auc/model': .7})
    (tmp_path/'notes.txt').write_text('x'); (tmp_path/'empty').mkdir(); (tmp_path/'.ipynb_checkpoints').mkdir(); (tmp_path/'half').mkdir()
    (tmp_path/'half'/'metrics.parquet').write_bytes(b'PAR1')
    (tmp_path/'folder').mkdir(); (tmp_path/'folder'/'run.json').mkdir()
    assert set(runs_table(tmp_path)['run']) <= {path.name, 'folder'} and row(tmp_path, path)['status'] == 'finished'

def test_odd_facts_are_null_not_an_exception(tmp_path):
    path = make(tmp_path, **{'auc/model': .7})
    info = json.loads((path/'run.json').read_text()) | dict(wall_seconds='long', commit=['x'], peak_memory_mb=None, started=5, seed=2**80)
    (path/'run.json').write_text(json.dumps(info))
    r = row(tmp_path, path)
    assert r['status'] == 'finished' and r['auc/model'] == .7 and all(r[k] is None for k in ('wall_seconds', 'commit', 'peak_memory_mb', 'started', 'seed'))

def test_damaged_tables_are_rows(tmp_path):
    "Cut anywhere, and with flipped bytes (the reader may even panic): never an exception; what run.json says stays."
    path = make(tmp_path, **{'auc/model': .7}); whole = (path/'metrics.parquet').read_bytes(); g = np.random.default_rng(0); seen = set()
    for i in range(120):
        data = bytearray(whole[:g.integers(len(whole))] if i % 2 else whole)
        if i % 2 == 0:
            for at in g.integers(len(data), size=4): data[at] = g.integers(256)
        (path/'metrics.parquet').write_bytes(data)
        r = row(tmp_path, path); seen.add(r['status'])
        assert r['method'] == 'dpo' and r['seed'] == 0 and (r['status'] == 'finished' or 'metrics.parquet is damaged' in r['problem'])
        assert i % 2 == 0 or r['status'] == 'damaged'
    assert 'damaged' in seen

def test_a_foreign_metrics_table_is_damage(tmp_path):
    path = make(tmp_path, **{'auc/model': .7}); pl.DataFrame(dict(a=[1])).write_parquet(path/'metrics.parquet')
    assert row(tmp_path, path)['status'] == 'damaged'
    pl.DataFrame(dict(step=[0], split=['test'], name=['x'], value=['high'])).write_parquet(path/'metrics.parquet')
    assert row(tmp_path, path)['status'] == 'damaged'

def test_a_thousand_runs_in_seconds(tmp_path):
    path = make(tmp_path, **{f'auc/{who}': .7 for who in ('model', 'sft', 'popularity', 'random', 'oracle')})
    info, metrics = (path/'run.json').read_bytes(), (path/'metrics.parquet').read_bytes()
    for i in range(999): (d := tmp_path/f'r{i}').mkdir(); (d/'run.json').write_bytes(info); (d/'metrics.parquet').write_bytes(metrics)
    start = time.process_time(); table = runs_table(tmp_path)
    assert table.height == 1000 and table['auc/model'].is_not_null().all()
    assert (spent := time.process_time() - start) < 20, spent     # about one second on one core; the rest is for a loaded machine

def test_a_follower_writes_nothing(tmp_path):
    "Rank 1 of an accelerate launch goes through the writer's code, before, while and after the writer has the lock."
    def code(run):
        run.update(x=1); run.log(1, 'train', loss=.5); run.rewind('train', 0); run.save('ranks', pl.DataFrame(dict(user=[1])))
        run.flush(); run.finish(); return run
    files = lambda: {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    how = dict(method='dpo', dataset='toys', seed=0, params=dict(beta=.1), fingerprint='f', source='planted', out_dir=tmp_path)
    with pytest.raises(WorkbenchError, match='no run.json'), open_run(**how, writer=False): pass
    assert not files()
    with open_run(**how) as main:
        before = files()
        with open_run(**how, writer=False) as other: assert not other.finished; code(other)
        with open_run(**how, writer=False, resume=False) as other: code(other)
        assert files() == before and other.path == main.path and other.params == main.params
        code(main)
    before = files()
    with open_run(**how, writer=False) as other: assert other.finished and other.frame('ranks').height == 1
    assert files() == before

def test_a_module_that_changed_under_a_running_kernel_is_refused(tmp_path, monkeypatch):
    "What would run is the old code, so the record must not name the new one; reloaded, it is another run."
    monkeypatch.syspath_prepend(str(tmp_path)); file = tmp_path/'mymethod.py'
    file.write_text('def f(): return 1\n'); one = own_code(loss='mymethod:f')
    file.write_text('def f(): return 22\n')
    with pytest.raises(WorkbenchError, match='has changed since it was imported'): own_code(loss='mymethod:f')
    importlib.invalidate_caches(); importlib.reload(sys.modules['mymethod'])
    assert own_code(loss='mymethod:f') != one and own_code(loss='dpo', fusion=None) == {}
