"Where tests run: planted data only (but for make test-real), one thread, no hub, a browser where there is one."
import os, shutil
import pytest
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium')

def pytest_collection_modifyitems(config, items):
    "Browser tests are skipped where there is no Chromium, unless MMREC_BROWSER_TESTS=1 makes them mandatory."
    if CHROMIUM or os.environ.get('MMREC_BROWSER_TESTS') == '1': return
    for item in items:
        if item.get_closest_marker('browser'): item.add_marker(pytest.mark.skip(reason='no chromium (CHROMIUM names one)'))

def pytest_terminal_summary(terminalreporter):
    missed = [r for r in terminalreporter.stats.get('skipped', []) if 'no chromium' in str(r.longrepr)]
    said = f'*** {len(missed)} BROWSER TESTS DID NOT RUN: no chromium here (apt-get install chromium) ***'
    if missed: terminalreporter.write_line(said, yellow=True, bold=True)

@pytest.fixture(autouse=True)
def planted_only(request, monkeypatch):
    "Only tests marked real see MMREC_DATA."
    if not request.node.get_closest_marker('real'): monkeypatch.delenv('MMREC_DATA', raising=False)

@pytest.fixture
def clone(tmp_path):
    "A copy of what a run needs, with a cache of its own: other tests of this moment write into the project's."
    root, copy = Path(__file__).parents[1], tmp_path/'clone'
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_proc', '_docs')
    for n in ('nbs', 'mmrec_wb'): shutil.copytree(root/n, copy/n, ignore=ignore)
    (copy/'data').mkdir(); shutil.copy(root/'data/datasets.toml', copy/'data'); shutil.copy(root/'settings.ini', copy)
    return copy
