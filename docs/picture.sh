#!/usr/bin/env bash
# Takes docs/report.png, the picture in the README, from a run's report: docs/picture.sh [RUN]. Needs Chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/qwen3_tiny_spot}
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --user-data-dir="$profile" --hide-scrollbars --window-size=1200,1390 \
  --virtual-time-budget=8000 --screenshot="$PWD/docs/report.png" "file://$(realpath "$run")/report.html" > /dev/null 2>&1
"${PYTHON:-python3}" - <<'PYTHON' # a palette: a third of the size
from PIL import Image

image = Image.open("docs/report.png").convert("RGB")
image.quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save("docs/report.png", optimize=True)
PYTHON
ls -l docs/report.png
