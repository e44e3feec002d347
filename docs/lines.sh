#!/usr/bin/env bash
# Prints lines of product code by folder at two commits, as a Markdown table: docs/lines.sh [BEFORE] [AFTER]
set -euo pipefail
cd "$(dirname "$0")/.."
before=${1:-f0b2997} after=${2:-HEAD}
count() {
  git grep --count '' "$1" -- 'spot_megatron/*.py' 'spot_megatron/*.j2' 'tools/*.py' 'tools/*.j2' |
    awk -F: '{ depth = split($2, part, "/"); print part[1] (depth > 2 ? "/" part[2] : "/*.py"), $3 }'
}
echo "| folder | before | after |"
echo "|---|---:|---:|"
{ count "$before" | sed 's/^/before /'; count "$after" | sed 's/^/after /'; } | awk '
  { lines[$1, $2] += $3; total[$1] += $3; folders[$2] }
  END {
    for (folder in folders) printf "| `%s` | %d | %d |\n", folder, lines["before", folder], lines["after", folder] | "sort"
    close("sort")
    printf "| all | %d | %d |\n", total["before"], total["after"]
  }'
