r"""A sparse autoencoder over a stream of 1,000,000 pairs of 512-d vectors: one epoch, on one thread, killed on the way and gone on with.

    python benchmarks/sae_stream.py         # results/sae_stream.csv; --pairs, --each, --width for other sizes

The vectors are made up (a catalogue of 20,000 items: sums of random causes, and noise; 512 numbers for the picture, 512 for the words) and projected to 64
numbers each on the way, a batch at a time: what streams is the 512-d pair. `each` pairs share a prompt. The process that trains is killed (kill -9) at its
first checkpoint after a third of the epoch, and started again; `wall_s` and `cpu_s` count both processes, `fit_s` what the second one trained. `peak_mb` is
the highest resident memory of the two, imports included. `same_as_straight`: killed and gone on with, the weights are those of a run that was not killed
(looked at for 200,000 pairs at most, in two runs beside).
"""
import argparse, hashlib, json, os, resource, signal, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, polars as pl
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.core.record import git_commit, versions
from mmrec_wb.core.seeds import rng

D, ITEMS, CAUSES = 512, 20_000, 20

def catalogue(what):
    "Item vectors [ITEMS, 512] of length 1."
    g = rng(0, 'stream', what); causes = g.normal(size=(CAUSES, D)).astype(np.float32)
    v = (g.random((ITEMS, CAUSES)) < .2).astype(np.float32) @ causes + .5*g.normal(size=(ITEMS, D)).astype(np.float32)
    return v/np.linalg.norm(v, axis=1, keepdims=True)

class Stream:
    "Batches of about 1,024 pairs by number; read, subtracted and projected when asked for."
    def __init__(self, pairs, each, width):
        import torch
        from mmrec_wb.preference.sae import projection
        self.v, self.t = catalogue('pictures'), catalogue('words'); self.each, self.prompts = each, pairs//each; self.batch = max(1, 1024//each)
        self.bases = [b if b is None else b.numpy() for b in (projection(x, width) for x in (self.v, self.t))]; self.torch = torch; self.scale = 1.
    def __call__(self, epoch): return self
    def __len__(self): return -(-self.prompts//self.batch)
    def __getitem__(self, i):
        g = rng(0, 'pairs', i); n = min(self.batch, self.prompts - i*self.batch)
        x = self.v[g.integers(ITEMS, size=n)][:, None] - self.v[g.integers(ITEMS, size=(n, self.each))]; t = self.t[g.integers(ITEMS, size=n)]
        x, t = (a if b is None else a @ b for a, b in zip((x, t), self.bases))
        return self.torch.from_numpy(x*np.float32(self.scale)), self.torch.from_numpy(np.ascontiguousarray(t))

def train(folder, pairs, each, width, every):
    "One epoch; what it cost."
    import torch
    from mmrec_wb.preference.sae import Sae, fit_sae
    torch.manual_seed(0); stream = Stream(pairs, each, width); x, t = stream[0]
    stream.scale = (30/float(x.square().sum(-1).mul(t.square().sum(-1, keepdim=True)).mean()))**.5
    sae = Sae(x.shape[-1], t.shape[-1]); start = time.perf_counter()
    said = fit_sae(sae, stream, epochs=1, folder=folder, every=every)[0]; use = resource.getrusage(resource.RUSAGE_SELF)
    digest = hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in sae.parameters())).hexdigest()[:8]
    cost = dict(fit_s=time.perf_counter() - start, cpu_s=use.ru_utime + use.ru_stime, peak_mb=use.ru_maxrss//1024, threads=torch.get_num_threads())
    return cost | dict(weights=digest, **{k: said[k] for k in ('reconstruction', 'explained_variance', 'L0', 'dead')})

def processes(folder, args, pairs, kill):
    "Train in a process of its own, killed after a third if asked; its words, and the seconds of all."
    command = [sys.executable, __file__, '--part', folder, f'--pairs={pairs}', f'--each={args.each}', f'--width={args.width}', f'--every={args.every}']
    env, began, cpu, peak, file = {**os.environ, 'OMP_NUM_THREADS': '1'}, time.perf_counter(), 0., 0, Path(folder)/'sae.checkpoint'
    from safetensors import safe_open
    def step():
        if not file.exists(): return 0
        with safe_open(file, 'pt') as f: return json.loads(f.metadata()['progress'])['step']
    p = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    if kill:
        while step() < pairs//(3*1024):
            if p.poll() is not None: raise SystemExit('it ended before it could be killed: more pairs, or a smaller --every')
            stat = Path(f'/proc/{p.pid}/stat').read_text().rsplit(')')[1].split(); cpu = (int(stat[11]) + int(stat[12]))/os.sysconf('SC_CLK_TCK')
            peak = int(Path(f'/proc/{p.pid}/status').read_text().split('VmHWM:')[1].split()[0])//1024; time.sleep(.2)
        p.send_signal(signal.SIGKILL); p.communicate(); p = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    out = p.communicate()[0]
    if p.returncode: raise SystemExit('training failed')
    said = json.loads(out.strip().splitlines()[-1])
    return said | dict(wall_s=time.perf_counter() - began, cpu_s=said['cpu_s'] + cpu, peak_mb=max(said['peak_mb'], peak))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--pairs', type=int, default=1_000_000); a.add_argument('--each', type=int, default=8); a.add_argument('--width', type=int, default=64)
    a.add_argument('--every', type=int, default=100); a.add_argument('--part', help=argparse.SUPPRESS); args = a.parse_args()
    if args.part: print(json.dumps(train(args.part, args.pairs, args.each, args.width, args.every))); raise SystemExit
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two, tempfile.TemporaryDirectory() as whole:
        small = min(args.pairs, 200_000); same = len({processes(f, args, small, kill)['weights'] for f, kill in ((one, True), (two, False))}) == 1
        said = processes(whole, args, args.pairs, True)
    row = dict(pairs=args.pairs, d=D, width=args.width, units=128, pairs_per_prompt=args.each, **said,
               pairs_per_s=args.pairs/said['wall_s'], killed_after='a third',
               same_as_straight=same, load=os.getloadavg()[0], commit=git_commit(), versions=f'torch {versions()["torch"]}')
    file = project_root()/'results'/'sae_stream.csv'; table = pl.DataFrame([row])
    if file.exists():
        old = pl.read_csv(file); mine = (pl.col('pairs') == args.pairs) & (pl.col('width') == args.width) & (pl.col('pairs_per_prompt') == args.each)
        table = pl.concat([old.filter(~mine).cast({k: v for k, v in table.schema.items() if k in old.columns}), table], how='diagonal')
    atomic_write(file, lambda tmp: table.write_csv(tmp, float_precision=4)); print(row)
