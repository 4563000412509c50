r"""Why do DuAF-MAT's weights not follow the planted attention? Two questions to the planted shop, generator seed 1 (tuned on seed 0), three seeds.

    python benchmarks/study_recommenders.py --dataset toys --source planted --planted-seed 1      # first, and
    python benchmarks/truth_duaf_mat.py
    python benchmarks/why_attention.py          # results/why_attention_probes.csv, results/why_attention_told.csv; six runs of two CPU minutes

**Was it there to be read?** Correlation with the planted attention at an item (as in truth_duaf_mat.py, items with a picture), over the test histories of the
odd users, of: the share of the words that Eq. 7 gives; what it would give, in the same trained model, without e_time; the best weighing, anew, of the 2 d
products of tanh(e_m + e_time) and s that Eq. 7 adds up; s, e_text and e_image side by side; and, without any model, how alike an item's frozen vectors and
those of the items before it are (mean, greatest, last, a sum that fades with the generator's 60 days; words and picture apart; with the gap, the place, and
all squares). The last three are ridge regressions on the even users, whose penalty was chosen within these. `oracle`: as in truth_duaf_mat.py. `spread`:
standard deviation of a share; `time_size`: root mean square of e_time, in units of that of e_text and e_image: all modalities get the same e_time, so where
it is large, tanh of their sums is nearly the same for all.

**Would it help?** `told` is DuAF-MAT whose weights for the items of a history are given: a third for the id, the rest shared between words and picture as the
planted attention itself was when the item was chosen; nothing of it is learned, and no recommender could know it. `features only, told` likewise without
generator and contrast. Each against the same model with equal weights (-DuAF; features only): users' NDCG@10 averaged over seeds, Wilcoxon signed-rank.
"""
import argparse
from functools import wraps
import numpy as np, polars as pl, torch
from torch import nn
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import load_run
from mmrec_wb.data import load_dataset
from mmrec_wb.data.batches import eval_batches
from mmrec_wb.data.features import add_features
from mmrec_wb.data.planted import ATTENTION_DAYS, Oracle
from mmrec_wb.models.duaf_mat import DuAFMAT
from mmrec_wb.models.explain import with_truth
from mmrec_wb.models.fusion import weighted
from mmrec_wb.training.recommender import load_model
from mmrec_wb.training.significance import compare
from study_recommenders import ARMS as STUDY
from truth_duaf_mat import ARMS as TRUTH, attention_known
from tune_recommenders import best, run, title

def users(data) -> np.ndarray: return np.repeat(np.arange(data.n_users), np.diff(data.offsets)) # of each event of data.items

def attention(data) -> np.ndarray: # a number for each event
    "The planted attention to the words when it was chosen."
    return with_truth(pl.DataFrame(dict(user=users(data), item=data.items, time=data.times)), data)['text_attention'].to_numpy()

# ---- was it there to be read? ----
def unit(feature): # [n, d], 0 where there is none
    x = np.where(feature.present[:, None], feature.values - feature.values[feature.present].mean(0), 0).astype(np.float32)
    return x/(np.linalg.norm(x, axis=1, keepdims=True) + 1e-9)

def likeness(data) -> np.ndarray: # [events, 20]
    "How alike the frozen vectors of an item and of those before it are; words and picture apart; and the squares."
    x, rows = [unit(data.features[m]) for m in ('text', 'image')], np.zeros((len(data.items), 10)); part = data.test
    for start, end in zip(part.starts, part.ends):
        items, days, faded = data.items[start:end], data.times[start:end]/86400, np.zeros(2)
        for k in range(1, len(items)):
            like = np.stack([v[items[:k]] @ v[items[k]] for v in x]); gap = days[k] - days[k - 1]
            faded = faded*np.exp(-gap/ATTENTION_DAYS) + like.max(1)
            rows[start + k] = *like.mean(1), *like.max(1), *like[:, -1], *faded, np.log1p(gap), k
    return np.concatenate([rows, rows**2], 1)

@torch.no_grad()
def inside(model, data): # -> events [n] (numbers of data.items), share [n], without time [n], terms [n, 2 d], vectors [n, 3 d], e_time [n, d]
    "What Eq. 7 gives and what it is given, at the items with a picture of all test histories."
    got, out, at = [], [], [model.names.index(m) for m in ('text', 'image')]
    hook = model.fuse.register_forward_hook(lambda module, args, _: got.append(args))
    for b in eval_batches(data, 'test', model.max_len):
        omega, (s, e, _, gaps, days) = model.explain(b)['weights'], got.pop()
        real = b.mask & model.frozen['image'].has[b.items]; omega, s, e = omega[real][:, at], s[real].unsqueeze(1), e[real][:, at]
        time = model.fuse.time(gaps, days)[real] if hasattr(model.fuse, 'time') else torch.zeros_like(s[:, 0])
        words, picture = (e.tanh()*s).sum(-1).T; event = (b.start[:, None] + torch.arange(b.items.shape[1]))[real]
        out.append((event, omega[:, 0]/omega.sum(1), torch.sigmoid(words - picture), ((e + time.unsqueeze(1)).tanh()*s).flatten(1),
                    torch.cat([s, e], 1).flatten(1), time))
    hook.remove(); return [torch.cat(part).double().numpy() if n else torch.cat(part).numpy() for n, part in enumerate(zip(*out))]

def correlation(a, b): return float(np.corrcoef(a, b)[0, 1])

def ridge(x, y, fit) -> np.ndarray: # guesses for all rows
    "Ridge regression on the rows `fit`; the penalty is the best for one half of them after fitting the other."
    x = (x - x[fit].mean(0))/(x[fit].std(0) + 1e-9); rows = np.flatnonzero(fit); first, second = rows[::2], rows[1::2]
    solve = lambda r, k: np.linalg.solve(x[r].T @ x[r] + k*np.eye(x.shape[1]), x[r].T @ (y[r] - y[rows].mean()))
    return x @ solve(rows, max(10.**np.arange(6), key=lambda k: correlation(x[second] @ solve(first, k), y[second])))

def known(data, some, events): # what a reader of clicks who knows the generator can say of these events
    oracle, at = Oracle(data.truth['items'], data.catalogue['raw_id'][1:].to_list()), {}
    for u in some: at |= dict(zip(range(data.test.starts[u], data.test.ends[u]), attention_known(oracle, *data.test.history(u))))
    return np.array([at[k] for k in events])

def probes(what, tuned, seeds, data, folder) -> list: # a row for each arm, seed and what was read
    "Correlations at the odd users' items."
    true, clicks, rows = attention(data), likeness(data), []
    for arm in ('dual', '-CSCL', '-VSCL', '-CSCL -VSCL', 'user'):
        for seed in seeds:
            if not (done := run(**what, seed=seed, model='duaf_mat', **tuned, **TRUTH[arm])): raise SystemExit('a run failed: no tables')
            event, share, timeless, terms, vectors, time = inside(load_model(load_run(folder/done['run']), data), data)
            y, user = true[event], users(data)[event]; fit = user % 2 == 0
            said = dict(rows=int((~fit).sum()), commit=done['commit'], versions=done['versions'])
            shares = {'weights (Eq. 7)': share, **({'the same without time': timeless} if arm != 'user' else {})}
            reads = shares | {"Eq. 7's terms, weighed anew": ridge(terms, y, fit), 'state and item': ridge(vectors, y, fit)}
            size = float((time**2).mean()**.5/(vectors[:, len(time[0]):]**2).mean()**.5)
            rows += [dict(arm=arm, seed=seed, read=k, pooled=correlation(v[~fit], y[~fit]), spread=float(v[~fit].std()) if k in shares else None,
                          time_size=size, **said, run=done['run']) for k, v in reads.items()]
    odd = event[~fit]; beside = {'likeness of frozen vectors': ridge(clicks[event], y, fit)[~fit], 'oracle': known(data, np.unique(user[~fit]), odd)}
    return rows + [dict(arm='no model', read=k, pooled=correlation(v, y[~fit]), **said) for k, v in beside.items()]

# ---- would it help? ----
class Given(nn.Module):
    "A third for the id, and `share` [B, L] of the rest for the words; all of it where there is no picture."
    def forward(self, s, e, there, gaps, days): # -> h, omega
        share = self.share.where(there[..., 2], 1.); omega = torch.stack([torch.full_like(share, .5), share, 1 - share], -1)/1.5
        return weighted(omega, e), omega

class Told(DuAFMAT):
    "DuAF-MAT that is told the planted attention at each item of a history."
    @wraps(DuAFMAT.__init__)
    def __init__(self, data, **settings):
        super().__init__(data, **settings); self.fuse = Given()
        self.register_buffer('known', torch.from_numpy(attention(data)).float(), persistent=False)
    def _encode(self, batch, table):
        at = batch.start[:, None] + torch.arange(batch.items.shape[1], device=batch.items.device)
        self.fuse.share = self.known[at.clamp_max(len(self.known) - 1)]; return super()._encode(batch, table)

PAIRS = {'told': ('-DuAF', {}), 'features only, told': ('features only', dict(visual_fill='none', lambda_1=0., lambda_2=0.))}   # arm -> its like, settings

def told(what, tuned, seeds, folder) -> list: # a row for each pair and way to rank
    "The models that are told, beside those with equal weights."
    rows = []
    for arm, (like, more) in PAIRS.items():
        sides = {arm: dict(model='why_attention:Told', **tuned, **more), like: tuned | STUDY[like]}
        done = {side: [run(**what, seed=seed, **settings) for seed in seeds] for side, settings in sides.items()}
        if not all(d for each in done.values() for d in each): raise SystemExit('a run failed: no tables')
        frames = {side: [load_run(folder/d['run']).frame('ranks') for d in each] for side, each in done.items()}
        for masked in (False, True):
            ranks = {side: [f.select('user', rank='rank_masked' if masked else 'rank') for f in each] for side, each in frames.items()}
            found, origin = compare(ranks, like, 'NDCG@10').drop('p_holm').to_dicts()[0], done[arm][0]
            rows.append({'baseline': like, 'history masked': masked, **found, 'commit': origin['commit'], 'versions': origin['versions']})
    return rows

def main(args):
    "Both tables."
    what, tuned = dict(dataset='toys', source='planted', planted_seed=1, out_dir=args.out_dir), best('toys', 'planted').get('duaf_mat', {})
    data = add_features(load_dataset('toys', source='planted', planted_seed=1), progress=False); folder = project_root()/args.out_dir
    for name, rows in (('probes', probes(what, tuned, args.seeds, data, folder)), ('told', told(what, tuned, args.seeds, folder))):
        table = pl.DataFrame([dict(dataset=title('toys', 'planted', 1), **r) for r in rows], infer_schema_length=None)
        atomic_write(project_root()/'results'/f'why_attention_{name}.csv', lambda tmp: table.write_csv(tmp, float_precision=4))
        with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=160): print(table.drop('dataset', 'commit', 'versions'))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2]); a.add_argument('--out-dir', default='runs/recommenders')
    main(a.parse_args())
