"""README.md from nbs/index.ipynb, with no quarto: python tools/readme.py [--check]

Hidden cells (`#| hide`) are left out, directives are taken off, links that are relative to nbs/ become relative to the root.
"""
import json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTICE = '<!-- made from nbs/index.ipynb by `make readme`: edit that notebook, not this file -->'

def from_root(text: str) -> str:
    "Link targets that are relative to nbs/, as seen from the root; fenced blocks are left alone."
    def target(m):
        t = m[0]
        if t.startswith('```') or re.match(r'[a-z]+:|#|/', t): return t
        return t[3:] if t.startswith('../') else f'nbs/{t}'
    return re.sub(r'```.*?```|(?<=\]\()[^)\s]+(?=\))', target, text, flags=re.S)

def fence(lang: str, text: str) -> str: return f'```{lang}\n{text.rstrip()}\n```'

def output(o: dict) -> str:
    "One output as markdown; pictures do not belong into the README notebook."
    if o['output_type'] == 'stream': return fence('text', ''.join(o['text']))
    data = o.get('data', {})
    if any(k.startswith('image/') for k in data): raise SystemExit('nbs/index.ipynb shows a picture: put it under results/ and link it from markdown')
    if 'text/markdown' in data: return ''.join(data['text/markdown']).strip()
    return fence('text', ''.join(data.get('text/plain', '')))

def build(nb: dict) -> str:
    "The README's whole text."
    out = [NOTICE]
    for c in nb['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] == 'markdown': out.append(from_root(src.strip()))
        if c['cell_type'] != 'code' or re.search(r'^#\| *(hide|default_exp)', src, re.M): continue
        code = re.sub(r'^#\|.*\n?', '', src, flags=re.M)
        if code.strip() and not re.search(r'^#\| *echo: *false', src, re.M): out.append(fence('python', code))
        out += [output(o) for o in c['outputs']]
    return '\n\n'.join(out) + '\n'

def main():
    new, readme = build(json.loads((ROOT/'nbs'/'index.ipynb').read_text('utf-8'))), ROOT/'README.md'
    if '--check' not in sys.argv: readme.write_text(new, 'utf-8'); return
    if not readme.exists() or readme.read_text('utf-8') != new: raise SystemExit('README.md is not what nbs/index.ipynb says: run `make readme`')

if __name__ == '__main__': main()
