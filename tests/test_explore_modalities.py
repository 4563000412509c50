"explore_modalities without a browser: every kind of run, and what is said of the others."
import dataclasses, json, shutil
import numpy as np, pytest, torch
from mmrec_wb.core.record import load_run
from mmrec_wb.data.batches import eval_batches
from mmrec_wb.data import Feature, load_dataset
from mmrec_wb.explore import explore_modalities
from mmrec_wb.training.recommender import load_model, train_recommender

@pytest.fixture(scope='module')
def data():
    d = load_dataset('toys', source='planted', planted_users=120, planted_items=80); r = np.random.default_rng(0); n = d.n_items + 1
    there = np.arange(n) > 0; seen = d.catalogue['image'].is_not_null().to_numpy().copy()
    for m, has in dict(text=there, image=seen).items(): d.features[m] = Feature(r.normal(size=(n, 6)).astype(np.float32)*has[:, None], has)
    return d

@pytest.fixture
def run(data, tmp_path):
    def make(model='duaf_mat', data=data, **more):
        return train_recommender(data, model, **dict(epochs=1, d=8, inner=16, layers=1, max_len=6, out_dir=tmp_path, device='cpu') | more)
    return make

def bars(p): return {t.name: np.array(t.y, float) for t in p['weights'].data if t.type == 'bar'}

def test_what_it_shows_is_what_the_model_says(run, data):
    r = run(); p = explore_modalities(r, data).parts; model = load_model(r, data); u = int(np.diff(data.offsets).argmax()); p['user'].pick(u)
    for b in eval_batches(data, 'test', model.max_len):
        if u not in b.user: continue
        k = b.user.tolist().index(u)
        with torch.no_grad(): said = model.explain(b)['weights'][k][b.mask[k]].numpy(); scores = model.scores(model.user_state(b))[k].numpy()
    assert np.allclose(np.stack(list(bars(p).values()), 1), said, atol=1e-3)
    scores[[0, *data.test.history(u)[0]]] = -np.inf
    assert p['before'].ids == np.argsort(-scores, kind='stable')[:10].tolist()

def test_a_dropped_picture_is_one_that_was_never_there(run, data):
    r = run(); x = explore_modalities(r, data); p = x.parts; p['user'].pick(3)
    k = next(k for _, k in p['item'].options if data.features['image'].present[data.test.history(3)[0][-6:][k]]); i = int(data.test.history(3)[0][-6:][k])
    p['item'].value = k; p['drop'].value = True; dropped = bars(p), p['now'].ids
    model = load_model(r, data); model.frozen['image'].has[i] = False; model.train().eval()                   # forgets the kept table
    for b in eval_batches(data, 'test', model.max_len):
        if 3 in b.user: row = b.user.tolist().index(3); said = model.explain(b)['weights'][row][b.mask[row]].detach().numpy()
    assert np.allclose(np.stack(list(dropped[0].values()), 1), said, atol=1e-3)

WAYS = [dict(fusion='mean'), dict(visual_fill='none'), dict(cand='user'), dict(cand='id'), dict(s0='user'), dict(structural=True)]

@pytest.mark.parametrize('more', WAYS, ids=str)
def test_each_way_of_fusion(run, data, more):
    p = explore_modalities(run(**more), data).parts; n = len(p['item'].options); assert np.allclose(sum(bars(p).values()), np.ones(n), atol=1e-3)
    p['use_text'].value = False; assert bars(p)['text'].max() == 0 and np.allclose(sum(bars(p).values()), np.ones(n), atol=1e-3)
    p['gap'].value = 365*86400; p['use_id'].value = False; assert len(p['now'].ids) == 10 and p['said'].text == ''
    p['undo'].click(); assert p['now'].ids == p['before'].ids and p['gap'].value == -1

def test_words_alone(run, data):
    words = dataclasses.replace(data, features=dict(text=data.features['text'])); p = explore_modalities(run(data=words), words).parts
    assert set(bars(p)) == {'id', 'text'} and p['drop'].layout.display == 'none' and 'use_image' not in p and len(p['weights'].data) == 2

def test_ids_alone(run, data):
    bare = dataclasses.replace(data, features={}); assert 'only modality is the id' in explore_modalities(run(data=bare), bare).parts['said'].text

def test_a_run_that_cannot_be_asked_gets_a_sentence(run, data, tmp_path):
    r = run(); file = r.path/'run.json'; info = json.loads(file.read_text()); said = lambda: explore_modalities(r.path, data).parts['said'].text
    (r.path/'model.safetensors').write_bytes(b'no weights'); assert 'cannot be read' in said()
    file.write_text(json.dumps(info | dict(status='running'))); assert 'is running' in said()
    file.write_text(json.dumps(info | dict(loader='os:system'))); assert 'no recommender over modalities' in said()
    file.write_text('{'); assert 'damaged' in said()
    file.unlink(); assert 'is no run' in said()
    assert 'folder of a run' in explore_modalities(3, data).parts['said'].text
    assert 'a data set is needed, not a str' in explore_modalities(run(), 'toys').parts['said'].text

def test_a_short_catalogue_recommends_what_is_left(tmp_path):
    "Neither padding nor what the user has, where fewer than ten items are left."
    (tmp_path/'datasets.toml').write_text('[few]\ntitle = "few"\nformat = "csv"\nfiles = {interactions = "a.csv", items = "b.csv"}\n')
    log = [f'u{u},i{(u*3 + k) % 12},{k}' for u in range(12) for k in range(5 + u % 4)]; (tmp_path/'a.csv').write_text('\n'.join(['user,item,timestamp', *log]))
    (tmp_path/'b.csv').write_text('\n'.join(['item,title', *(f'i{k},item {k}' for k in range(12))]))
    d = load_dataset('few', tmp_path); d.features['text'] = Feature(np.eye(13, 6, dtype=np.float32), np.arange(13) > 0)
    p = explore_modalities(train_recommender(d, 'duaf_mat', epochs=1, d=8, inner=16, layers=1, max_len=6, out_dir=tmp_path, device='cpu'), d).parts
    for u in range(d.n_users):
        p['user'].pick(u); own = {*d.test.history(u)[0].tolist()}
        assert len(p['now'].ids) == min(10, 12 - len(own)) and not own & {*p['now'].ids} and 0 not in p['now'].ids

def test_other_vectors_than_the_run_read(run, data):
    "Said in a warning; a data set without them in a sentence."
    r = run(); others = dataclasses.replace(data, features={m: Feature(f.values[::-1].copy(), f.present) for m, f in data.features.items()})
    with pytest.warns(UserWarning, match='was trained on other vectors of items'): load_model(r, others)
    assert 'reads vectors of image, text, and these data have none' in explore_modalities(r, dataclasses.replace(data, features={})).parts['said'].text

def test_a_run_deleted_under_way_does_no_harm(run, data):
    r = run(); p = explore_modalities(r, data).parts; shutil.rmtree(r.path); p['user'].pick(5); p['use_text'].value = False; assert bars(p)['text'].max() == 0

def test_times_before_the_chosen_item_stay(run, data):
    x = explore_modalities(run('hm4sr', temporal_experts=2), data); p = x.parts; p['user'].pick(int(np.diff(data.offsets).argmax())); was = bars(p)
    k = p['item'].options[2][1]; p['item'].value = k; p['gap'].value = 3*365*86400; at = 2
    assert all(np.allclose(was[m][:at], b[:at]) for m, b in bars(p).items()) and p['weights'].layout.xaxis.ticktext[at] == '+3.0 y*'
    assert not all(np.allclose(was[m][at:], b[at:]) for m, b in bars(p).items())
