"One JupyterLab and one Chromium for all browser tests."
import os, shutil
import pytest
from lab import ARGS, Lab, Sheet

def pytest_collection_modifyitems(items):
    for item in items:
        if 'browser' in item.path.parts: item.add_marker(pytest.mark.browser)

@pytest.fixture(scope='session')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=os.environ.get('CHROMIUM') or shutil.which('chromium') or 'chromium', headless=True, args=ARGS)
        yield b; b.close()

@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp('lab'))
    yield lab; lab.stop()

@pytest.fixture(scope='session')
def known(lab, browser):
    "What an empty JupyterLab writes into the console."
    sheet = Sheet(lab, browser, lab.put('empty', ['1 + 1'])).run('.jp-OutputArea-output'); sheet.page.wait_for_timeout(1000)
    errors = sheet.errors; sheet.page.close(); return errors

@pytest.fixture
def notebook(lab, browser, known):
    "A function: (name, cells, until, **Sheet) -> a notebook that has run; what is left open is checked and closed."
    opened = []
    def run(name, cells, until='.wb-explorer', **how):
        sheet = Sheet(lab, browser, lab.put(name, cells), **how); opened.append(sheet); return sheet.run(until)
    yield run
    for sheet in opened: sheet.close(known)
