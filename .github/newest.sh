#!/usr/bin/env bash
# Tests the newest versions of all libraries instead of the locked ones, and lists the versions and the failures in the
# job's summary.
#
# `allowed` tests the versions that pyproject.toml allows; `beyond` also those that its upper bounds and exact pins
# exclude. Changes pyproject.toml (`beyond`) and requirements.lock in the working folder. Exits with 1 if a check fails.
set -euo pipefail

readonly which=$1 lines=60 # of the end of a log, shown in the summary
case $which in
  allowed) ;;
  # torch==2.15.0 becomes torch>=2.15.0, and mlflow>=3.17,<4 becomes mlflow>=3.17, in the lists of requirements.
  beyond) sed -i -E '/^ {4}"/ { s/==/>=/; s/,<[0-9.]+//; }' pyproject.toml ;;
  *)
    echo "say allowed or beyond" >&2
    exit 2
    ;;
esac

versions() { grep -oE '^[a-zA-Z0-9._-]+==[^ ]+' requirements.lock | sort; }

# Runs `make …`, also writes its output to a log, and adds the result to the summary.
broken=0
try() {
  if make "$@" 2>&1 | tee make.log >&2; then # standard output is for the summary
    echo "- \`make $1\`: passed"
  else
    broken=1
    echo "- \`make $1\`: **failed**"
    printf '\n```\n'
    # pytest prints one line per failed test at its end; without such lines, the last lines of the log are shown.
    grep -E '^(FAILED|ERROR) ' make.log | tail -n "$lines" || tail -n "$lines" make.log
    printf '```\n'
  fi >>summary.md
}

printf '### Newest versions: %s\n\n' "$which" >summary.md
before=$(versions)
try lock ARGS=--upgrade
if ((!broken)); then
  try lint
  try test
fi
{
  printf '\nOther versions than the locked ones (-) that were tried (+):\n\n```diff\n'
  diff --unchanged-line-format= --old-line-format='- %L' --new-line-format='+ %L' <(echo "$before") <(versions) || true
  printf '```\n'
} >>summary.md
cat summary.md >>"$GITHUB_STEP_SUMMARY"
exit "$broken"
