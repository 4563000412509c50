"""How quickly and in how much memory Amazon reviews become sequences: ours against pandas on real Toys, one run, reviews only.

    MMREC_DATA=<folder that holds the raw Toys files> python benchmarks/data_room.py      # two to five minutes, 0.7 GB of temporary files

Speed: read, drop repeated (user, item) pairs, sort by (user, time, item), one sequence per user; the two take turns, medians over the repeats; the
sequences are compared and must be equal. CPU seconds stand beside wall seconds: other work on the machine disturbs them less. Memory: the same file twenty
times over, each time under new user ids; the highest resident memory of a fresh process less what it held after its imports, over the unpacked size.
"exact" is our slow path: one time in quotes at the end of the file sends the reader through it line by line. Each measurement is a process of its own, with
one thread and with as many as the libraries choose.
"""
import argparse, gzip, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import pandas as pd, polars as pl
from mmrec_wb.core.paths import atomic_write, project_root
from mmrec_wb.data import data_folder, find_files, registry
from mmrec_wb.data.amazon import read_reviews
from mmrec_wb.data.clean import in_order, sequences

REPEATS, COPIES = 15, 20

def ours(path): return sequences(in_order(read_reviews(path)))

def with_pandas(path):
    log = pd.read_json(path, lines=True).drop_duplicates(['reviewerID', 'asin']).sort_values(['reviewerID', 'unixReviewTime', 'asin'])
    return log.groupby('reviewerID')['asin'].agg(list)

def speed(path):
    "Median seconds of both, and whether their sequences are equal."
    clocks = dict(s=time.perf_counter, cpu_s=time.process_time); seconds = {(f, c): [] for f in (ours, with_pandas) for c in clocks}
    for f in (ours, with_pandas)*(REPEATS + 1):
        start = {c: clock() for c, clock in clocks.items()}; f(path)
        for c, clock in clocks.items(): seconds[f, c].append(clock() - start[c])
    s, other = ours(path), with_pandas(path)
    items = s.raw_items.gather(s.items - 1).to_list()
    equal = s.users == other.index.tolist() and all(items[a:b] == o for a, b, o in zip(s.offsets, s.offsets[1:], other))
    m = {k: statistics.median(t[1:]) for k, t in seconds.items()}            # the first round warms up
    took = {f'{name}_{c}': m[f, c] for c in clocks for name, f in (('ours', ours), ('pandas', with_pandas))}
    return dict(users=len(s.users), interactions=len(items), **took, times_faster=took['pandas_s']/took['ours_s'],
                times_less_cpu=took['pandas_cpu_s']/took['ours_cpu_s'], equal=equal)

def memory(path, f):
    "Peak resident memory above that after the imports, in MB. VmHWM belongs to this process alone; ru_maxrss would begin at its parent's."
    def resident(key): return next(int(line.split()[1])/1024 for line in open('/proc/self/status') if line.startswith(key))
    before, start = resident('VmRSS'), time.perf_counter()
    result = f(path); seconds = time.perf_counter() - start
    return dict(users=len(result) if f is with_pandas else len(result.users), peak_mb=resident('VmHWM') - before, seconds=seconds)

def fresh(threads, *what):
    "One measurement in a process of its own."
    env = {k: v for k, v in os.environ.items() if k not in ('POLARS_MAX_THREADS', 'OMP_NUM_THREADS')}
    if threads: env.update(POLARS_MAX_THREADS=str(threads), OMP_NUM_THREADS=str(threads))
    p = subprocess.run([sys.executable, __file__, '--child', *map(str, what)], env=env, capture_output=True, text=True)
    if p.returncode: sys.exit(p.stderr)
    return dict(threads=str(threads or f'default ({os.cpu_count()} cores)'), **json.loads(p.stdout))

def repeated(path, folder):
    "The file `COPIES` times over under new user ids: plain, packed, and plain with a time in quotes."
    text = (gzip.open if Path(path).suffix == '.gz' else open)(path, 'rt', encoding='utf-8').read().splitlines()
    plain, packed, odd = (folder/n for n in ('reviews.json', 'reviews.json.gz', 'odd.json'))
    with open(plain, 'w') as f, gzip.open(packed, 'wt', 1) as g:
        for k in range(COPIES):
            part = ''.join(line.replace('"reviewerID": "', f'"reviewerID": "{k:02d}', 1) + '\n' for line in text); f.write(part); g.write(part)
    odd.write_text(plain.read_text() + '{"reviewerID": "odd", "asin": "odd", "unixReviewTime": "1379289600"}\n')
    return dict(plain=plain, packed=packed, exact=odd)

def main():
    path = find_files('toys', registry()['toys'], data_folder()[0])['reviews']
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=project_root(), capture_output=True, text=True).stdout.strip()
    versions = dict(polars=pl.__version__, pandas=pd.__version__, commit=git)
    tables = dict(speed=[dict(dataset='toys', repeats=REPEATS, **fresh(n, 'speed', path), **versions) for n in (1, None)], memory=[])
    with tempfile.TemporaryDirectory() as d:
        files = repeated(path, Path(d)); size = files['plain'].stat().st_size/2**20
        for tool, file, n in [('ours', f, n) for f in files for n in (1, None) if (f, n) != ('exact', None)] + [('pandas', 'plain', 1)]:
            row = dict(dataset=f'toys, {COPIES} copies', tool=tool, file=file, unpacked_mb=size, **fresh(n, 'memory', files[file], tool))
            tables['memory'].append(row | dict(times_unpacked=row['peak_mb']/size) | versions)
    for name, rows in tables.items():
        table = pl.DataFrame(rows); atomic_write(project_root()/'results'/f'data_room_{name}.csv', lambda tmp: table.write_csv(tmp, float_precision=3))
        with pl.Config(tbl_cols=-1, tbl_width_chars=200): print(table.drop('polars', 'pandas', 'commit'))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--child', nargs='+', help=argparse.SUPPRESS)
    child = a.parse_args().child
    if not child: main()
    elif child[0] == 'speed': print(json.dumps(speed(child[1])))
    else: print(json.dumps(memory(child[1], dict(ours=ours, pandas=with_pandas)[child[2]])))
