r"""How far training and ranking are from the arithmetic floor, and where the rest of the time goes: SASRec and DuAF-MAT, one thread, CPU seconds.

    MMREC_DATA=... python benchmarks/floor.py       # results/floor.csv; two minutes

Real Toys, and planted toys for DuAF-MAT with all its parts; defaults, 2,048 targets a batch. `train`: whole steps, critic and generator included; `rank`: all
test users against the whole catalogue. `floor`: floating-point operations of the matrix products, as torch's profiler counts them, over the rate of a
1,024 x 1,024 product on the same thread (measured before each batch), as a share of the time taken; medians over batches, or over three rankings. The other
columns share out the operators' own time: matrix products (attention's too), arithmetic (softmax, reductions, point by point), random numbers (dropout,
generator, virtual sequences), the optimiser, copying and gathering, and what is left.
"""
import statistics, time
import polars as pl, torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import git_commit
from mmrec_wb.core.seeds import set_seed
from mmrec_wb.data import load_dataset
from mmrec_wb.data.batches import train_batches
from mmrec_wb.data.features import add_features
from mmrec_wb.models import get_model
from mmrec_wb.training.fit import optimisers, step
from mmrec_wb.training.ranking import rank_all

BATCHES = 12
KINDS = {'matrix products': ('mm', 'bmm', 'addmm', 'baddbmm', '_scaled_dot_product'), 'optimiser': ('_fused_adam', '_foreach'),
         'random numbers': ('bernoulli', 'uniform', 'normal', 'rand', 'poisson', 'multinomial', 'exponential'),
         'copying and gathering': ('copy_', 'index', 'gather', 'scatter', 'cat', 'embedding', 'fill_', 'zero_', 'masked_fill', 'where', 'sort')}

def kind(name): # of an operator
    if not name.startswith('aten::'): return 'what is left'
    return next((k for k, starts in KINDS.items() if name.removeprefix('aten::').startswith(starts)), 'arithmetic')

def rate() -> float: # operations a CPU second
    x = torch.randn(1024, 1024); x @ x; took = []
    for _ in range(9): start = time.process_time(); x @ x; took.append(time.process_time() - start)
    return 2*1024**3/statistics.median(took)

def measured(work, batches) -> dict: # work: called with a batch
    "Share of the floor; where the time goes."
    work(batches[0]); shares, spent = [], {k: 0 for k in (*KINDS, 'arithmetic', 'what is left')}
    for b in batches:
        fast, start = rate(), time.process_time(); work(b); took = time.process_time() - start
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as found: work(b)
        shares.append(sum(e.flops or 0 for e in found.key_averages())/fast/took)
        for e in found.key_averages(): spent[kind(e.key)] += e.self_cpu_time_total
    return dict(floor=statistics.median(shares), **{k: v/sum(spent.values()) for k, v in spent.items()}, times=len(batches))

def jobs(source, model): # name, work, batches
    data = load_dataset('toys', source=source)
    if model != 'sasrec': add_features(data, progress=False)
    set_seed(0); net = get_model(model)(data).train(); by, a = optimisers(net, 1e-3), Accelerator(cpu=True)
    loops = train_batches(data, net.max_len, 2048, 0, 0); yield 'train', lambda b: step(a, net, b, by), [loops[i] for i in range(min(BATCHES, len(loops)))]
    yield 'rank', lambda _: rank_all(net, data), [None]*3

if __name__ == '__main__':
    torch.set_num_threads(1); rows = []
    for source, model in (('raw', 'sasrec'), ('raw', 'duaf_mat'), ('planted', 'duaf_mat')):
        for name, work, batches in jobs(source, model):
            rows.append(dict(dataset='toys' + ' (planted)'*(source == 'planted'), model=model, job=name, **measured(work, batches), commit=git_commit()))
            print(rows[-1], flush=True)
    table = pl.DataFrame(rows); atomic_write(project_root()/'results'/'floor.csv', lambda tmp: table.write_csv(tmp, float_precision=3))
