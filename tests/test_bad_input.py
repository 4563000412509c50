"""Places that cannot be written, full disks, two processes at once, damaged files, impossible values: one clear line, and nothing half-written.
Raw files (truncated, not JSON, odd pictures, no timestamp) are in test_data.py, misspelt parameters through papermill in test_train_hanorec.py."""
import json, math, os, shutil, subprocess, sys, textwrap, time
from pathlib import Path
import numpy as np, polars as pl, pytest
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.guard import guard
from mmrec_wb.core.paths import atomic_write, build_once, project_root
from mmrec_wb.core.record import load_run, open_run, runs_table
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.preference.hardness import delta, neighbour_scores
from mmrec_wb.training.hanorec import thumbnails, train_preference, train_sft

ROOT, TINY, QUICK = project_root(), dict(source='planted', planted_users=40, planted_items=60), dict(epochs=1, batch_size=16)
SETUP = '''
import json, os, sys
from pathlib import Path
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.training.hanorec import train_preference, train_sft
def tiny(): return add_features(load_dataset('toys', source='planted', planted_users=40, planted_items=60), progress=False)
quick = dict(epochs=1, batch_size=16)
def error(f):
    try: f()
    except WorkbenchError as e: return str(e)
'''

@pytest.fixture(scope='module')
def data(): return add_features(load_dataset('toys', **TINY), progress=False)

@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    "An SFT run, and a preference run that starts from it."
    out = tmp_path_factory.mktemp('undisturbed'); sft = train_sft(data, **QUICK, out_dir=out)
    return sft, train_preference(data, sft, **QUICK, out_dir=out)

@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    "A root of its own, so that the cache may be damaged."
    monkeypatch.setattr('mmrec_wb.core.paths.project_root', lambda: tmp_path)
    return tmp_path/'data'/'cache'

def one_line(e): return '\n' not in str(e.value) and len(str(e.value)) < 600
def below(folder): return {p: p.read_bytes() if p.is_file() else None for p in Path(folder).rglob('*')}
def test_numbers(run): return dict(run.frame('metrics').filter(split='test').select('name', 'value').rows())
test_numbers.__test__ = False

def mounted(folder, options, script, timeout=300):
    "What a script prints last, as JSON. It runs with a small file system of its own at `folder`, which no other process sees and which ends with it."
    Path(folder).mkdir(); mount = f'mount -t tmpfs -o {options} tmpfs "{folder}"'
    if not shutil.which('unshare') or (p := subprocess.run(['unshare', '-rm', 'sh', '-c', mount], capture_output=True, text=True)).returncode:
        pytest.skip('no small file system can be mounted here: ' + (p.stderr.strip() if shutil.which('unshare') else 'no unshare'))
    code = SETUP + f'place = Path({str(folder)!r})\n' + textwrap.dedent(script)
    p = subprocess.run(['unshare', '-rm', 'sh', '-c', f'{mount} && exec "$0" "$@"', sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                       timeout=timeout)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.strip().splitlines()[-1])

# --- places that cannot be written

@pytest.mark.parametrize('place', ['file', 'file/below', 'file/below/deep', 'n'*300])
def test_an_impossible_out_dir(data, tmp_path, place):
    (tmp_path/'file').write_text('mine'); before = below(tmp_path); start = time.time()
    with pytest.raises(WorkbenchError, match='cannot be written') as e: train_sft(data, **QUICK, out_dir=tmp_path/place)
    assert one_line(e) and 'choose another' in str(e.value) and below(tmp_path) == before and time.time() - start < 20

def test_an_impossible_out_dir_of_the_second_stage(data, undisturbed, tmp_path):
    (tmp_path/'file').write_text('mine'); before = below(tmp_path)
    with pytest.raises(WorkbenchError, match='Not a directory') as e: train_preference(data, undisturbed[0], **QUICK, out_dir=tmp_path/'file'/'x')
    assert one_line(e) and below(tmp_path) == before

def test_a_read_only_place(tmp_path):
    says = mounted(tmp_path/'ro', 'ro,size=1m',
        'print(json.dumps([error(lambda: train_sft(tiny(), **quick, out_dir=p)) for p in (place, place/"a"/"b")]))')
    assert all('cannot be written' in s and 'Read-only file system' in s and '\n' not in s for s in says)

@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_without_permission(data, tmp_path):
    (tmp_path/'locked').mkdir(mode=0o500)
    with pytest.raises(WorkbenchError, match='Permission denied') as e: train_sft(data, **QUICK, out_dir=tmp_path/'locked'/'runs')
    assert one_line(e) and not list((tmp_path/'locked').iterdir())

def test_an_impossible_cache(tmp_path, own_cache):
    (tmp_path/'data').write_text('mine'); before = below(tmp_path)
    with pytest.raises(WorkbenchError, match='cannot be written') as e: load_dataset('toys', **TINY)
    assert one_line(e) and below(tmp_path) == before

def test_an_error_of_the_work_is_not_blamed_on_the_place(tmp_path):
    "A bug or a file that cannot be read keeps its own message."
    def reads(tmp): open('/proc/version/x')
    for write in (lambda: atomic_write(tmp_path/'f', reads), lambda: build_once(tmp_path/'g', reads)):
        with pytest.raises(NotADirectoryError): write()
    with pytest.raises(ZeroDivisionError), open_run('m', 'toys', 0, {}, 'f', 'planted', tmp_path/'runs'): 1/0
    with pytest.raises(NotADirectoryError), open_run('m', 'toys', 0, {}, 'f', 'planted', tmp_path/'runs'): reads(None)
    assert not [p for p in tmp_path.rglob('*') if p.name.endswith('.tmp')] and len(list((tmp_path/'runs').iterdir())) == 1

# --- a full disk

FULL = '''
data = tiny()
def ballast(free):
    "Leave so many bytes."
    (place/'ballast').unlink(missing_ok=True); s = os.statvfs(place); n = s.f_bavail*s.f_frsize - free
    with open(place/'ballast', 'wb') as f: os.posix_fallocate(f.fileno(), 0, n)
def state():
    left = [str(p.relative_to(place)) for p in place.rglob('*') if p.name.endswith(('.tmp', '.lock'))]
    runs = [json.loads(p.read_text())['status'] for p in place.glob('runs/*/run.json')]
    empty = [p.name for p in place.glob('runs/*') if p.is_dir() and not (p/'run.json').exists()]
    return dict(left=left, runs=runs, empty=empty)
def work():
    out = []
    for free in FREE:
        ballast(free); said = error(train)
        out.append(dict(free=free, said=said, **state()))
    (place/'ballast').unlink(); run = train()
    return dict(tries=out, end=state(), numbers=dict(run.frame('metrics').filter(split='test').select('name', 'value').rows()), finished=run.finished)
'''

def checked(result, expected):
    "Every try on the full disk was one line and left only whole things; with room again the same command ended as an undisturbed run."
    tries = result['tries']
    assert all(t['said'] and 'No space left on device' in t['said'] and '\n' not in t['said'] and 'again' in t['said'] for t in tries), tries
    assert all(not t['left'] and not t['empty'] and set(t['runs'][-1:]) <= {'running', 'finished'} for t in tries), tries
    assert result['finished'] and not result['end']['left'] and set(result['end']['runs']) == {'finished'}
    assert result['numbers'].keys() == expected.keys()
    assert all(abs(result['numbers'][k] - v) < 1e-6 or math.isnan(v) for k, v in expected.items()), (result['numbers'], expected)

@pytest.mark.slow
def test_a_full_disk_during_sft(undisturbed, tmp_path):
    "No room for anything; for the run but no checkpoint; for the weights in it but not the optimiser."
    script = FULL + 'FREE = [0, 2*2**20, 5*2**20]\ndef train(): return train_sft(data, **quick, out_dir=place/"runs")\nprint(json.dumps(work()))'
    checked(mounted(tmp_path/'small', 'size=48m', script), test_numbers(undisturbed[0]))

@pytest.mark.slow
def test_a_full_disk_during_preference(undisturbed, tmp_path):
    "No room at all, and too little for the model at the end."
    script = FULL + ('FREE = [0, 2*2**20]\nsft = train_sft(data, **quick, out_dir=place/"sft")\n'
                     'def train(): return train_preference(data, sft, **quick, out_dir=place/"runs")\nprint(json.dumps(work()))')
    checked(mounted(tmp_path/'small', 'size=48m', script), test_numbers(undisturbed[1]))

def test_a_full_disk_while_the_cache_is_made(tmp_path, data):
    "The planted shop and the feature store: no room, a little room, room again; then everything is as in the project's own cache."
    script = '''
    import mmrec_wb.core.paths as paths
    paths.project_root = lambda: place
    says = []
    for size in (200_000, 500_000):
        free = os.statvfs(place); (place/'ballast').write_bytes(b'0'*max(0, free.f_bavail*free.f_frsize - size))
        says.append(error(tiny)); (place/'ballast').unlink()
        assert not [p for p in place.rglob('*') if p.name.endswith('.tmp')], list(place.rglob('*'))
    d = tiny()
    print(json.dumps(dict(says=says, fingerprint=d.fingerprint, sums={m: float(f.values.sum()) for m, f in d.features.items()})))
    '''
    r = mounted(tmp_path/'small', 'size=6m', script)
    assert all(s and 'No space left on device' in s and '\n' not in s for s in r['says']), r['says']
    assert r['fingerprint'] == data.fingerprint and r['sums'] == pytest.approx({m: float(f.values.sum()) for m, f in data.features.items()}, rel=1e-4)

# --- two processes

def test_two_processes_on_one_run(data, tmp_path, undisturbed):
    "The second says so at once; the first ends as if nobody had come."
    code = SETUP + 'print(train_sft(tiny(), **quick, out_dir=sys.argv[1]).path)'
    first = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 120
    while not list(tmp_path.glob('sft-*/run.json')):
        assert first.poll() is None and time.time() < end, first.stderr.read()[-2000:]
        time.sleep(.005)
    for resume in (True, False):
        start = time.time()
        with pytest.raises(WorkbenchError, match='written by another process') as e: train_sft(data, **QUICK, out_dir=tmp_path, resume=resume)
        assert one_line(e) and time.time() - start < 5
    still = first.poll() is None
    text, err = first.communicate(timeout=200)
    assert first.returncode == 0 and still, err[-2000:]
    assert test_numbers(load_run(text.strip().splitlines()[-1])) == pytest.approx(test_numbers(undisturbed[0]), nan_ok=True)
    assert runs_table(tmp_path)['status'].to_list() == ['finished'] and len(list(tmp_path.iterdir())) == 1
    assert train_sft(data, **QUICK, out_dir=tmp_path).finished

# --- damaged files of our own

def test_nan_in_a_feature_file(own_cache):
    add_features(load_dataset('toys', **TINY), progress=False)
    file = next(own_cache.glob('features/*minilm*/values.npy')); values = np.load(file); whole = file.read_bytes()
    for bad in (np.nan, np.inf):
        values[7, 3] = bad; np.save(file, values)
        with pytest.raises(WorkbenchError, match='NaN or inf in row 7') as e: add_features(load_dataset('toys', **TINY), progress=False)
        assert one_line(e) and str(file) in str(e.value) and 'rm -r' in str(e.value)
    file.write_bytes(whole[:len(whole)//2])
    with pytest.raises(WorkbenchError, match='damaged') as e: add_features(load_dataset('toys', **TINY), progress=False)
    assert one_line(e)
    file.write_bytes(whole)
    assert set(add_features(load_dataset('toys', **TINY), progress=False).features) == {'text', 'image'}

@pytest.mark.parametrize('file, keep', [('run.json', 40), ('run.json', 0), ('ranks.parquet', 200), ('metrics.parquet', 200),
                                        ('model/model.safetensors', 10_000), ('model/config.json', 30)])
def test_a_damaged_run(data, undisturbed, tmp_path, file, keep):
    "A finished SFT run with one file cut: the second stage, which needs it, names it in one line and starts nothing."
    sft = undisturbed[0]; copy = tmp_path/sft.path.name; shutil.copytree(sft.path, copy)
    (copy/file).write_bytes((copy/file).read_bytes()[:keep])
    if file == 'metrics.parquet':
        with pytest.raises(WorkbenchError, match='damaged') as e: load_run(copy).frame('metrics')
        assert one_line(e) and runs_table(tmp_path)['status'].to_list() == ['damaged']; return
    with pytest.raises(WorkbenchError, match='damaged') as e: train_preference(data, load_run(copy), **QUICK, out_dir=tmp_path)
    assert one_line(e) and copy.name in str(e.value) and not list(tmp_path.glob('hanorec-*/checkpoint')), 'found before training, not after'

def test_an_unwritten_table_and_no_run(undisturbed, tmp_path):
    with pytest.raises(WorkbenchError, match='has no table') as e: undisturbed[0].frame('explain/nothing')
    assert one_line(e)
    for place in (tmp_path, tmp_path/'nowhere', tmp_path/'file'/'x'):
        (tmp_path/'file').touch()
        with pytest.raises(WorkbenchError, match='no run.json'): load_run(place)

# --- ids that the catalogue lacks

@pytest.mark.parametrize('item', [-1, 999, 1.5, 'x', None])
def test_an_item_that_the_catalogue_lacks(data, item):
    for ask in (data.image, lambda i: thumbnails(data, [1, i])):
        with pytest.raises(WorkbenchError, match=f'{item!r}') as e: ask(item)
        assert one_line(e)

def test_vectors_of_an_item_that_the_catalogue_lacks(data):
    v = data.features['text'].values
    for ask in (lambda: neighbour_scores(v, [1, 999]), lambda: delta(v, [1], [999]), lambda: delta(v, [0], [1]), lambda: neighbour_scores(v, [-3])):
        with pytest.raises(WorkbenchError, match='item ids must lie in 1') as e: ask()
        assert one_line(e)

# --- parameters

def notebook_cells():
    cells = [c for c in json.loads((ROOT/'nbs'/'train_hanorec.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    at = next(i for i, c in enumerate(cells) if 'parameters' in c['metadata'].get('tags', []))
    return [''.join(c['source']) for c in cells[at:at + 2]]

def given(**values):
    "Run the parameters cell, what papermill would inject, and the guard cell."
    parameters, check = notebook_cells(); namespace = {}
    exec(parameters, namespace); namespace.update(values); exec(check, namespace)
    return namespace

def test_every_parameter_of_the_notebook_refuses_another_type():
    namespace = given(); declared = namespace['__annotations__']
    assert len(declared) > 20
    for name, kind in declared.items():
        fits = lambda b: (type(b) is kind or kind is float and type(b) is int) and not (type(b) is float and b - b != 0)
        for bad in [b for b in ('text', 1, 1.5, True, [1], None, float('nan'), float('inf')) if not fits(b)]:
            with pytest.raises(WorkbenchError, match=f'parameter {name}=') as e:
                guard({'__annotations__': declared, **{n: namespace[n] for n in declared}, name: bad})
            assert one_line(e) and 'is needed' in str(e.value)

@pytest.mark.parametrize('name, value', [('lr', -1.), ('lr', float('inf')), ('beta', float('inf')), ('beta', -1.), ('batch_size', 0), ('max_users', -5),
                                         ('lora_dropout', 1.), ('source', 'raww'), ('device', 'tpu'), ('seed', '0'), ('noise', -.1),
                                         ('neighbours', 0), ('hard_temp', 0.), ('history', 1), ('dataset', 'toyz'), ('loss', 'dpoo'), ('epoch', 3),
                                         ('resume', 1), ('report_to', 'mlfloww'), ('backbone', '/nonexistent')])
def test_a_wrong_value_stops_the_notebook_in_its_guard_cell(name, value):
    with pytest.raises(WorkbenchError) as e: given(**{name: value})
    assert one_line(e) and (name in str(e.value) or str(value) in str(e.value))
