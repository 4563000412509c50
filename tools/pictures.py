"""The README's pictures, nbs/images/*.png, all of the planted shop: python tools/pictures.py

Figures are drawn by viz from small runs made here (a minute or two); explore_data.png is cut from what the browser test photographed, if it has run
(`pytest tests/browser/test_browser_data.py`). Wants Chromium (BROWSER_PATH names one).
"""
import os, shutil, tempfile
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np, plotly.io as pio
from PIL import Image
from mmrec_wb.core.paths import project_root
from mmrec_wb.data import load_dataset
from mmrec_wb.data.features import add_features
from mmrec_wb.mllm.tasks import examples
from mmrec_wb.training.factors import train_sae
from mmrec_wb.training.hanorec import DEFAULTS, pair_hardness, thumbnails
from mmrec_wb.training.recommender import load_model, train_recommender
from mmrec_wb.training.rodpo import Preferring, settled
from mmrec_wb.viz import factors as see
from mmrec_wb.viz.fusion import user_weights
from mmrec_wb.viz.preference import hardness_distribution
from mmrec_wb.viz.rodpo import false_negatives

HERE = project_root()/'nbs'/'images'
if shutil.which('chromium'): os.environ.setdefault('BROWSER_PATH', shutil.which('chromium'))

def keep(name, image: Image.Image, colours=64):
    "As a small PNG."
    HERE.mkdir(exist_ok=True); image.convert('RGB').quantize(colours, dither=Image.Dither.NONE).save(HERE/f'{name}.png', optimize=True)
    print(name, image.size, (HERE/f'{name}.png').stat().st_size//1024, 'KB')

def picture(name, fig, width=860):
    with tempfile.TemporaryDirectory() as d:
        pio.write_image(fig, f'{d}/x.png', width=width, height=fig.layout.height or 450); keep(name, Image.open(f'{d}/x.png'))

def main():
    data, d = add_features(load_dataset('toys', source='planted', planted_users=300, planted_items=240), progress=False), tempfile.mkdtemp()
    sae = train_sae(data, units=32, epochs=5, out_dir=d, device='cpu', progress=False); units = sae.frame('explain/factors')
    frames = [sae.frame(f'explain/{f}') for f in ('factor_pairs', 'factor_histogram')]
    three = see.telling(units)['unit'][:3].to_list()
    picture('factors', see.factor_cards(units, *frames, sae.frame('items'), sae.frame('explain/factor_truth'), three, sae.title))
    hard = pair_hardness(data, examples(data, 'pick_one', 'train', seed=0), DEFAULTS).sort('delta')
    ends = [hard[c].gather(k) for c in ('chosen_item', 'rejected_item') for k in ([0, 1, 2], [-3, -2, -1])]
    picture('hardness', hardness_distribution(hard, thumbnails(data, np.concatenate(ends).tolist()), title=data.title))
    small = dict(out_dir=d, device='cpu', d=32, inner=64, batch_size=512, lr=3e-3, dropout=.2)
    fused = train_recommender(data, 'duaf_mat', epochs=6, **small)
    picture('weights', user_weights(fused.frame('explain/fusion'), fused.frame('items'), title=fused.title))
    base = load_model(train_recommender(data, 'sasrec', epochs=8, **small), data)
    ways = {'hard': dict(strategy='hard'), 'topk': dict(strategy='topk'), 'uniform': dict(strategy='uniform')}
    picture('false_negatives', false_negatives({k: Preferring(base, data, settled(s)).probe(0) for k, s in ways.items()}, title=data.title))
    shot = project_root()/'runs'/'screenshots'/'explore_data_1280.png'
    if shot.exists():
        keep('explore_data', Image.open(shot).crop((112, 212, 1232, 1382)).resize((860, 898)))
    else: print(f'explore_data.png stays as it is: {shot} is not there')

if __name__ == '__main__': main()
