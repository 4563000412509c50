"The readers on real files: MMREC_DATA=<folder that holds amazon-2014/ and ml-100k/> pytest tests/test_real_data.py"
import os, time
from pathlib import Path
import numpy as np, polars as pl, pytest
from mmrec_wb.core.paths import resolve
from mmrec_wb.data import card, load_dataset
from mmrec_wb.data.amazon import read_amazon
from mmrec_wb.data.recbole import write_recbole

DATA = os.environ.get('MMREC_DATA')
pytestmark = [pytest.mark.real, pytest.mark.skipif(not DATA, reason='MMREC_DATA names no folder with the real files (see data/README.md)')]

def shape(data): return data.n_users, data.n_items, len(data.items)

def test_toys():
    start = time.perf_counter(); data = load_dataset('toys', source='raw'); seconds = time.perf_counter() - start
    assert shape(data) == (19_412, 11_924, 167_597) and data.dropped == dict(duplicates=0, users=0, items=0) and data.title == 'toys'
    assert np.diff(data.offsets).min() == 5 and data.counts()[1:].sum() == 167_597 - 2*19_412 and seconds < 20  # about 1 s; a shared machine may be slow
    facts = card(data); assert dict(facts['counts'].rows())['same_time_pairs'] == pytest.approx(.47, abs=.01)
    assert facts['coverage'].rows() == [('text', 11_924, 11_924, 1.), ('image', 0, 11_924, 0.)] and data.image(1) is None and not data.image_problems
    assert shape(load_dataset('toys', source='raw', k_core=5)) == shape(data)          # it is a 5-core already

def test_toys1k():
    data = load_dataset('toys1k', source='raw'); assert shape(data) == (2_888, 997, 25_406)
    assert np.diff(data.offsets).min() == 5 and np.bincount(data.items)[1:].min() >= 2
    assert shape(load_dataset('toys1k', source='raw', k_core=0)) == (2_889, 998, 25_411)  # one item is left with one review; its user then has four

@pytest.mark.parametrize('name', ['toys1k', 'ml-100k'])
def test_recbole_sees_the_same_targets(tmp_path, name):
    "As RecBole does it: float32 times, a stable sort by them, then by user."
    data = load_dataset(name, source='raw'); folder = write_recbole(data, tmp_path/name)
    inter = pl.read_csv(folder/f'{name}.inter', separator='\t', schema_overrides={c: pl.String for c in ('user_id:token', 'item_id:token')})
    assert inter.height == len(data.items) and np.spacing(inter['timestamp:float'].to_numpy().astype(np.float32).max()) > 1           # what float32 forgets
    inter = inter[np.argsort(inter['timestamp:float'].to_numpy().astype(np.float32), kind='stable')]
    seen = dict(inter.group_by('user_id:token').agg('item_id:token').iter_rows()); raw = data.catalogue['raw_id'].to_numpy()
    assert all(seen[user] == raw[data.sequence(u)[0]].tolist() and seen[user][-1] == raw[data.test.targets[u]] for u, user in enumerate(data.users))

def test_toys_in_part():
    few, more = (load_dataset('toys', source='raw', max_users=n) for n in (100, 300))
    assert few.n_users == 100 and more.n_users == 300 and set(few.users) < set(more.users) and few.fingerprint != more.fingerprint
    assert np.unique(few.items).tolist() == list(range(1, few.n_items + 1))             # only items that they touched

def test_movielens():
    data = load_dataset('ml-100k', source='raw'); assert shape(data) == (943, 1_682, 100_000)
    assert card(data)['coverage'].rows() == [('text', 1_682, 1_682, 1.), ('image', 1_667, 1_682, 1_667/1_682)]
    shown = [data.image(i) for i in range(1, data.n_items + 1)]
    assert sum(im is not None for im in shown) == 1_667 and not data.image_problems and {im.width for im in shown if im} == {92}
    star = data.catalogue.row(by_predicate=pl.col('title') == 'Star Wars (1977)', named=True)
    assert star['raw_id'] == '50' == str(star['id']) and 'Sci-Fi' in star['text'] and 'Luke' in star['text']

def test_true_lines_of_2014():
    folder = next(p for p in [resolve(DATA), *sorted(resolve(DATA).iterdir())] if (p/'meta_Musical_Instruments.sample.json').exists())
    log, catalogue = read_amazon(folder/'reviews_Musical_Instruments_5.sample.json', folder/'meta_Musical_Instruments.sample.json')
    assert log.height == 100 and log['timestamp'].min() > 1_000_000_000 and catalogue.height == log['item'].n_unique()
