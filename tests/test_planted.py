"The planted shop is the same everywhere, and its tables tell the truth about its files."
import polars as pl
from mmrec_wb.data import load_dataset
from mmrec_wb.data.planted import planted_dir

def small(): return load_dataset('toys', source='planted', planted_users=40, planted_items=60, pictures=False)

def test_same_on_every_machine():
    assert small().fingerprint == 'e5a597649ef52dd8'

def test_truth_agrees_with_what_the_reader_sees():
    data = small()
    events = data.truth['events'].sort('reviewerID', 'timestamp', 'asin')
    raw = data.catalogue['raw_id'].to_numpy()
    for u in range(data.n_users):
        items, times = data.sequence(u)
        own = events.filter(reviewerID=data.users[u])
        assert own['asin'].to_list() == raw[items].tolist() and own['timestamp'].to_list() == times.tolist()

def test_withheld_pictures_are_kept_aside():
    folder = planted_dir(40, 60, 0)
    items = pl.read_parquet(folder/'truth/items.parquet')
    shown, withheld = ({p.stem for p in (folder/where).glob('*.png')} for where in ('images', 'truth/withheld'))
    assert withheld == set(items.filter('missing')['asin']) and shown == set(items.filter(~pl.col('missing'))['asin'])
    assert not shown & withheld and withheld

def test_no_false_negative_was_ever_shown():
    truth = small().truth
    assert truth['events'].join(truth['false_negatives'], on=['reviewerID', 'asin']).is_empty() and truth['false_negatives'].height > 0
