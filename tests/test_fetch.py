"Downloads from a server on this machine that breaks off, knows no Range, lies, or sends us elsewhere."
import hashlib, http.server, io, re, shutil, threading, zipfile
from pathlib import Path
import pytest
import mmrec_wb.data.fetch as fetching
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.data import registry
from mmrec_wb.data.fetch import download, fetch
from mmrec_wb.training.cli import main

def zipped(**files):
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w') as z:
        for name, text in files.items(): z.writestr(name, text)
    return b.getvalue()
BODY = zipped(**{'ml-100k/u.data': bytes(range(256))*8000, 'ml-100k/u.item': '1|Toy Story\n', 'ml-100k/../../evil': 'no', 'ml-100k/README': 'terms'})
SHA = hashlib.sha256(BODY).hexdigest()

class Server(http.server.ThreadingHTTPServer):
    "`how`: ranges (does it know Range?), breaks (bytes after which each of the next answers ends), body, status, to (redirect)."
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Answer); self.how, self.asked = {}, []; threading.Thread(target=self.serve_forever, daemon=True).start()
    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}/x.zip'

class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        how = self.server.how; body = how.get('body', BODY); said = self.headers.get('Range'); self.server.asked.append(said)
        if 'to' in how: self.send_response(302); self.send_header('Location', how['to']); self.end_headers(); return
        if how.get('status'): self.send_response(how['status'].pop(0) if len(how['status']) > 1 else how['status'][0]); self.end_headers(); return
        start = int(re.match(r'bytes=(\d+)-', said)[1]) if said and how.get('ranges', True) else 0
        if start >= len(body): self.send_response(416); self.end_headers(); return
        self.send_response(206 if start else 200); self.send_header('Content-Length', str(len(body) - start))
        if start: self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        self.end_headers(); n = how['breaks'].pop(0) if how.get('breaks') else len(body)
        self.wfile.write(body[start:start + n])

@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetching, 'TIMEOUT', 5); monkeypatch.setattr(fetching, 'TRIES', 2); monkeypatch.setattr(fetching, 'CHUNK', 1 << 14)
    s = Server(); yield s; s.shutdown(); s.server_close()

def get(server, to, sha=SHA, size=len(BODY)): return download(server.url, to, sha, size, progress=False)
def left(folder): return sorted(p.name for p in folder.iterdir())

def test_whole_and_again(server, tmp_path):
    assert get(server, tmp_path/'a'/'x.zip').read_bytes() == BODY and left(tmp_path/'a') == ['x.zip'] and server.asked == [None]
    get(server, tmp_path/'a'/'x.zip'); assert len(server.asked) == 1                                      # it is there already

def test_broken_lines_are_gone_on_with(server, tmp_path):
    server.how = dict(breaks=[100_000, 300_000]); assert get(server, tmp_path/'x.zip').read_bytes() == BODY
    assert server.asked[0] is None and [int(a[6:-1]) for a in server.asked[1:]] == [100_000, 400_000] and left(tmp_path) == ['x.zip']

def test_a_second_call_goes_on(server, tmp_path):
    server.how = dict(breaks=[100_000, 0, 0, 0, 0])
    with pytest.raises(WorkbenchError, match='100,000 of .* are kept'): get(server, tmp_path/'x.zip')
    assert left(tmp_path) == ['x.zip.part']; server.how = {}; server.asked.clear()
    assert get(server, tmp_path/'x.zip').read_bytes() == BODY and server.asked == ['bytes=100000-']

def test_no_range(server, tmp_path):
    server.how = dict(ranges=False, breaks=[100_000]); assert get(server, tmp_path/'x.zip').read_bytes() == BODY and len(server.asked) == 2

def test_a_wrong_beginning_is_thrown_away(server, tmp_path):
    (tmp_path/'x.zip.part').write_bytes(b'old'*1000)
    assert get(server, tmp_path/'x.zip').read_bytes() == BODY and server.asked == ['bytes=3000-', None]
    (tmp_path/'y.zip.part').write_bytes(b'?'*(len(BODY) + 5)); assert get(server, tmp_path/'y.zip').read_bytes() == BODY   # longer than it can be

def test_wrong_checksum(server, tmp_path):
    with pytest.raises(WorkbenchError, match='is not the file'): get(server, tmp_path/'x.zip', sha='0'*64)
    server.how = dict(body=BODY[:-10])
    with pytest.raises(WorkbenchError, match='sends fewer than'): get(server, tmp_path/'x.zip')
    shutil.rmtree(tmp_path); server.how = dict(body=BODY + b'more')
    with pytest.raises(WorkbenchError, match='sends more than'): get(server, tmp_path/'x.zip')
    assert left(tmp_path) == []

def test_answers_that_say_no(server, tmp_path):
    server.how = dict(status=[404])
    with pytest.raises(WorkbenchError, match='answers 404'): get(server, tmp_path/'x.zip')
    server.how = dict(status=[503])
    with pytest.raises(WorkbenchError, match='it answers 503'): get(server, tmp_path/'x.zip')

@pytest.mark.parametrize('to', ['http://example.org/x.zip', 'ftp://127.0.0.1/x', 'file:///etc/passwd'])
def test_it_is_not_led_elsewhere(server, tmp_path, to):
    server.how = dict(to=to)
    with pytest.raises(WorkbenchError, match='no https address|answers 302'): get(server, tmp_path/'x.zip')
    assert left(tmp_path) == []

def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, 'TRIES', 2)
    with pytest.raises(WorkbenchError, match='no-such-host.invalid cannot be reached .*check the network'):
        download('https://no-such-host.invalid/x.zip', tmp_path/'x.zip', SHA, 10, progress=False)

def test_a_full_disk(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(WorkbenchError, match='0 MB left'): get(server, tmp_path/'x.zip')
    monkeypatch.undo(); opened = open
    class Full(io.FileIO):
        def write(self, b): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(fetching, 'open', lambda p, mode='r': Full(p, mode) if 'b' in mode and mode[0] in 'wa' else opened(p, mode), raising=False)
    with pytest.raises(WorkbenchError, match='No space left'): get(server, tmp_path/'x.zip')

# --- a data set

@pytest.fixture
def known(server): return dict(registry(), **{'ml-100k': registry()['ml-100k'] | dict(archive=dict(url=server.url, sha256=SHA, size=len(BODY)))})

def test_a_data_set(server, known, tmp_path, capsys):
    found = fetch('ml-100k', tmp_path/'raw', known, progress=False); place = tmp_path/'raw'/'ml-100k'
    assert set(found.values()) == {place/'u.data', place/'u.item'} and left(place) == ['u.data',
        'u.item'] and left(tmp_path) == ['raw']   # nothing else, nowhere else
    assert 'not to be redistributed' in capsys.readouterr().out
    fetch('ml-100k', tmp_path/'raw', known, progress=False); assert len(server.asked) == 1

def test_an_archive_that_is_not_what_it_should_be(server, known, tmp_path):
    for body, says in ((zipped(x='y'), 'has no u.data'), (b'PK nothing', 'cannot be unpacked')):
        server.how = dict(body=body); known['ml-100k']['archive'].update(sha256=hashlib.sha256(body).hexdigest(), size=len(body))
        with pytest.raises(WorkbenchError, match=says): fetch('ml-100k', tmp_path, known, progress=False)
        shutil.rmtree(tmp_path/'ml-100k')

@pytest.mark.parametrize('name', ['toys', 'toys1k', 'games', 'ml-latest-small'])
def test_by_hand(name, tmp_path, capsys):
    assert main(['fetch', name, '--data-dir', str(tmp_path)]) == 1; said = capsys.readouterr().out
    assert 'By hand: get ' in said and 'Licence: ' in said and f'{tmp_path}/{"toys" if name == "toys1k" else name}' in said and left(tmp_path) == []

def test_files_that_are_there_are_not_fetched(tmp_path, capsys):
    for n in ('u.data', 'u.item'): (tmp_path/n).touch()
    assert main(['fetch', 'ml-100k', '--data-dir', str(tmp_path)]) == 0 and 'u.item' in capsys.readouterr().out
    assert main(['fetch', 'ml-100', '--data-dir', str(tmp_path)]) == 2 and 'did you mean ml-100k' in capsys.readouterr().err
    (tmp_path/'file').touch(); assert main(['fetch', 'ml-1m', '--data-dir', str(tmp_path/'file')]) == 2
