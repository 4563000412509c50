"Encoders from disk and the feature store: poolings, kills, damaged pictures, damaged stores, foreign vectors."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, polars as pl, pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.core.paths import cache_dir, project_root
from mmrec_wb.data import features, load_dataset
from mmrec_wb.data.encoders import find_encoder, load_encoder, quiet_transformers
from mmrec_wb.data.features import add_features

WORDS = 'a blue red kite ball train of wood for small children'.split()
TEXTS = ['kite', 'a blue kite of wood for small children', 'red ball', 'a train']
SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)

def error(f, *a, **k):
    with pytest.raises(WorkbenchError) as e: f(*a, **k)
    assert '\n' not in str(e.value)
    return str(e.value)

def tokenizer(**kind):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', *WORDS])}, unk_token='[UNK]'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    return PreTrainedTokenizerFast(tokenizer_object=t,
                                   **dict(dict(pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]', eos_token='[SEP]'), **kind))

def checkpoint(folder, kind):
    "A tiny random model with its tokenizer or image processor, as `hf download` would leave it."
    import transformers as T
    quiet_transformers(); torch.manual_seed(0)
    words, square = dict(vocab_size=4 + len(WORDS), pad_token_id=0, bos_token_id=2, eos_token_id=3), dict(height=32, width=32)
    towers = dict(text_config=dict(SMALL, **words, max_position_embeddings=16, projection_dim=16, projection_size=16),
                  vision_config=dict(SMALL, image_size=32, patch_size=8, projection_dim=16))
    model = dict(bert=lambda: T.BertModel(T.BertConfig(**SMALL, **words)), gpt2=lambda: T.GPT2Model(T.GPT2Config(n_embd=16, n_layer=1, n_head=2, **words)),
        t5=lambda: T.T5Model(T.T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0, **words)),
        vit=lambda: T.ViTForImageClassification(T.ViTConfig(**SMALL, image_size=32, patch_size=8)),
        resnet=lambda: T.ResNetModel(T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        clip_text=lambda: T.CLIPTextModel(T.CLIPTextConfig(**towers['text_config'])),
        clip_vision=lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**towers['vision_config'])),
        clip=lambda: T.CLIPModel(T.CLIPConfig(projection_dim=16, **towers)), siglip=lambda: T.SiglipModel(T.SiglipConfig(**towers)))[kind]().eval()
    model.save_pretrained(folder)
    if kind not in ('vit', 'resnet', 'clip_vision'): tokenizer(**dict(gpt2=dict(pad_token=None, padding_side='left')).get(kind, {})).save_pretrained(folder)
    if kind in ('vit', 'resnet', 'siglip'): (T.SiglipImageProcessorPil if kind == 'siglip' else T.ViTImageProcessorPil)(size=square).save_pretrained(folder)
    if kind.startswith('clip'): T.CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=square).save_pretrained(folder)
    return model

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "Kind -> (folder, model), each made once."
    made, root = {}, tmp_path_factory.mktemp('models')
    def get(kind):
        if kind not in made: made[kind] = (root/kind, checkpoint(root/kind, kind))
        return made[kind]
    return get

PICTURES = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (20 + 9*k, 40, 3), dtype=np.uint8)) for k in range(4)]

# ---- encoders ----
@pytest.mark.parametrize('kind', ['bert', 'gpt2', 't5', 'clip', 'clip_text', 'siglip'])
def test_text_encoders(models, kind):
    folder, model = models(kind); encode = load_encoder(find_encoder('text', folder)); v = encode(TEXTS)
    assert v.shape == (4, 16) and v.dtype == np.float32 and np.isfinite(v).all() and np.abs(v[0] - v[1]).max() > 1e-3
    for k in range(4): np.testing.assert_allclose(encode(TEXTS[k:k + 1])[0], v[k], atol=1e-5)         # neither batch nor padding matters
    x = tokenizer()(TEXTS[1:2], return_tensors='pt')
    with torch.no_grad():
        if kind == 'bert': want = model(**x).last_hidden_state[:, 0]
        elif kind == 'gpt2': want = model(**x).last_hidden_state.mean(1)
        elif kind == 't5': want = model.encoder(**x).last_hidden_state.mean(1)
        elif kind == 'clip_text': want = model(**x).pooler_output
        elif kind == 'clip': want = model.get_text_features(**x).pooler_output
        else: want = model.get_text_features(tokenizer()(TEXTS[1:2], padding='max_length', max_length=16, return_tensors='pt')['input_ids']).pooler_output
    np.testing.assert_allclose(v[1], want[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(encode(['kite '*900])[0], encode(['kite '*600])[0], atol=1e-5)          # cut off at the model's length

@pytest.mark.parametrize('kind', ['vit', 'resnet', 'clip', 'clip_vision', 'siglip'])
def test_picture_encoders(models, kind):
    folder, model = models(kind); encode = load_encoder(find_encoder('image', folder)); v = encode(PICTURES)
    assert v.shape == (4, 16) and v.dtype == np.float32 and np.isfinite(v).all() and np.abs(v[0] - v[1]).max() > 1e-6
    for k in range(4): np.testing.assert_allclose(encode(PICTURES[k:k + 1])[0], v[k], atol=1e-5)
    from transformers import AutoImageProcessor
    x = AutoImageProcessor.from_pretrained(folder, backend='pil')(images=PICTURES, return_tensors='pt')
    with torch.no_grad():
        if kind == 'vit': want = model.vit(**x).last_hidden_state[:, 0]                                 # and not its pooler, which the checkpoint lacks
        elif kind == 'clip_vision': want = model(**x).pooler_output
        elif kind == 'resnet': want = model(**x).last_hidden_state.mean((2, 3))
        else: want = model.get_image_features(**x).pooler_output
    np.testing.assert_allclose(v, want.numpy(), atol=1e-5)
    assert encode([Image.new('RGB', (1, 1)), Image.new('RGB', (300, 3))]).shape == (2, 16)

@pytest.mark.parametrize('how', ['mean', 'cls'])
def test_sentence_transformers_pool_as_that_library_does(models, tmp_path, how):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    theirs = SentenceTransformer(modules=[Transformer(str(models('bert')[0])), Pooling(16, how)], device='cpu'); theirs.save(str(tmp_path/'st'))
    quiet_transformers()
    np.testing.assert_allclose(load_encoder(find_encoder('text', tmp_path/'st'))(TEXTS), theirs.encode(TEXTS), atol=1e-5)
    other = dict(mean='cls', cls='mean')[how]
    np.testing.assert_allclose(load_encoder(find_encoder('text', f'{tmp_path}/st:{other}'))(TEXTS),
                               load_encoder(find_encoder('text', f'{models("bert")[0]}:{other}'))(TEXTS), atol=1e-6)
    flags = dict(word_embedding_dimension=16, pooling_mode_cls_token=how == 'cls', pooling_mode_mean_tokens=how == 'mean',
                 pooling_mode_max_tokens=False)                                                                         # as older versions wrote it
    (tmp_path/'st/1_Pooling/config.json').write_text(json.dumps(flags)); (tmp_path/'st/sentence_bert_config.json').write_text('{"max_seq_length": 4}')
    np.testing.assert_allclose(load_encoder(find_encoder('text', tmp_path/'st'))(TEXTS[:1]), theirs.encode(TEXTS[:1]), atol=1e-5)
    theirs.max_seq_length = 4; np.testing.assert_allclose(load_encoder(find_encoder('text', tmp_path/'st'))(TEXTS), theirs.encode(TEXTS), atol=1e-5)
    (tmp_path/'st/1_Pooling/config.json').write_text(json.dumps(dict(flags, pooling_mode_max_tokens=True)))
    assert 'which is not built here' in error(load_encoder, find_encoder('text', tmp_path/'st'))

def test_an_encoder_that_cannot_be_had_is_one_line(models, tmp_path):
    bert, vit, clip = (models(k)[0] for k in ('bert', 'vit', 'clip'))
    assert 'hf download nobody/nothing ' in error(find_encoder, 'text', 'nobody/nothing')
    assert 'hf download minilm-l6-v3 ' in error(find_encoder, 'text', 'minilm-l6-v3:mean')
    assert 'no such folder' in error(find_encoder, 'image', '../x/y/z') and 'no such folder' in error(find_encoder, 'image', 'https://example.org/x')
    assert 'is a vit, which reads no text' in error(load_encoder, find_encoder('text', vit))
    assert 'is a bert, which reads no image' in error(load_encoder, find_encoder('image', bert))
    assert 'leave :mean away' in error(load_encoder, find_encoder('image', f'{clip}:mean'))
    cut = shutil.copytree(bert, tmp_path/'cut'); (cut/'model.safetensors').write_bytes((bert/'model.safetensors').read_bytes()[:5000])
    assert 'does not load' in error(load_encoder, find_encoder('text', cut))
    part = shutil.copytree(bert, tmp_path/'part'); w = load_file(part/'model.safetensors')
    save_file({k: v for k, v in w.items() if 'layer.1' not in k}, part/'model.safetensors', metadata=dict(format='pt'))
    assert 'lacks 16 weights of a bert' in error(load_encoder, find_encoder('text', part))
    save_file({k: v for k, v in w.items() if 'pooler' not in k}, part/'model.safetensors', metadata=dict(format='pt'))
    whole = load_encoder(find_encoder('text', part))(TEXTS)                                                             # without pooler it is whole to us
    assert np.array_equal(whole, load_encoder(find_encoder('text', bert))(TEXTS))
    code = shutil.copytree(bert, tmp_path/'code'); c = json.loads((code/'config.json').read_text())
    (code/'config.json').write_text(json.dumps(dict(c, model_type='mine', auto_map=dict(AutoConfig='mine.C', AutoModel='mine.M'))))
    (code/'mine.py').write_text(f'open({str(tmp_path/"ran")!r}, "w")')
    # code of a repository is never run
    assert 'does not load' in error(load_encoder, find_encoder('text', code)) and not (tmp_path/'ran').exists()

def test_weights_that_are_a_pickle_are_not_run(models, tmp_path):
    evil = shutil.copytree(models('bert')[0], tmp_path/'evil'); w = load_file(evil/'model.safetensors'); (evil/'model.safetensors').unlink()
    torch.save(w, evil/'pytorch_model.bin')
    np.testing.assert_allclose(load_encoder(find_encoder('text', evil))(TEXTS), load_encoder(find_encoder('text', models('bert')[0]))(TEXTS), atol=1e-6)
    before = find_encoder('text', evil).key
    class Run:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    torch.save(dict(w, x=Run()), evil/'pytorch_model.bin')
    assert 'does not load' in error(load_encoder, find_encoder('text', evil)) and not (tmp_path/'ran').exists() and find_encoder('text', evil).key != before

def test_a_hugging_face_id_is_known_by_its_commit(models, tmp_path):
    commit, hub = 'a'*39 + '1', tmp_path/'hub'/'models--me--kites'; files = shutil.copytree(models('bert')[0], hub/'snapshots'/commit)
    (hub/'refs').mkdir(); (hub/'refs'/'main').write_text(commit)
    code = """import json
from mmrec_wb.core.errors import WorkbenchError
from mmrec_wb.data.encoders import *
for n in ('me/kites', 'me/kites:mean'):
    e = find_encoder('text', n)
    try: v = load_encoder(e)(['kite']).tolist()
    except WorkbenchError as x: v = str(x)
    print(json.dumps([e.key, v]))"""
    def ask():
        p = subprocess.run([sys.executable, '-c', code], env=dict(os.environ, HF_HUB_CACHE=str(tmp_path/'hub'), HF_HUB_OFFLINE='1'), capture_output=True,
                           text=True, timeout=120)
        assert p.returncode == 0, p.stderr[-2000:]
        keys, vectors = zip(*map(json.loads, p.stdout.splitlines())); assert keys == ('me--kites-' + commit[:12], 'me--kites-' + commit[:12] + '-mean')
        return vectors
    first, mean = ask(); assert 'only partly on this machine' in first and 'hf download me/kites' in first        # modules.json may exist and be elsewhere
    np.testing.assert_allclose(mean, load_encoder(find_encoder('text', f'{models("bert")[0]}:mean'))(['kite']), atol=1e-6)
    (files/'README.md').write_text('fetched whole')
    np.testing.assert_allclose(ask()[0], load_encoder(find_encoder('text', models('bert')[0]))(['kite']), atol=1e-6)

# ---- the store ----
@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(features, 'cache_dir', lambda: tmp_path/'cache'); return tmp_path/'cache'/'features'

def planted(**k): return load_dataset('toys', source='planted', planted_users=40, planted_items=60, **k)

def shop(folder, items=12):
    "A little department with a picture an item."
    (folder/'images').mkdir(parents=True); g = np.random.default_rng(0)
    rows = [dict(reviewerID=f'A{u}', asin=f'B{i:02}', unixReviewTime=86400*i) for u in range(4) for i in range(items)]
    (folder/'reviews_Toys_and_Games_5.json').write_text('\n'.join(map(json.dumps, rows)))
    (folder/'meta_Toys_and_Games.json').write_text('\n'.join(repr(dict(asin=f'B{i:02}', title=f'a {WORDS[i % len(WORDS)]}')) for i in range(items)))
    for i in range(items): Image.fromarray(g.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(folder/'images'/f'B{i:02}.jpg')
    return folder

def test_stores_differ_by_content_and_encoder_and_are_read_again(models, cache, tmp_path, monkeypatch):
    bert, vit = (models(k)[0] for k in ('bert', 'vit'))
    data = add_features(load_dataset('toys', shop(tmp_path/'shop')), progress=False, encoders=dict(text=bert, image=vit))
    assert {m: f.values.shape for m, f in data.features.items()} == dict(text=(13, 16), image=(13, 16)) and data.features['image'].present[1:].all()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(features, 'load_encoder', lambda e: pytest.fail('encoded again'))
        again = add_features(load_dataset('toys', tmp_path/'shop'), progress=False, encoders=dict(text=bert, image=vit))
    for m in data.features: assert np.array_equal(again.features[m].values, data.features[m].values)
    add_features(data, ['text'], progress=False, encoders=dict(text=f'{bert}:mean'))
    assert np.abs(data.features['text'].values - again.features['text'].values).max() > 1e-3
    Image.new('RGB', (24, 24), 'red').save(tmp_path/'shop/images/B03.jpg')
    other = add_features(load_dataset('toys', tmp_path/'shop'), ['image'], progress=False, encoders=dict(image=vit))
    rows = np.abs(other.features['image'].values - data.features['image'].values).max(1) > 1e-5
    assert [data.catalogue['raw_id'][int(i)] for i in np.flatnonzero(rows)] == ['B03'] and len([p for p in cache.iterdir() if p.is_dir()]) == 4

def test_no_picture_stops_the_work(models, cache, tmp_path, capsys):
    put = lambda n: shop_dir/'images'/f'B{n:02}.jpg'; shop_dir = shop(tmp_path/'shop'); vit = dict(image=models('vit')[0])
    good = put(0).read_bytes(); put(1).write_bytes(good[:len(good)//2]); put(2).write_bytes(b'')                      # cut off, empty
    Image.new('1', (9_000, 9_000)).save(put(3), 'PNG'); Image.new('RGB', (9_000, 2)).save(put(4), 'PNG')              # a bomb, a strip
    Image.new('RGB', (24, 24), 'red').save(put(5), 'PNG'); Image.new('L', (24, 24)).save(put(6)); Image.new('CMYK', (24, 24)).save(put(7))   # all readable
    put(8).write_text('<html>not found</html>')
    data = load_dataset('toys', shop_dir); put(9).unlink(); ids = data.catalogue['raw_id'].to_list()                  # gone between reading and encoding
    add_features(data, ['image'], progress=False, encoders=vit); said = capsys.readouterr().out
    lost = [f'B{n:02}' for n in (1, 2, 3, 4, 8, 9)]
    assert [ids[i] for i in data.image_problems] == lost and said.count('\n') == 1 and '6 pictures could not be read' in said
    why = lambda i: data.image_problems[ids.index(i)]
    assert '9000 x 9000 pixels' in why('B03') and 'a strip' in why('B04') and why('B09').startswith('FileNotFound')
    f = data.features['image']
    assert [ids[i] for i in np.flatnonzero(~f.present)] == ['', *lost] and not f.values[~f.present].any() and f.values[f.present].any(1).all()
    listed = json.loads(next(cache.glob('*/problems.json')).read_text()); assert [p['raw_id'] for p in listed] == lost and listed[0]['path'].endswith('B01.jpg')
    from dataclasses import replace
    again = add_features(replace(data, features={}, image_problems={}), ['image'], progress=False, encoders=vit)        # from the store, it is said again
    assert again.image_problems == data.image_problems and capsys.readouterr().out == said and again.image(ids.index('B04')) is None

def test_no_picture_at_all_is_readable(models, cache, tmp_path, capsys):
    folder = shop(tmp_path/'shop')
    for p in (folder/'images').iterdir(): p.write_bytes(b'no picture')
    for _ in range(2):
        data = add_features(load_dataset('toys', folder), progress=False, encoders=dict(text=models('bert')[0]))
        assert list(data.features) == ['text'] and len(data.image_problems) == 12 and 'the image modality is off' in capsys.readouterr().out

def test_chunks_do_not_change_a_value(models, cache, monkeypatch):
    bert = models('bert')[0]; whole = add_features(planted(), ['text'], progress=False, encoders=dict(text=bert)).features['text'].values.copy()
    shutil.rmtree(cache); monkeypatch.setattr(features, 'CHUNK', 7); monkeypatch.setitem(features.BATCH, 'text', 3)
    np.testing.assert_allclose(add_features(planted(), ['text'], progress=False, encoders=dict(text=bert)).features['text'].values, whole, atol=1e-5)
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [next(cache.glob('toys*')).name]                            # no .partial is left

ENCODE = '''
import sys, time
from pathlib import Path
from mmrec_wb.data import features, load_dataset
cache, log, text, image, nap = Path(sys.argv[1]), *sys.argv[2:5], float(sys.argv[5])
features.cache_dir, features.CHUNK, features.BATCH = lambda: cache, 8, dict(text=4, image=4)
load = features.load_encoder
def slow(e):
    f = load(e)
    def encode(batch):
        with open(log, 'a') as out: out.write(f'{e.modality} {len(batch)}\\n')
        time.sleep(nap); return f(batch)
    return encode
features.load_encoder = slow
features.add_features(load_dataset('toys', source='planted', planted_users=40, planted_items=60), encoders=dict(text=text, image=image))
'''

def test_killed_encoding_goes_on_and_ends_the_same(models, tmp_path):
    def start(cache, nap):
        cmd = [sys.executable, '-c', ENCODE, tmp_path/cache, tmp_path/f'{cache}.log', *(models(k)[0] for k in ('bert', 'vit')), str(nap)]
        return subprocess.Popen(cmd, cwd=project_root(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    def counted(cache):
        lines = [l.split() for l in (tmp_path/f'{cache}.log').read_text().splitlines()]
        return {m: sum(int(n) for k, n in lines if k == m) for m in ('text', 'image')}
    def finish(p): out, err = p.communicate(timeout=120); assert p.returncode == 0, err[-2000:]
    finish(start('straight', 0)); total = counted('straight')
    for m, other in (('text', 'bert'), ('image', 'vit')):                                                              # killed once in each modality
        p = start('killed', .1); end = time.time() + 120
        while len(list((tmp_path/'killed'/'features').glob(f'.toys*-{other}-*.partial/*.npz'))) < 3:
            assert p.poll() is None and time.time() < end, p.stderr.read()[-2000:]; time.sleep(.01)
        p.send_signal(signal.SIGKILL); p.communicate()
        assert not list((tmp_path/'killed'/'features').glob(f'toys*-{other}-*/values.npy'))                             # nothing half written where others look
    finish(start('killed', 0)); again = counted('killed')
    # at most the chunk that was being encoded, twice over, and a batch
    assert all(total[m] <= again[m] <= total[m] + 12 for m in total), (total, again)
    stores = {c: sorted(p for p in (tmp_path/c/'features').iterdir() if p.is_dir()) for c in ('straight', 'killed')}
    assert [p.name for p in stores['straight']] == [p.name for p in stores['killed']] and len(stores['killed']) == 2
    for a, b in zip(*stores.values()):
        for part in ('values.npy', 'present.npy'): assert (a/part).read_bytes() == (b/part).read_bytes()

def test_a_damaged_chunk_is_encoded_again(models, cache, monkeypatch):
    bert = dict(text=models('bert')[0]); monkeypatch.setattr(features, 'CHUNK', 20)
    def stop(*a): raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as m:
        m.setattr(features.np, 'save', stop)
        with pytest.raises(KeyboardInterrupt): add_features(planted(), ['text'], progress=False, encoders=bert)
    chunks = sorted(cache.glob('.*.partial/*.npz')); assert len(chunks) == 3; chunks[1].write_bytes(chunks[1].read_bytes()[:100])
    v = add_features(planted(), ['text'], progress=False, encoders=bert).features['text'].values.copy(); shutil.rmtree(cache)
    assert np.array_equal(add_features(planted(), ['text'], progress=False, encoders=bert).features['text'].values, v)

@pytest.mark.parametrize('hurt, said', [
    (lambda v, p: (np.save(v, np.where(np.arange(61)[:, None] == 5, np.nan, np.load(v)).astype(np.float32))), 'values.npy has NaN or inf in row 5 (item '),
    (lambda v, p: np.save(v, np.where(np.arange(61)[:, None] == 5, np.inf, np.load(v)).astype(np.float32)), 'has NaN or inf in row 5'),
    (lambda v, p: v.write_bytes(v.read_bytes()[:-100]), 'values.npy is damaged'), (lambda v, p: v.write_bytes(b''), 'values.npy is damaged'),
    (lambda v, p: v.unlink(), 'values.npy is damaged'),
    (lambda v, p: np.save(v, np.load(v)[:-1]), 'values.npy holds float32 [60, 16], not float32 [61, 16]'),
    (lambda v, p: np.save(v, np.load(v).astype(np.float64)), 'holds float64'),
    (lambda v, p: np.save(v, np.load(v)[0]), 'values.npy holds float32 [16]'),
    (lambda v, p: np.save(v, np.array([{}]), allow_pickle=True), 'values.npy is damaged'),
    (lambda v, p: np.save(p, np.ones(61, bool)), 'row 0'), (lambda v, p: np.save(p, np.zeros(61, bool)), 'row 1 (item '),
    (lambda v, p: np.save(p, np.zeros(61)), 'present.npy holds float64'),
    (lambda v, p: (v.parent/'problems.json').write_text('[{"item"'), 'problems.json is damaged')])
def test_a_damaged_store_is_one_line(models, cache, hurt, said):
    bert = dict(text=models('bert')[0]); want = add_features(planted(), ['text'], progress=False, encoders=bert).features['text'].values.copy()
    folder = next(cache.glob('toys*')); copy = folder.with_name('copy'); shutil.copytree(folder, copy); hurt(copy/'values.npy', copy/'present.npy')
    shutil.rmtree(folder); copy.rename(folder)
    message = error(add_features, planted(), ['text'], progress=False, encoders=bert)
    assert said in message and message.endswith(f'encode again: rm -r {folder}')
    # the remedy works
    shutil.rmtree(folder); assert np.array_equal(add_features(planted(), ['text'], progress=False, encoders=bert).features['text'].values, want)

def test_an_encoder_that_gives_nan_is_one_line_and_leaves_nothing(models, cache, tmp_path):
    sick = shutil.copytree(models('bert')[0], tmp_path/'sick'); w = load_file(sick/'model.safetensors'); w['embeddings.LayerNorm.weight'][0] = float('nan')
    save_file(w, sick/'model.safetensors', metadata=dict(format='pt'))
    message = error(add_features, planted(), ['text'], progress=False, encoders=dict(text=sick))
    assert "gives NaN or inf for item " in message and str(sick) in message and not [p for p in cache.glob('**/*') if p.is_file() and p.suffix != '.lock']

def test_a_wrong_name_writes_nothing(cache):
    assert 'hf download nobody/nothing' in error(add_features, planted(), progress=False, encoders=dict(image='nobody/nothing')) and not cache.exists()
    assert 'unknown modality' in error(add_features, planted(), encoders=dict(pictures='x')) and 'unknown modality' in error(add_features, planted(), ['sound'])

# ---- vectors of one's own ----
def test_own_vectors(tmp_path, cache, capsys):
    data = planted(); ids = data.catalogue['raw_id'].to_list()[1:]; v = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    f = tmp_path/'v.parquet'
    frame = pl.DataFrame(dict(raw_id=ids, vector=v)); use = lambda: add_features(data, ['image'], encoders=dict(image=f)).features['image']
    frame[::-1].write_parquet(f); assert np.array_equal(use().values[1:], v) and capsys.readouterr().out == '' and not cache.exists()
    frame.with_columns(pl.col('vector').arr.to_list().cast(pl.List(pl.Float64))).write_parquet(f); assert np.array_equal(use().values[1:], v)
    pl.concat([frame[:50], frame[:1].with_columns(raw_id=pl.lit('elsewhere'))]).write_parquet(f)
    assert use().present.sum() == 50 and not use().values[51:].any()
    assert "1 of 51 ids in v.parquet are not in the catalogue and are left out, e.g. 'elsewhere'" in capsys.readouterr().out

@pytest.mark.parametrize('make, said', [
    (lambda t: t.with_columns(raw_id=pl.lit('x') + pl.col('raw_id')), 'none of its 60 ids is in the catalogue'),
    (lambda t: pl.concat([t, t[:1]]), 'more than once'),
    (lambda t: t.rename(dict(raw_id='asin')), 'columns raw_id and vector'), (lambda t: t.with_columns(raw_id=pl.lit(1.5)), 'neither text nor whole numbers'),
    (lambda t: t.with_columns(vector=pl.Series([[1.]*(2 + (k == 7)) for k in range(60)])), 'as many in each row'),
    (lambda t: t.with_columns(vector=pl.lit('1 2 3')), 'no list of numbers'),
    (lambda t: t.with_columns(vector=pl.Series([[1., float('nan') if k == 7 else 2.] for k in range(60)])), 'row 7 (raw_id '),
    (lambda t: t.with_columns(vector=pl.Series([None if k == 7 else [1., 2.] for k in range(60)])), 'row 7 (raw_id '), (lambda t: t[:0], 'v.parquet')])
def test_wrong_vectors_of_ones_own(tmp_path, make, said):
    data = planted(); frame = pl.DataFrame(dict(raw_id=data.catalogue['raw_id'].to_list()[1:], vector=np.ones((60, 2), np.float32)))
    make(frame).write_parquet(tmp_path/'v.parquet'); message = error(add_features, data, ['image'], encoders=dict(image=tmp_path/'v.parquet'))
    assert said in message and f'{tmp_path}/v.parquet' in message
    assert 'no parquet file' in error(add_features, data, ['image'], encoders=dict(image=tmp_path/'none.parquet'))

# ---- real data ----
@pytest.mark.real
@pytest.mark.skipif(not os.environ.get('MMREC_DATA'), reason='MMREC_DATA names no folder with the real files (see data/README.md)')
def test_movielens_posters_and_plots(cache):
    data = add_features(load_dataset('ml-100k', source='raw', max_users=2), progress=False); text, image = data.features['text'], data.features['image']
    assert text.present[1:].all() and image.present[1:].mean() > .95 and not data.image_problems
    unit = text.values[1:]/np.linalg.norm(text.values[1:], axis=1, keepdims=True); same = unit @ unit.T; np.fill_diagonal(same, 0)
    genres = [set(c.split('|')) if c else set() for c in data.catalogue['category'][1:]]
    pairs = [(same[a, b], bool(genres[a] & genres[b])) for a in range(len(genres)) for b in range(a)]
    # near in words, near in genre
    near = sorted(pairs, reverse=True)[:len(pairs)//20]; assert np.mean([g for _, g in near]) > np.mean([g for _, g in pairs]) + .1
