"Lint of the notebooks and of what is made from them. Nothing is executed, nothing in the tree is changed."
import ast, json, re, shutil, subprocess, sys
from fnmatch import fnmatch
from pathlib import Path
import pytest
from fastcore.utils import str2bool
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(ROOT/'nbs').parts))
TOP = [p for p in NBS if p.parent == ROOT/'nbs' and fnmatch(p.name, 'train_*.ipynb')]
MAY_SKIP = ['nbs/train_*.ipynb', 'nbs/compare_runs.ipynb']

def name(p): return p.relative_to(ROOT).as_posix()
def source(cell): return ''.join(cell['source'])
def read(p): return json.loads(p.read_text('utf-8'))
def code_cells(nb): return [c for c in nb['cells'] if c['cell_type'] == 'code']
def tags(cell): return cell['metadata'].get('tags', [])
def skips(path):
    "As nbdev_test itself reads it: in a raw cell of front matter, or in the list under the title."
    fm = getattr(NBProcessor(path, procs=FrontmatterProc, process=True).nb, 'frontmatter_', {})
    return str2bool(fm.get('skip_exec', False))

def each(paths): return pytest.mark.parametrize('path', paths, ids=name)

def files():
    "What is, or could be, committed: git's view where there is one."
    r = subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if r.returncode == 0: return [p for n in r.stdout.split('\0') if n and (p := ROOT/n).is_file()]
    return [p for p in ROOT.rglob('*') if p.is_file() and not re.match(r'(\.venv|\.git|runs|data/raw|data/cache)/', name(p))]

@pytest.fixture(scope='module')
def tidy(tmp_path_factory):
    "A copy of the tree after nbdev_clean and nbdev_export: compared with the tree itself, so uncommitted edits do no harm."
    d = tmp_path_factory.mktemp('tidy')
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_proc', '_docs')
    for n in ('nbs', 'mmrec_wb'): shutil.copytree(ROOT/n, d/n, ignore=ignore)
    shutil.copy(ROOT/'settings.ini', d)
    for cmd in ('nbdev.clean import nbdev_clean as f', 'nbdev.doclinks import nbdev_export as f'):
        r = subprocess.run([sys.executable, '-c', f'from {cmd}; f()'], cwd=d, capture_output=True, text=True)
        assert r.returncode == 0, f'{r.stdout}\n{r.stderr}'
    return d

def test_clean(tidy):
    unclean = [name(p) for p in NBS if p.read_bytes() != (tidy/name(p)).read_bytes()]
    assert not unclean, f'not clean: {unclean}; run `make clean-notebooks`'

def test_exported(tidy):
    def package(d): return {p.relative_to(d).as_posix(): p.read_text('utf-8') for p in (d/'mmrec_wb').rglob('*.py')}
    ours, fresh = package(ROOT), package(tidy)
    stale = sorted(n for n in ours.keys() | fresh.keys() if ours.get(n) != fresh.get(n))
    assert not stale, f'not what the notebooks export: {stale}; run `make export`'

def test_every_module_has_a_notebook():
    said = {n for p in NBS for c in code_cells(read(p)) for n in re.findall(r'^#\| *default_exp +(\S+)', source(c), re.M)}
    bare = [name(p) for p in (ROOT/'mmrec_wb').rglob('*.py') if p.name != '_modidx.py'
            and '.'.join(p.relative_to(ROOT/'mmrec_wb').with_suffix('').parts) not in said
            and not (p.name == '__init__.py' and len(re.sub(r'__version__.*', '', p.read_text('utf-8')).strip()) == 0)]
    assert not bare, f'no notebook exports {bare}: remove them, or write them as notebooks'

def test_readme():
    r = subprocess.run([sys.executable, ROOT/'tools'/'readme.py', '--check'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr

@pytest.mark.parametrize('page', ['README.md', 'results/README.md', 'data/README.md', 'CONTRIBUTING.md'])
def test_links(page):
    "Files are there, and so are the headings that links name."
    links = re.findall(r'\]\(([^)\s]+)\)', re.sub(r'```.*?```', '', (ROOT/page).read_text('utf-8'), flags=re.S))
    place = lambda t: ((ROOT/page).parent/t if t else ROOT/page).resolve()
    headings = lambda p: {re.sub(r'[^a-z0-9 -]', '', h.lower()).replace(' ', '-') for h in re.findall(r'^#+ (.+)', p.read_text('utf-8'), re.M)}
    for t in [t for t in links if not re.match(r'[a-z]+:', t)]:
        path, _, heading = t.partition('#'); assert place(path).exists(), f'{page} links to what is not there: {t}'
        assert not heading or heading in headings(place(path)), f'{page} links to a heading that is not there: {t}'

def test_the_readme_says_nothing_of_its_own():
    "Its figures of what came out are those of results/README.md."
    parts = (ROOT/'README.md').read_text('utf-8').split('\n\n')
    said = [p for p in parts if p.startswith('**What came out.**') or '| peak memory |' in p]
    found = (ROOT/'results'/'README.md').read_text('utf-8'); figures = {n for p in said for n in re.findall(r'\d*\.\d+', p)}
    assert len(said) == 5 and len(figures) > 20
    assert not (own := [n for n in figures if n not in found]), own

@each(NBS)
def test_small(path):
    nb = read(path)
    assert path.stat().st_size < 400_000, f'{path.stat().st_size//1000} kB: clear big outputs, widgets first'
    assert 'widgets' not in nb['metadata'], 'saved widget state: clear the outputs of widgets'
    long = [len(source(c).splitlines()) for c in code_cells(nb) if len(source(c).splitlines()) > 45]
    assert not long, f'code cells of {long} lines (45 at most): split them'

def too_long(text): return [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 160]

@each(NBS)
def test_line_length_of_notebooks(path):
    "Prose may run on, and a parameter stands on one line with its meaning."
    cells = [(k, c) for k, c in enumerate(read(path)['cells']) if c['cell_type'] == 'code' and 'parameters' not in tags(c)]
    long = [f'cell {k}, line {n}' for k, c in cells for n in too_long(source(c))]
    assert not long, f'{name(path)} has lines of code over 160 characters: {long}'

def test_line_length_of_scripts():
    long = [f'{name(p)}:{n}' for d in ('tests', 'benchmarks', 'tools') for p in sorted((ROOT/d).glob('*.py')) for n in too_long(p.read_text('utf-8'))]
    assert not long, f'lines over 160 characters: {long}'

@each(NBS)
def test_nothing_skipped(path):
    assert skips(path) == any(fnmatch(name(path), g) for g in MAY_SKIP), 'skip_exec belongs to train_* and compare_runs, to all of them and to no other'
    if not skips(path):
        assert not [source(c)[:60] for c in code_cells(read(path)) if re.search(r'^#\| *(eval: *false|notest|slow|cuda)\b', source(c), re.M | re.I)]

def test_no_hidden_corner():
    odd = [name(p) for p in (ROOT/'nbs').rglob('*') if (p.name == '.notest' or p.suffix == '.ipynb' and p not in NBS)
           and not {'_proc', '_docs', '.ipynb_checkpoints'} & set(p.parts)]
    assert not odd, f'nbdev_test would not see {odd}'

@each(TOP)
def test_train_shape(path):
    cells = code_cells(read(path))
    assert len(cells) <= 15, f'{len(cells)} code cells'
    assert not [source(c)[:60] for c in cells if re.search(r'^#\| *(export|default_exp)', source(c), re.M)], 'a train notebook exports nothing'
    assert sum('parameters' in tags(c) for c in cells) == 1, 'exactly one cell is tagged `parameters`'

@each(TOP)
def test_train_parameters(path):
    "Each parameter is annotated and explained, as `papermill --help-notebook` will list it."
    from papermill import inspect_notebook
    [cell] = [c for c in code_cells(read(path)) if 'parameters' in tags(c)]
    body = ast.parse(source(cell)).body
    odd = [ast.unparse(n) for n in body if not (isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.value is not None)]
    assert not odd, f'only `name: type = value  # meaning` lines, not {odd}'
    seen, names = inspect_notebook(str(path)), [n.target.id for n in body]
    poor = [n for n in names if n not in seen or not seen[n]['help'] or seen[n]['inferred_type_name'] == 'None']
    assert not poor, f'no trailing comment, or not on one line: {poor}'
    common = 'dataset source data_dir out_dir seed epochs batch_size lr device max_users resume report_to'.split()
    assert not (gone := [n for n in common if n not in names]), f'every train notebook has these: {gone}'

def test_no_place_of_one_machine():
    "A path from the root of somebody's disk helps nobody else."
    found = []
    for p in files():
        raw = p.read_bytes()
        if b'\0' in raw: continue
        found += [f'{name(p)}: {m}' for m in re.findall(r'(?<![\w.}~-])/(?:work|root|home|Users)/\w[^\s"\'\\]*', raw.decode('utf-8', 'replace'))]
    assert not found, found

def test_no_quarto():
    "quarto is not at hand everywhere: nothing that make or .ci runs may want it."
    for p in (ROOT/'Makefile', ROOT/'.ci'/'run', *(ROOT/'tools').glob('*')):
        if p.is_file():
            assert not re.search(r'nbdev_(prepare|readme|docs|preview|proc_nbs)|^[^#\n]*quarto (render|install)', p.read_text('utf-8'), re.M), name(p)
