"What a doc-test of the data room cannot hold: damaged files, odd values, hostile ids."
import gzip, io, json, os, random, shutil, tarfile
import numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.data import card, load_dataset, registry
from mmrec_wb.data.amazon import read_meta, read_reviews
from mmrec_wb.data.clean import core, in_order, leave_one_out, popular, sequences, some_users
from mmrec_wb.data.files import open_picture, picture_files, read_log
from mmrec_wb.data.movielens import GENRES
from mmrec_wb.data.recbole import write_recbole
from mmrec_wb.data.tables import read_interactions, read_items, read_tables

GOOD = '{"reviewerID": "A1", "asin": "B1", "unixReviewTime": 1379289600}'

def reviews(path, *lines, end='\n'):
    path.write_bytes(b''.join(l.encode() if isinstance(l, str) else l for l in (x for line in lines for x in (line, end)))); return path

def shop(folder, users=6, items=7, meta=None, seed=None):
    "A little department; `seed` shuffles its lines."
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dict(reviewerID=f'A{u}', asin=f'B{(u*i) % items}', unixReviewTime=86400*(i//3)) for u in range(1, users + 1) for i in range(1, items + 1)]
    if seed is not None: random.Random(seed).shuffle(rows)
    (folder/'reviews_Toys_and_Games_5.json').write_text('\n'.join(map(json.dumps, rows)))
    (folder/'meta_Toys_and_Games.json').write_text('\n'.join(map(repr, meta or [dict(asin=f'B{i}', title=f'item {i}') for i in range(items)])))
    return folder

def error(f, *a, **k):
    with pytest.raises(WorkbenchError) as e: f(*a, **k)
    assert '\n' not in str(e.value)
    return str(e.value)

# ---- reviews ----
@pytest.mark.parametrize('line, said', [
    ('garbage', 'no JSON object'), ('[1, 2]', 'no JSON object'), ('{"reviewerID": "A1"', 'no JSON object'), (GOOD + GOOD, 'no JSON object'),
    ('['*100_000, 'no JSON object'),
    ('{"asin": "B1", "unixReviewTime": 1}', 'no reviewerID'), ('{"reviewerID": "A1", "asin": null, "unixReviewTime": 1}', 'no asin'),
    ('{"reviewerID": "A1"}', 'no asin, unixReviewTime'),
    ('{"reviewerID": "A1", "asin": "", "unixReviewTime": 1}', 'is no id'), ('{"reviewerID": ["A1"], "asin": "B1", "unixReviewTime": 1}', 'is no id'),
    ('{"reviewerID": "A1", "asin": true, "unixReviewTime": 1}', 'is no id'), ('{"reviewerID": "A1", "asin": "a\\u0000b", "unixReviewTime": 1}', 'is no id'),
    ('{"reviewerID": "A1", "asin": "B1", "unixReviewTime": -1}', 'negative'), ('{"reviewerID": "A1", "asin": "B1", "unixReviewTime": "soon"}', 'no time'),
    ('{"reviewerID": "A1", "asin": "B1", "unixReviewTime": 1.5}', 'no time'), ('{"reviewerID": "A1", "asin": "B1", "unixReviewTime": NaN}', 'no time'),
    ('{"reviewerID": "A1", "asin": "B1", "unixReviewTime": true}', 'no time'),
    ('{"reviewerID": "A1", "asin": "B1", "unixReviewTime": 1379289600000}', 'milliseconds'),
    ('{"reviewerID": "A1", "asin": "B1", "unixReviewTime": 1e400}', 'no time'),
    ('{"reviewerID": "A1", "asin": "B1", "unixReviewTime": 99999999999999999999999}', 'milliseconds'),
    (b'{"reviewerID": "A1", "asin": "\xff", "unixReviewTime": 1}', 'no utf-8 text'),
])
def test_a_bad_review_is_named_by_file_and_line(tmp_path, line, said):
    message = error(read_reviews, reviews(tmp_path/'r.json', GOOD, '', line, GOOD))
    assert f'{tmp_path}/r.json:3: ' in message and said in message and len(message) < 500

@pytest.mark.parametrize('line, row', [
    ('{"reviewerID": "A2", "asin": "B1", "unixReviewTime": "12"}', ('A2', 'B1', 12)),
    ('{"reviewerID": "A2", "asin": "B1", "unixReviewTime": 12.0}', ('A2', 'B1', 12)),
    ('{"reviewerID": 5, "asin": 7, "unixReviewTime": 12}', ('5', '7', 12)), ('{"reviewerID": "A2", "asin": " B1 ", "unixReviewTime": 12}', ('A2', 'B1', 12)),
    ('{"reviewerID": "A2", "asin": "B1", "unixReviewTime": 0, "overall": NaN, "helpful": [0, 1]}', ('A2', 'B1', 0)),
    ('{"reviewerID": "\\ud83d", "asin": "B1", "unixReviewTime": 12}', ('?', 'B1', 12)),
    ('{"reviewerID": "Zoë", "asin": "B1", "unixReviewTime": 12}', ('Zoë', 'B1', 12)),
])
def test_odd_but_readable_reviews(tmp_path, line, row):
    assert read_reviews(reviews(tmp_path/'r.json', GOOD, line)).rows() == [('A1', 'B1', 1379289600), row]

def test_packed_plain_misnamed_bom_crlf_are_equal(tmp_path):
    want = read_reviews(reviews(tmp_path/'a.json', GOOD, GOOD))
    body = (tmp_path/'a.json').read_bytes()
    for name, data in {'b.json.gz': gzip.compress(body), 'c.json': gzip.compress(body), 'd.json.gz': body,
            'e.json': b'\xef\xbb\xbf' + body.replace(b'\n', b'\r\n'), 'f[1]*.json': body.strip()}.items():
        (tmp_path/name).write_bytes(data); assert read_reviews(tmp_path/name).equals(want), name

def test_files_that_are_no_reviews(tmp_path):
    (tmp_path/'empty').touch(); assert 'holds no interactions' in error(read_reviews, tmp_path/'empty')
    (tmp_path/'cut.json.gz').write_bytes(gzip.compress(os.urandom(9999).hex().encode())[:-4000])
    assert 'cut off or damaged' in error(read_reviews, tmp_path/'cut.json.gz')
    (tmp_path/'zip.json.gz').write_bytes(b'\x1f\x8bnothing'); assert 'cut off or damaged' in error(read_reviews, tmp_path/'zip.json.gz')
    assert 'cannot be read' in error(read_reviews, tmp_path/'none') and 'cannot be read' in error(read_reviews, tmp_path)

def test_a_failure_of_polars_is_survived(tmp_path):
    def fast(f): raise pl.exceptions.PanicException('as Rust does')
    log = reviews(tmp_path/'x', 'u i 1')
    assert read_log(log, fast, lambda t: (*t.split()[:2], int(t.split()[2]))).rows() == [('u', 'i', 1)]

def test_the_slow_way_reads_what_the_fast_way_reads(tmp_path):
    rows = [dict(reviewerID=f'A{u}', asin=f'B{i}', unixReviewTime=86400*(i % 5)) for u in range(30) for i in range(u % 7, 20)]
    random.Random(0).shuffle(rows); fast = read_reviews(reviews(tmp_path/'a', *map(json.dumps, rows)))
    rows[-1]['unixReviewTime'] = str(rows[-1]['unixReviewTime']); slow = read_reviews(reviews(tmp_path/'b', *map(json.dumps, rows)))
    assert slow.equals(fast) and slow.schema == fast.schema and fast['user'].dtype == pl.Enum

# ---- meta ----
def test_meta_fields_of_any_type(tmp_path):
    rows = ["{'asin': 'B0', 'title': None, 'categories': None, 'description': None}", '{"asin": "B1", "title": NaN, "categories": NaN}',
            "{'asin': 'B2', 'title': 7, 'description': ['one', None, 'two']}",
            "{'asin': 'B3', 'title': {'x': 1}, 'categories': 5}", "{'asin': 'B4', 'title': nan, 'price': null}",
            "{'asin': 'B5', 'title': 'a\\x00b\\ud83d', 'categories': [[], ['Toys', None, 3]]}", "{\"asin\": 'B6'}"]
    (tmp_path/'m').write_text('\n'.join(rows)); meta = {r['raw_id']: r for r in read_meta(tmp_path/'m', {f'B{i}' for i in range(7)}).to_dicts()}
    assert len(meta) == 7 and [meta[f'B{i}']['title'] for i in range(7)] == ['', '', '7', '', '', 'a b?', ''] and meta['B2']['text'] == '7. one two'
    assert meta['B5']['text'] == 'a b?. Toys, 3' and {r['category'] for r in meta.values()} == {'unknown'}

def test_a_title_that_says_asin(tmp_path):
    rows = ["""{"title": "a 'asin': 'zzz' b", "asin": "B1"}""", """{'title': '"asin": "zzz"', 'asin': 'B2'}"""]; (tmp_path/'m').write_text('\n'.join(rows))
    assert set(read_meta(tmp_path/'m', {'B1', 'B2'})['raw_id']) == {'B1', 'B2'} and read_meta(tmp_path/'m', {'B3'}).height == 0

def test_of_several_meta_lines_the_one_that_says_most_counts(tmp_path):
    rows = ["{'asin': 'B1'}", "{'asin': 'B1', 'title': 'Chess', 'description': 'long'}", "{'asin': 'B1', 'title': 'Chess'}", "{'asin': 'B1', 'title': 'Chesz'}"]
    read = []
    for k in range(4): (tmp_path/'m').write_text('\n'.join(rows[k:] + rows[:k])); read.append(read_meta(tmp_path/'m', {'B1'}).rows())
    assert read == [[('B1', 'Chess', 'Chess. long', 'unknown')]]*4

@pytest.mark.parametrize('line, said', [("{'title': 'x'}", 'no asin'), ("{'asin': ''}", 'no asin'), ('x', 'neither'), ("['asin']", 'of a dict'),
        ("{'asin': 'B1', 'title': ", 'neither'),
        ("{'asin': 'B1', 'x': __import__('os').system('touch PWNED')}", 'neither'),
        ("{'asin': 'B1', 'x': " + '('*5000, 'neither'), ("{'asin': 'B1', 'x': 1}; y", 'neither'),
        ("{'asin': 'B1', 'x': nan, []: 1}", 'neither')])
def test_a_bad_meta_line_is_named_and_never_run(tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path); (tmp_path/'m').write_text("{'asin': 'B1'}\n" + line + '\n')
    message = error(read_meta, tmp_path/'m', {'B1'}); assert f'{tmp_path}/m:2: ' in message and said in message
    assert not (tmp_path/'PWNED').exists()

def test_a_meta_file_that_is_cut_off(tmp_path):
    shop(tmp_path); meta = tmp_path/'meta_Toys_and_Games.json'; packed = gzip.compress(meta.read_bytes() + os.urandom(9999).hex().encode()); meta.unlink()
    (tmp_path/'meta_Toys_and_Games.json.gz').write_bytes(packed[:-4000]); before = sorted(tmp_path.iterdir())
    assert 'the gz file is cut off or damaged' in error(load_dataset, 'toys', data_dir=tmp_path) and sorted(tmp_path.iterdir()) == before

def test_reviewed_items_without_meta_stay(tmp_path):
    shop(tmp_path, meta=[dict(asin='B0', title='only')]); data = load_dataset('toys', data_dir=tmp_path)
    assert data.n_items == 7
    assert data.catalogue['title'].to_list() == ['', 'only'] + ['']*6
    assert dict(zip(*card(data)['coverage'][['modality', 'present']]))== dict(text=1, image=0)
    (tmp_path/'meta_Toys_and_Games.json').write_text(''); assert load_dataset('toys', data_dir=tmp_path).n_items == 7

# ---- pictures ----
def test_an_asin_never_becomes_a_path(tmp_path):
    secret = tmp_path/'secret.png'; Image.new('RGB', (4, 4)).save(secret)
    folder = shop(tmp_path/'shop'); (folder/'images').mkdir(); Image.new('RGB', (4, 4)).save(folder/'images'/'B1.JPG', 'JPEG')
    asins = ['../../secret', str(secret.with_suffix('')), '..', '.', '/', 'B1', 'images/B1', 'x'*5000, 'é\u202e']
    (folder/'reviews_Toys_and_Games_5.json').write_text('\n'.join(json.dumps(dict(reviewerID='A1', asin=a, unixReviewTime=i)) for i, a in enumerate(asins)))
    data = load_dataset('toys', data_dir=folder)
    assert data.n_items == len(asins) and data.catalogue.filter(pl.col('image').is_not_null())['raw_id'].to_list() == ['B1']

def test_damaged_and_giant_pictures_are_missing_ones(tmp_path):
    folder = shop(tmp_path); (folder/'images').mkdir(); put = lambda n: folder/'images'/n
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)); noise.save(put('B0.png')); noise.save(put('B1.jpg'))
    put('B1.jpg').write_bytes(put('B1.jpg').read_bytes()[:900]); put('B2.png').write_bytes(b''); put('B3.gif').write_text('<html>not found</html>')
    Image.new('1', (40_000, 40_000)).save(put('B4.png')); Image.new('P', (3, 3)).save(put('B5.gif'))
    put('B6.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')
    os.mkfifo(put('B7.png')); put('B8.png').mkdir()
    data = load_dataset('toys', data_dir=folder); ids = {r: i for i, r in enumerate(data.catalogue['raw_id'])}
    shown = {r for r, i in ids.items() if data.image(i) is not None}
    assert shown == {'B0', 'B5'} and {data.catalogue['raw_id'][i] for i in data.image_problems} == {'B1', 'B2', 'B3', 'B4', 'B6'}
    assert '40000' in data.image_problems[ids['B4']] or 'Bomb' in data.image_problems[ids['B4']]
    assert all(data.image(i).mode == 'RGB' for i in (ids['B0'], ids['B5']))
    put('B0.png').unlink(); assert load_dataset('toys', data_dir=folder).image(ids['B0']) is None and data.image(ids['B0']) is None  # gone while we ran
    assert data.image_problems[ids['B0']].startswith('FileNotFoundError')

@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16'])
def test_every_mode_becomes_rgb(tmp_path, mode):
    name = f'{tmp_path}/a.' + ('jpg' if mode == 'CMYK' else 'png'); Image.new(mode, (5, 4)).save(name); assert open_picture(name).mode == 'RGB'

def test_sixteen_bits_a_pixel(tmp_path):
    "Not clipped: black to white stays a ramp."
    Image.fromarray(np.linspace(0, 65535, 8).astype(np.uint16)[None].repeat(2, 0)).save(tmp_path/'a.png')
    assert np.asarray(open_picture(tmp_path/'a.png'))[0, :, 0].tolist() == [int(x) >> 8 for x in np.linspace(0, 65535, 8)]

def test_a_line_with_a_field_too_many_or_too_few_is_found(tmp_path):
    "Also where the file has columns that nobody reads, and whatever the other lines hold."
    for bad in ('2,i1,Smith, J,x', '2,i1,u2'):
        (tmp_path/'i.csv').write_text(f'timestamp,item,user,note\n1,i1,u1,y\n{bad}\n')
        with pytest.raises(WorkbenchError, match='i.csv:3: [35] fields instead of 4'): read_interactions(tmp_path/'i.csv')
    (tmp_path/'i.csv').write_text('timestamp,item,user,note\n1,i1,u1,\n2,i2,u2,x\n'); assert read_interactions(tmp_path/'i.csv').height == 2

@pytest.mark.parametrize('toml, says', [
    ('["../../escaped"]\nderived = {from = "toys"}', 'is no name'), ('[mine]\nderived = "toys"', 'derived of .mine. is of the wrong type'),
    ('[mine]\nderived = {from = ["toys"]}', 'unknown data set to derive'),
    ('[mine]\nformat = "csv"\nfiles = {interactions = 3, items = "a.csv"}', 'files.interactions of')])
def test_a_registry_from_elsewhere(tmp_path, toml, says):
    (tmp_path/'datasets.toml').write_text(toml)
    with pytest.raises(WorkbenchError, match=says) as e: registry(data_dir=tmp_path)
    assert '\n' not in str(e.value)

def test_what_a_picture_is_tells_its_content_not_its_name(tmp_path):
    folder = shop(tmp_path); (folder/'images').mkdir(); Image.new('RGB', (5, 4), 'red').save(folder/'images'/'B1.jpg', 'PNG')
    Image.new('L', (5, 4), 128).save(folder/'images'/'B2.jpg'); Image.new('CMYK', (5, 4)).save(folder/'images'/'B3.jpg')
    data = load_dataset('toys', data_dir=folder); ids = {r: i for i, r in enumerate(data.catalogue['raw_id'])}
    assert data.image(ids['B1']).getpixel((0, 0)) == (255, 0, 0) and data.image(ids['B2']).getpixel((0, 0)) == (128, 128, 128)
    assert data.image(ids['B3']).getpixel((0, 0)) == (255, 255, 255) and not data.image_problems      # no ink is white

def test_the_first_suffix_wins(tmp_path):
    for n in ('a.png', 'a.JPG', 'b.webp', '.jpg', 'c.txt', 'd.tar.png'): (tmp_path/n).touch()
    assert {k: os.path.basename(v) for k, v in picture_files(tmp_path).items()} == {'a': 'a.JPG', 'b': 'b.webp', 'd.tar': 'd.tar.png'}

# ---- MovieLens ----
def films(folder, posters=True):
    folder.mkdir(exist_ok=True); flags = '|'.join('1' if g == 'War' else '0' for g in GENRES)
    (folder/'u.data').write_text(''.join(f'{u}\t{i}\t3\t{100*i}\n' for u in (1, 2, 10) for i in (1, 2, 3, 10)))
    (folder/'u.item').write_text(''.join(f'{i}|Él {i} (1994)|01-Jan-1994||http://x|{flags}\n' for i in (1, 2, 10)), encoding='latin-1')
    if posters:
        Image.new('RGB', (4, 6), 'red').save(jpg := io.BytesIO(), 'JPEG')
        with tarfile.open(folder/'posters_92px.tar', 'w') as tar:
            for n, data in {'posters/1.jpg': jpg.getvalue(), '../2.jpg': jpg.getvalue(), 'posters/../3.jpg': jpg.getvalue(),
                    'posters/10.jpg': b'broken'}.items():
                info = tarfile.TarInfo(n); info.size = len(data); tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo('posters/2.jpg'); link.type = tarfile.SYMTYPE; link.linkname = '/etc/passwd'; tar.addfile(link)
    return folder

def test_movielens_with_and_without_extras(tmp_path):
    bare = load_dataset('ml-100k', data_dir=films(tmp_path, posters=False))
    assert (bare.n_users, bare.n_items, len(bare.items)) == (3, 4, 12)
    assert bare.users == ['1', '2', '10']
    assert bare.catalogue['raw_id'].to_list() == ['', '1', '2', '3', '10']
    assert bare.catalogue['title'].to_list() == ['', 'Él 1 (1994)', 'Él 2 (1994)', '', 'Él 10 (1994)']
    assert bare.catalogue['category'][1] == 'War'
    assert card(bare)['coverage']['present'].to_list() == [3, 0]
    (tmp_path/'u.data.gz').write_bytes(gzip.compress((tmp_path/'u.data').read_bytes())); (tmp_path/'u.data').unlink()
    assert load_dataset('ml-100k', data_dir=tmp_path).fingerprint == bare.fingerprint
    films(tmp_path)
    (tmp_path/'items.jsonl').write_text('{"item_id": "2", "omdb": {"Plot": "N/A"}}\n'
                                        '{"item_id": 1, "omdb": {"Plot": "A war."}}\n{"item_id": 99, "omdb": {"Plot": "x"}}')
    data = load_dataset('ml-100k', data_dir=tmp_path); assert data.catalogue['text'][1] == 'Él 1 (1994). War. A war.' and data.fingerprint != bare.fingerprint
    assert data.catalogue['image'].is_not_null().to_list() == [False, True, False, False, True]
    assert data.image(1).size == (4, 6)
    assert data.image(4) is None
    assert list(data.image_problems) == [4]
    (tmp_path/'posters_92px.tar').unlink(); (tmp_path/'posters').mkdir(); Image.new('RGB', (2, 2)).save(tmp_path/'posters'/'10.jpg')
    assert load_dataset('ml-100k', data_dir=tmp_path).image(4).size == (2, 2)

def test_a_tar_that_is_cut_off(tmp_path):
    films(tmp_path); tar = tmp_path/'posters_92px.tar'; tar.write_bytes(tar.read_bytes()[:600])
    try: data = load_dataset('ml-100k', data_dir=tmp_path)
    except WorkbenchError as e: assert 'no whole tar' in str(e)
    else: assert data.image(1) is None and 'cut off' in data.image_problems[1]

@pytest.mark.parametrize('line, said', [('1\t2\t3', '3 fields'), ('1\tx\t3\t4', 'is no number'), ('1\t2\t3\t-4', 'negative'),
        ('1,2,3,4', '1 fields'), ('1\t2\t3\t4\t5', '5 fields')])
def test_a_bad_rating_is_named(tmp_path, line, said):
    films(tmp_path); (tmp_path/'u.data').write_text(f'1\t2\t3\t4\n{line}\n'); message = error(load_dataset, 'ml-100k', data_dir=tmp_path)
    assert f'{tmp_path}/u.data:2: ' in message and said in message

# ---- the other MovieLens layouts ----
def other_films(folder, layout):
    "Three users, four films, one of them without an entry; the folder is made."
    folder.mkdir(parents=True, exist_ok=True); rows = [(u, i, 3.5 if layout == 'csv' else 3, 100*i) for u in (1, 2, 10) for i in (1, 2, 3, 10)]
    if layout == '1m':
        (folder/'ratings.dat').write_text(''.join('::'.join(map(str, r)) + '\n' for r in rows))
        (folder/'movies.dat').write_text(''.join(f'{i}::Él {i}, The (1994)::War|Drama\n' for i in (1, 2, 10)), encoding='latin-1')
    else:
        (folder/'ratings.csv').write_text('userId,movieId,rating,timestamp\r\n' + ''.join(','.join(map(str, r)) + '\r\n' for r in rows))
        films = ''.join(f'{i},"Él {i}, The (1994)",{"War|Drama" if i < 10 else "(no genres listed)"}\n' for i in (1, 2, 10))
        (folder/'movies.csv').write_text('movieId,title,genres\n' + films, encoding='utf-8')
    return folder

@pytest.mark.parametrize('name, layout', [('ml-1m', '1m'), ('ml-latest-small', 'csv')])
def test_other_movielens_with_and_without_posters(tmp_path, name, layout):
    bare = load_dataset(name, data_dir=other_films(tmp_path, layout)); assert (bare.n_users, bare.n_items, len(bare.items)) == (3, 4, 12)
    assert bare.catalogue['raw_id'].to_list() == ['', '1', '2', '3', '10']
    assert bare.catalogue['title'].to_list() == ['', 'Él 1, The (1994)', 'Él 2, The (1994)', '', 'Él 10, The (1994)']
    assert bare.catalogue['text'][1] == 'Él 1, The (1994). War, Drama'
    assert bare.catalogue['category'].to_list() == ['', 'War', 'War', 'unknown', 'War' if layout == '1m' else 'unknown']
    (tmp_path/'posters').mkdir(); Image.new('RGB', (4, 6), 'red').save(tmp_path/'posters'/'10.jpg')
    data = load_dataset(name, data_dir=tmp_path); assert data.image(4).size == (4, 6) and data.image(1) is None and data.fingerprint != bare.fingerprint
    for f in [*tmp_path.glob('*.dat'), *tmp_path.glob('*.csv')]: f.with_name(f.name + '.gz').write_bytes(gzip.compress(f.read_bytes())); f.unlink()
    assert load_dataset(name, data_dir=tmp_path).fingerprint == data.fingerprint

@pytest.mark.parametrize('name, layout, file, line, said', [
    ('ml-1m', '1m', 'ratings.dat', '1::2::3', '3 fields'),
    ('ml-1m', '1m', 'ratings.dat', '1:2:3:4', '1 fields'),
    ('ml-1m', '1m', 'ratings.dat', '1::x::3::4', 'no number'),
    ('ml-1m', '1m', 'ratings.dat', '1:9:2::3::4', '3 fields'),
    ('ml-1m', '1m', 'ratings.dat', '1::2::3::-4', 'negative'),
    ('ml-1m', '1m', 'movies.dat', '7::Go', '2 fields'),
    ('ml-1m', '1m', 'movies.dat', 'x::Go::War', 'no number'),
    ('ml-latest-small', 'csv', 'ratings.csv', '1,2,3', '3 fields instead of 4'), ('ml-latest-small', 'csv', 'ratings.csv', '1,tt2,3,4', 'no number'),
    ('ml-latest-small', 'csv', 'ratings.csv', '1,2,3.5,soon', 'no time'),
    ('ml-latest-small', 'csv', 'movies.csv', '7,Go, the game,War', '4 fields instead of 3')])
def test_a_bad_line_of_other_movielens_is_named(tmp_path, name, layout, file, line, said):
    other_films(tmp_path, layout); path = tmp_path/file; end = len(path.read_bytes().splitlines()) + 1
    with open(path, 'a', newline='') as f: f.write(line + '\n')
    message = error(load_dataset, name, data_dir=tmp_path); assert f'{path}:{end}: ' in message and said in message

# ---- a data set of your own ----
MINE = {'interactions.csv': 'user,item,timestamp\n' + ''.join(f'u{u},i{i},{100*i}\n' for u in range(4) for i in range(5)),
        'items.csv': 'item,title,category\n' + ''.join(f'i{i},item {i},c\n' for i in range(5))}

@pytest.fixture
def mine(tmp_path, monkeypatch):
    "A registry with a set of one's own, and its folder."
    (tmp_path/'data').mkdir(); folder = tmp_path/'mine'; folder.mkdir()
    entry = '[mine]\ntitle = "Our shop"\nformat = "csv"\nfiles = { interactions = "interactions.csv", items = "items.csv" }\nwhere = "the till"\n'
    (tmp_path/'data'/'datasets.toml').write_text(entry); monkeypatch.setattr('mmrec_wb.data.project_root', lambda: tmp_path)
    for name, text in MINE.items(): (folder/name).write_text(text)
    return folder

def test_five_lines_make_a_data_set(mine):
    (mine/'images').mkdir(); Image.new('RGB', (4, 4), 'red').save(mine/'images'/'i2.jpg'); Image.new('RGB', (4, 4)).save(mine/'images'/'i9.jpg')
    data = load_dataset('mine', data_dir=mine.parent); assert (data.n_users, data.n_items, data.title) == (4, 5, 'mine')
    assert data.catalogue['text'][1] == 'item 0. c' and data.image(3).size == (4, 4) and data.image(1) is None
    order = {'interactions.csv': 'stars,timestamp,item,user\n' + ''.join(f'5,{100*i},i{i},"u{u}"\n' for i in range(5) for u in range(4)),
             'items.csv': '\ufeffcategory,title,item\r\n' + ''.join(f'c,"item\n{i}",i{i}\r\n' for i in range(6))}
    for name, text in order.items(): (mine/name).write_bytes(gzip.compress(text.encode()))    # columns, rows, quotes, line ends, packing: the same data
    assert load_dataset('mine', data_dir=mine.parent).fingerprint == data.fingerprint

@pytest.mark.parametrize('file, text, line, said', [
    ('interactions.csv', 'user;item;timestamp\nu;i1;1\n', 1, 'the first line must name user, item, timestamp'),
    ('interactions.csv', 'u0,i0,100\n', 1, "no column 'user'"),
    ('interactions.csv', '', 1, "no column 'user'"), ('interactions.csv', 'user,item,timestamp,user\n', 1, "two columns 'user'"),
    ('interactions.csv', 'user,item,timestamp\nu,i1,1\nu,i2\n', 3, '2 fields instead of 3'),
    ('interactions.csv', 'user,item,timestamp\nu,i1,1\nu,i2,2,9\n', 3, '4 fields instead of 3'),
    ('interactions.csv', 'user,item,timestamp\nu,i1,1\nu,i2,2014-05-01\n', 3, 'no time'),
    ('interactions.csv', 'user,item,timestamp\nu,i1,1\nu,i2,\n', 3, 'no time'),
    ('interactions.csv', 'user,item,timestamp\nu,i1,1\nu,i2,1400000000000\n', 3, 'milliseconds'),
    ('interactions.csv', 'user,item,timestamp\nu,i1,1\n,i2,2\n', 3, 'no id'),
    ('interactions.csv', 'user,item,timestamp\nu,i1,1\n"u,i2,2\nu,i3,3\n', 3, 'no csv'),
    ('interactions.csv', 'user,item,timestamp\nu,i1,1\nu,"i2"x,2\n', 3, 'no csv'),
    ('interactions.csv', 'user,item,timestamp\nu,i1,1\nu,nowhere,2\nv,nowhere,2\n', 3, "'nowhere' is not in"),
    ('interactions.csv', b'user,item,timestamp\n\xff,i1,1\n', 2, 'no utf-8'),
    ('items.csv', 'id,title\n', 1, "no column 'item'"),
    ('items.csv', 'item,title\ni0,a\ni0,b\n', 3, 'second time'),
    ('items.csv', 'item,title\ni0,a\n,b\n', 3, 'no id'),
    ('items.csv', 'item,title\ni0,a,b\n', 2, '3 fields instead of 2')])
def test_a_bad_line_of_your_own_is_named(mine, file, text, line, said):
    (mine/file).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = error(load_dataset, 'mine', data_dir=mine.parent); assert f'{mine/file}:{line}: ' in message and said in message and len(message) < 400
    assert sorted(p.name for p in mine.iterdir()) == ['interactions.csv', 'items.csv']

def test_a_csv_that_is_cut_off(mine):
    (mine/'interactions.csv.gz').write_bytes(gzip.compress(os.urandom(9999).hex().encode())[:-4000]); (mine/'interactions.csv').unlink()
    assert 'cut off or damaged' in error(load_dataset, 'mine', data_dir=mine.parent)

# ---- RecBole ----
def test_recbole_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    data = load_dataset('toys', data_dir=shop(tmp_path/'shop')); folder = write_recbole(data, tmp_path/'dataset'/'toys')
    assert (folder/'toys.inter').read_text().splitlines()[:2] == ['user_id:token\titem_id:token\ttimestamp:float', 'A1\tB1\t0']
    assert (folder/'toys.item').read_text().splitlines()[:2] == ['item_id:token\ttitle:token_seq\tcategory:token', 'B0\titem 0\tunknown']
    before = (folder/'toys.inter').read_bytes()
    assert 'is there already' in error(write_recbole, data, folder) and (folder/'toys.inter').read_bytes() == before
    def breaks(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(pl.DataFrame, 'write_csv', breaks); assert 'No space left' in error(write_recbole, data, tmp_path/'full'/'toys')
    assert not (tmp_path/'full'/'toys').exists() and not list((tmp_path/'full').glob('*.tmp'))
    data.users[0] = 'A\t1'; assert 'cannot be written for RecBole' in error(write_recbole, data, tmp_path/'other') and not (tmp_path/'other').exists()
    (tmp_path/'file').touch(); data.users[0] = 'A1'; error(write_recbole, data, tmp_path/'file'/'toys')

# ---- cleaning ----
LOGS = st.lists(st.tuples(st.sampled_from('pqrst'), st.sampled_from(['2', '10', 'a', 'b', 'é', 'z']), st.integers(0, 4)), min_size=1, max_size=40)
frame = lambda rows: pl.DataFrame(rows, schema=['user', 'item', 'timestamp'], orient='row')

@settings(max_examples=60, deadline=None)
@given(LOGS, st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 4))
def test_cleaning_is_what_a_plain_program_does(rows, random, k_user, k_item):
    first = {}
    for u, i, t in rows: first[u, i] = min(t, first.get((u, i), 99))
    want = sorted((u, t, i) for (u, i), t in first.items())
    shuffled = rows[:]; random.shuffle(shuffled); log = in_order(frame(shuffled))
    assert log.select('user', 'timestamp', 'item').rows() == want
    while True:
        less = [r for r in want if sum(r[0] == q[0] for q in want) >= k_user and sum(r[2] == q[2] for q in want) >= k_item]
        if less == want: break
        want = less
    kept = core(log, k_user, k_item); assert kept.select('user', 'timestamp', 'item').rows() == want
    if want:
        s = sequences(kept); assert s.offsets[-1] == len(want) == len(s.items) and s.items.min() == 1 and s.items.max() == len(s.raw_items)
        assert [(s.users[u], int(s.times[n]), s.raw_items[int(s.items[n]) - 1]) for u in range(len(s.users)) for n in range(s.offsets[u],
                s.offsets[u + 1])] == want

@settings(max_examples=60, deadline=None)
@given(LOGS, st.randoms(use_true_random=False), st.integers(3, 4), st.integers(1, 3), st.booleans())
def test_no_history_knows_the_future(rows, random, k_user, k_item, numbers):
    log = frame(rows)
    if numbers: log = log.with_columns(pl.col('item').replace_strict({k: n for n, k in enumerate('z a 2 b 10 é'.split())}, return_dtype=pl.Int64))
    kept = core(in_order(log), k_user, k_item)
    if kept.is_empty(): return
    s = sequences(kept); raw = s.raw_items.to_list(); train, valid, test = (leave_one_out(n, s.offsets, s.items, s.times) for n in ('train', 'valid', 'test'))
    assert sorted(set(s.items.tolist())) == list(range(1, len(raw) + 1)) and raw == sorted(raw) and s.users == sorted(s.users)       # dense, from 1, in order
    assert np.diff(s.offsets).min() >= k_user and np.bincount(s.items)[1:].min() >= k_item                                       # the core holds
    for part in (valid, test):
        for u in range(len(part)):
            history = list(zip(*(x.tolist() for x in part.history(u)))); target = (int(part.target_times[u]), raw[part.targets[u] - 1])
            assert history and all((t, raw[i - 1]) < target for i, t in history) and part.targets[u] not in [i for i, _ in history]
    for u in range(len(train)):
        assert not {int(valid.targets[u]), int(test.targets[u])} & set(train.history(u)[0].tolist()) and int(valid.targets[u]) in test.history(u)[0]
    order = list(range(log.height)); random.shuffle(order); again = sequences(core(in_order(log[order]), k_user, k_item))
    assert again.users == s.users and again.raw_items.equals(s.raw_items)
    assert all(np.array_equal(getattr(again, a), getattr(s, a)) for a in ('offsets', 'items', 'times'))

@settings(max_examples=30, deadline=None)
@given(LOGS, st.integers(1, 7))
def test_ids_as_enum_change_nothing(rows, n):
    log = frame(rows); coded = log.with_columns(pl.col(c).cast(pl.Enum(log[c].unique().sort())) for c in ('user', 'item'))
    for f in (in_order, lambda l: core(in_order(l), 2, 2), lambda l: some_users(in_order(l), n)): assert f(coded).rows() == f(log).rows()
    assert popular(coded, n).cast(pl.String).equals(popular(log, n))
    a, b = sequences(in_order(coded)), sequences(in_order(log))
    assert a.users == b.users and a.raw_items.equals(b.raw_items) and (a.items == b.items).all() and (a.offsets == b.offsets).all()

def test_the_most_popular_items(tmp_path):
    rows = [('u', 'x', 1), ('u', 'x', 2), ('u', 'y', 3), ('v', 'y', 1), ('v', 'z', 2)]
    assert popular(frame(rows), 2).to_list() == ['y', 'x'] and popular(frame(rows[::-1]), 2).to_list() == ['y', 'z']   # of equals the one named first
    data = load_dataset('toys', data_dir=shop(tmp_path), top_items=5); assert data.n_items == 5 and data.dropped['items'] == 2
    assert load_dataset('toys1k', data_dir=tmp_path).dropped['items'] == 0                          # its files are those of toys
    assert load_dataset('toys1k', data_dir=tmp_path, top_items=5).fingerprint == data.fingerprint
    assert 'nothing is left' in error(load_dataset, 'toys1k', data_dir=tmp_path, top_items=4)         # min_length is 5 there
    assert 'no planted stand-in' in error(load_dataset, 'toys1k', source='planted')
    assert 'not found' in error(load_dataset, 'toys1k', data_dir=tmp_path/'nowhere')
    assert 'too small' in error(load_dataset, 'toys', data_dir=tmp_path, top_items=-1) and load_dataset('toys', data_dir=tmp_path, top_items=0).n_items == 7

def test_every_interaction_is_in_exactly_one_part(tmp_path):
    data = load_dataset('toys', data_dir=shop(tmp_path, users=4, items=5))
    for u in range(data.n_users):
        items, times = data.sequence(u)
        assert [*data.train.history(u)[0], data.valid.targets[u], data.test.targets[u]] == items.tolist()
        assert [*data.valid.history(u)[0], data.valid.targets[u]] == data.test.history(u)[0].tolist()
        assert (np.diff(times) >= 0).all() and data.test.target_times[u] == times[-1]
    assert (data.counts() == np.bincount(np.concatenate([data.train.history(u)[0] for u in range(data.n_users)]), minlength=data.n_items + 1)).all()

def test_line_order_packing_and_folder_change_nothing(tmp_path):
    a = load_dataset('toys', data_dir=shop(tmp_path/'a')); b = load_dataset('toys', data_dir=shop(tmp_path/'b', seed=3))
    for f in (tmp_path/'b').glob('*.json'): f.with_name(f.name + '.gz').write_bytes(gzip.compress(f.read_bytes())); f.unlink()
    c = load_dataset('toys', data_dir=tmp_path/'b')
    assert a.fingerprint == b.fingerprint == c.fingerprint and (a.items == b.items).all() and (a.times == c.times).all()

def test_the_fingerprint_sees_every_change(tmp_path):
    def load(change=None, **how):
        folder = tmp_path/'x'; shutil.rmtree(folder, ignore_errors=True); shop(folder); (folder/'images').mkdir()
        Image.new('RGB', (4, 4), 'red').save(folder/'images'/'B1.png')
        if change: change(folder)
        return load_dataset('toys', data_dir=folder, **how).fingerprint
    edit = lambda name, a, b: lambda d: (d/name).write_text((d/name).read_text().replace(a, b, 1))
    prints = [load(), load(edit('reviews_Toys_and_Games_5.json', '"unixReviewTime": 0', '"unixReviewTime": 9')),
        load(edit('meta_Toys_and_Games.json', 'item 2', 'item 2!')),
        load(edit('reviews_Toys_and_Games_5.json', '"A1"', '"A9"')), load(lambda d: Image.new('RGB', (4, 4), 'blue').save(d/'images'/'B1.png')),
        load(lambda d: (d/'images'/'B1.png').unlink()),
        load(max_users=3), load(min_length=8 - 1, max_users=4)]
    assert len(set(prints)) == len(prints) and load() == prints[0]
    assert load(lambda d: (d/'images'/'B1.png').rename(d/'images'/'B9.png')) == load(pictures=False)

# ---- where the files are ----
def test_lookup_and_auto(tmp_path, monkeypatch, capsys):
    shop(tmp_path/'other'/'deep')
    assert 'not found' in error(load_dataset, 'toys', data_dir=tmp_path) # two folders down is too deep
    assert load_dataset('toys', data_dir=tmp_path/'other').source == 'raw'
    monkeypatch.setenv('MMREC_DATA', str(tmp_path/'other')); assert load_dataset('toys').source == 'raw' and load_dataset('toys', data_dir='').source == 'raw'
    monkeypatch.setenv('MMREC_DATA', str(tmp_path/'nowhere'))
    for source in ('auto', 'raw'):      # somebody named a folder: no stand-in
        said = error(load_dataset, 'toys', source=source)
        assert all(x in said for x in ('reviews_Toys_and_Games_5.json.gz and meta_Toys_and_Games.json.gz', str(tmp_path/'nowhere'), 'no such folder',
                'index_2014.html', 'source=planted')), said
    monkeypatch.delenv('MMREC_DATA'); monkeypatch.setattr('mmrec_wb.data.resolve', lambda p: tmp_path/'empty')
    assert 'u.data and u.item not found' in error(load_dataset, 'ml-100k') and 'dataset=toys' in error(load_dataset, 'ml-100k') # auto plants toys only
    assert 'not found' in error(load_dataset, 'toys', source='raw')
    monkeypatch.setattr('mmrec_wb.data.planted.planted_dir', lambda **how: shop(tmp_path/'planted'))
    data = load_dataset('toys')
    assert data.source == 'planted' and data.title == 'toys (planted)' and 'PLANTED' in capsys.readouterr().out and data.truth == {}
    assert load_dataset('toys', source='planted', data_dir=tmp_path/'other').source == 'planted' # data_dir does not matter then
    assert sorted(p.name for p in tmp_path.iterdir()) == ['other', 'planted']

def test_mistakes_write_nothing(tmp_path, monkeypatch):
    made = []; monkeypatch.setattr('mmrec_wb.data.planted.planted_dir', lambda **how: made.append(how))
    for how, said in [(dict(name='toyz'), 'did you mean toys'), (dict(name='ml100k'), 'did you mean ml-100k'), (dict(name=None), 'unknown data set'),
        (dict(source='real'), 'unknown source'),
        (dict(max_users='many'), 'no whole number'), (dict(max_users=2.5), 'no whole number'), (dict(max_users=True), 'no whole number'),
        (dict(k_core=-1), 'too small'),
        (dict(pictures=1), 'no truth value'), (dict(planted_sed=1), 'did you mean planted_seed')]:
        assert said in error(load_dataset, **{**dict(name='toys', source='planted'), **how})
    assert not made
