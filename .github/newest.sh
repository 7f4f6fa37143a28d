#!/usr/bin/env bash
# Tries the newest versions of all libraries instead of the locked ones, and says in the job's summary which were tried
# and what breaks.
#
# With `allowed`, those that pyproject.toml allows; with `beyond`, also those that its upper bounds and exact pins keep
# out. Changes pyproject.toml (`beyond`) and requirements.lock in the working folder. Exits with 1 if anything breaks.
set -euo pipefail

readonly which=$1 lines=60 # of a log's end that the summary shows
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

# Runs `make …`, with its output in a log too; what breaks is put into the summary.
broken=0
try() {
  if make "$@" 2>&1 | tee make.log >&2; then # what goes to standard output is the summary's
    echo "- \`make $1\`: passed"
  else
    broken=1
    echo "- \`make $1\`: **failed**"
    printf '\n```\n'
    # A test run ends with what failed and why, a line each; if it does not, its last lines say what went wrong.
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
