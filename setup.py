"Everything is in settings.ini; this only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['=']); ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8'); cfg = ini['DEFAULT']
setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'], license='Apache-2.0',
      packages=find_packages(include=['mmrec_wb', 'mmrec_wb.*']), python_requires=f">={cfg['min_python']}",
      install_requires=cfg['requirements'].split(), extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev', 'ray', 'smollm2')},
      entry_points=dict(nbdev=[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"], console_scripts=cfg['console_scripts'].split()))
