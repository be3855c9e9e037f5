#!/usr/bin/env bash
# Installs the server that the tests of az:// stores talk to, where there is node; elsewhere those tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/azurite"
if [ -x node_modules/.bin/azurite-blob ]; then
  exit 0
fi
if ! command -v npm >/dev/null; then
  echo "no npm here: the tests of az:// stores will be skipped"
  exit 0
fi
npm install --no-audit --no-fund --no-package-lock --silent
