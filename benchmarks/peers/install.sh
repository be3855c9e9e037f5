#!/bin/sh
# Makes .venv-peers in the repository's root: the project's environment (PYTHON, default .venv/bin/python) with the
# readers that benchmarks/store_read.py compares on top of it. The project's own environment stays as it is.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$python" -m venv --system-site-packages .venv-peers
# a venv of a venv sees the system's packages only: a .pth shows it the project's, and what is installed there in place
own=$(.venv-peers/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
printf 'import site; site.addsitedir("%s")\n' "$packages" >"$own/project.pth"
.venv-peers/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers/requirements.txt
