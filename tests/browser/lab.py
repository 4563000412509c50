"A real JupyterLab on loopback, and a notebook in it, driven by headless Chromium."
import csv, os, secrets, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import nbformat

ROOT = Path(__file__).resolve().parent.parent.parent
SHOTS = Path(os.environ.get('MMREC_SCREENSHOTS') or ROOT/'runs'/'screenshots')   # kept: look at them
TIMINGS = os.environ.get('MMREC_TIMINGS')                                        # a csv file; unset: seconds are not kept
ARGS = ['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu', '--use-gl=angle', '--use-angle=swiftshader', '--enable-unsafe-swiftshader']
HERE = ('http://127.0.0.1', 'ws://127.0.0.1', 'data:', 'blob:', 'about:')
WIDTHS = (1280, 1920)


class Lab:
    "The server. `root` is the folder that it shows."
    def __init__(self, folder: Path):
        self.root, self.log = folder/'root', folder/'server.log'; self.root.mkdir(parents=True)
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); self.port = s.getsockname()[1]
        self.token = secrets.token_hex(16)
        quiet = folder/'settings'/'@jupyterlab'/'apputils-extension'; quiet.mkdir(parents=True)     # no question about news
        (quiet/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}')
        places = dict(JUPYTER_CONFIG_DIR='cfg', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='run', IPYTHONDIR='ipy', JUPYTERLAB_SETTINGS_DIR='settings',
                      JUPYTERLAB_WORKSPACES_DIR='ws')
        env = {k: v for k, v in os.environ.items() if k != 'MMREC_DATA'} | {k: str(folder/v) for k, v in places.items()}
        cmd = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={self.port}', '--ServerApp.port_retries=0',
               f'--IdentityProvider.token={self.token}', f'--ServerApp.root_dir={self.root}', '--expose-app-in-browser', '--LabApp.news_url=None',
               '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--LabApp.extension_manager=readonly']
        if hasattr(os, 'geteuid') and os.geteuid() == 0: cmd.append('--allow-root')
        self.process = subprocess.Popen(cmd, env=env, stdout=self.log.open('w'), stderr=subprocess.STDOUT)
        self._wait()

    def _wait(self):
        for _ in range(240):
            try: urllib.request.urlopen(f'http://127.0.0.1:{self.port}/api?token={self.token}', timeout=2); return
            except OSError:
                assert self.process.poll() is None, f'JupyterLab died:\n{self.log.read_text()[-3000:]}'
                time.sleep(.5)
        raise AssertionError(f'JupyterLab never came up:\n{self.log.read_text()[-3000:]}')

    def stop(self):
        self.process.terminate()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill()

    def put(self, name: str, cells: list) -> str:
        "Write a notebook of code cells into the folder."
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
        nbformat.write(nb, self.root/f'{name}.ipynb'); return f'{name}.ipynb'

    def url(self, path: str) -> str: return f'http://127.0.0.1:{self.port}/doc/tree/{path}?token={self.token}&reset'


READY = '''() => { const w = window.jupyterapp && window.jupyterapp.shell.currentWidget;
  return w && w.sessionContext && w.sessionContext.isReady && w.sessionContext.session?.kernel?.connectionStatus === "connected"; }'''
ERRORS = '''() => [...window.jupyterapp.shell.currentWidget.content.model.cells].flatMap(c => c.type === 'code' ? c.outputs.toJSON() : [])
  .filter(o => o.output_type === 'error' || o.name === 'stderr' && /Traceback|Error/.test([].concat(o.text).join('')))
  .map(o => [].concat(o.traceback || o.text).join('\\n'))'''
FIGURE = '''g => { const a = v => v === undefined || v === null ? [] : Array.from(v._inputArray || v);
  return {title: g.layout.title?.text || '', width: g.clientWidth, points: g.querySelectorAll('.point').length,
    traces: g.data.map(t => ({type: t.type, name: t.name || '', x: a(t.x), y: a(t.y), colour: [].concat(t.marker?.color ?? t.line?.color ?? [])}))}; }'''
LISTEN = '''() => { if (window.wbLast === undefined) for (const t of ['pointerdown', 'pointerup', 'keydown', 'input', 'change'])
  addEventListener(t, () => { window.wbLast = performance.now(); }, true); window.wbLast = performance.now(); }'''
TILES = '''s => [...s.querySelectorAll('.wb-tile')].map(b => ({title: b.title, above: b.querySelector('.wb-above')?.textContent || '',
  below: b.querySelector('.wb-below')?.textContent || '', picture: (b.querySelector('img')?.naturalWidth || 0) > 0, faded: b.classList.contains('wb-faded'),
  picked: b.getAttribute('aria-pressed') === 'true'}))'''


class Sheet:
    "A notebook on the screen."
    def __init__(self, lab: Lab, browser, path: str, width: int=1280, height: int=2400, title: str='', script: str=''):
        self.lab, self.title, self.outside, self.errors, self.times = lab, title or Path(path).stem, [], [], []
        self.page = p = browser.new_page(viewport=dict(width=width, height=height)); p.set_default_timeout(60_000)
        p.add_init_script(script)                                                 # JavaScript that the page runs first
        p.on('request', lambda r: None if r.url.startswith(HERE) else self.outside.append(r.url))
        p.on('console', lambda m: self.errors.append(m.text) if m.type == 'error' else None)
        p.on('pageerror', lambda e: self.errors.append(f'pageerror {e}'))
        p.goto(lab.url(path), wait_until='domcontentloaded', timeout=120_000); self._ready()

    def _ready(self):
        p = self.page; p.wait_for_selector('.jp-Notebook .jp-Cell', timeout=120_000)
        p.wait_for_function('() => window.jupyterapp && window.jupyterapp.commands.hasCommand("notebook:run-all-cells")')
        p.wait_for_function(READY)                                                # else JupyterLab asks for a kernel

    def run(self, until: str='.wb-explorer', seconds: float=300):
        "Run all cells; wait until something is there."
        self.page.evaluate('() => { window.jupyterapp.commands.execute("notebook:run-all-cells") }')
        self.until(lambda: self.tracebacks() or self.page.locator(until).first.is_visible(), f'{until} in the notebook', seconds)
        assert not (said := self.tracebacks()), said[0][-3000:]; return self

    def again(self):
        "Save, and load the page again."
        self.page.evaluate('() => window.jupyterapp.commands.execute("docmanager:save")'); self.page.reload(); self._ready()

    def tracebacks(self) -> list: return self.page.evaluate(ERRORS)
    def part(self, name: str, inside: str=''): return self.page.locator(f'.wb-part-{name} {inside}'.strip()).first
    def figure(self, name: str) -> dict: # title, width, points drawn, traces
        return self.page.locator(f'.wb-part-{name} .js-plotly-plot, .js-plotly-plot.wb-part-{name}').first.evaluate(FIGURE)
    def tiles(self, name: str) -> list: # what a strip shows
        return self.part(name).evaluate(TILES)
    def options(self, name: str) -> list: return [t.replace('\xa0', ' ') for t in self.part(name, 'select').locator('option').all_inner_texts()]
    def text(self, name: str) -> str: return self.part(name).inner_text()

    def point(self, name: str, k: int, trace: int=0):
        "Click the k-th bar of a trace."
        bars = self.part(name, f'.barlayer .trace.bars:nth-child({trace + 1})').locator('.point').nth(k).bounding_box()
        self.page.mouse.click(bars['x'] + bars['width']/2, bars['y'] + bars['height']/2)

    def until(self, true, what: str='', seconds: float=20):
        "Wait for something to become true."
        end = time.perf_counter() + seconds; why = ''
        while time.perf_counter() < end:
            try:
                if true(): return
                why = ''
            except Exception as e: why = repr(e)[:300]                            # the page is being drawn
            self.page.wait_for_timeout(4)
        self.shot('failed'); raise AssertionError(f'{what or "it"} did not come true in {seconds} s {why}')

    def does(self, what: str, act, true):
        "An interaction: act, wait for what must be seen, remember how long it took from the hand's last event (a click, a key, the end of a drag)."
        assert not true(), f'{what}: what it should bring about is there already'
        self.page.evaluate(LISTEN); act(); self.until(true, what); self.times.append((what, self.page.evaluate('performance.now() - window.wbLast')/1000))

    def shot(self, name: str=''):
        SHOTS.mkdir(parents=True, exist_ok=True); self.page.screenshot(path=str(SHOTS/f'{"_".join(filter(None, [self.title, name]))}.png'))

    def shots(self, name: str='', settle: float=.7):
        "The explorer at each width; nothing may stick out."
        for w in WIDTHS:
            self.page.set_viewport_size(dict(width=w, height=2400)); self.page.wait_for_timeout(int(1000*settle))
            self.shot('_'.join(filter(None, [name, str(w)])))
            wide = self.page.evaluate('''() => [...document.querySelectorAll('.wb-explorer')].map(e => [e.scrollWidth, e.clientWidth])''')
            assert all(a <= b + 1 for a, b in wide), f'something sticks out at {w} px: {wide}'
        self.page.set_viewport_size(dict(width=WIDTHS[0], height=2400))

    def close(self, known=()):
        "No error but those of an empty JupyterLab, no request off the machine, no traceback."
        bad = [e for e in self.errors if not any(e[:60] == k[:60] for k in known)]
        tracebacks, outside = self.tracebacks(), sorted(set(self.outside)); self.page.close(); self._keep()
        assert not bad, f'errors in the console: {bad[:5]}'
        assert not outside, f'requests off the machine: {outside[:5]}'
        assert not tracebacks, tracebacks[0][-3000:]

    def _keep(self):
        if not TIMINGS or not self.times: return
        file = Path(TIMINGS); new = not file.exists()
        with file.open('a', newline='') as f:
            rows = csv.writer(f)
            if new: rows.writerow(['explorer', 'interaction', 'milliseconds', 'load', 'date'])     # load: how many processes wanted a core
            rows.writerows([self.title, what, round(1000*s), round(os.getloadavg()[0], 1), time.strftime('%Y-%m-%d')] for what, s in self.times)
