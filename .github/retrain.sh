#!/usr/bin/env bash
# Requests a retraining, or a trial of a commit; waits for it, and reports the result in the job's summary and in one
# comment on a pull request.
#
# Reads DEPLOYMENT, COMMIT, REPOSITORY, DATASET, MODEL, FORCE (true), TRIAL (what the commit is tried for) and
# PULL_REQUEST (a number), each of which can be empty, and GitHub's variables from the environment. Exits with the status
# of `convoy`, with one exception: a refusal (3) fails the job if a user has requested the model, but not if the schedule
# has. Then the champion stays in use, nothing is broken, and no alarm is needed.
set -euo pipefail

readonly marker='<!-- convoy retrain -->'
readonly longest=60000 # bytes of a comment; GitHub takes 65536 characters

# Without this variable convoy would start a local server, to which no worker is connected.
if [[ -z "${PREFECT_API_URL:-}" ]]; then
  echo "::error::the secret PREFECT_API_URL is not set"
  exit 2
fi

if [[ -n "${TRIAL:-}" ]]; then
  arguments=(trial "${COMMIT:?}" --key "$TRIAL")
else
  arguments=(retrain --wait)
  if [[ -n "${COMMIT:-}" ]]; then arguments+=(--commit "$COMMIT"); fi
  if [[ "${FORCE:-}" == true ]]; then arguments+=(--force); fi
fi
if [[ -n "${DEPLOYMENT:-}" ]]; then arguments+=(--deployment "$DEPLOYMENT"); fi
if [[ -n "${COMMIT:-}" && -n "${REPOSITORY:-}" ]]; then arguments+=(--repository "$REPOSITORY"); fi
if [[ -n "${DATASET:-}" ]]; then arguments+=(--set "dataset=$DATASET"); fi
if [[ -n "${MODEL:-}" ]]; then arguments+=(--set "model=$MODEL"); fi

rm -f report.md
status=0
convoy "${arguments[@]}" --report report.md --json >retrain.json || status=$?

if [[ ! -s report.md ]]; then
  echo "### Retraining: **no report** (exit status $status); the job's log says why" >report.md
fi
cat report.md >>"$GITHUB_STEP_SUMMARY"

# Writes the comment, or replaces the comment of an earlier run.
comment() {
  local of="repos/$GITHUB_REPOSITORY/issues" existing
  {
    echo "$marker"
    head -c "$longest" report.md | iconv -c -f utf-8 -t utf-8 # drops an incomplete character at the cut
  } >comment.md
  existing=$(gh api --paginate "$of/$PULL_REQUEST/comments" \
    --jq ".[] | select(.user.type == \"Bot\" and (.body | startswith(\"$marker\"))) | .id" | sed -n 1p) || return
  if [[ -n "$existing" ]]; then
    gh api --method PATCH "$of/comments/$existing" --field body=@comment.md --silent
  else
    gh api --method POST "$of/$PULL_REQUEST/comments" --field body=@comment.md --silent
  fi
}
if [[ -n "${PULL_REQUEST:-}" ]]; then
  comment || echo "::warning::the comment could not be written" # the result of the retraining stays the same
fi

case $status in
  0) ;;
  3)
    echo "::notice title=Refused::A gate refused; the champion stays. The job's summary has the verdict."
    if [[ "${GITHUB_EVENT_NAME:-}" == schedule ]]; then status=0; fi
    ;;
  75) echo "::warning title=Interrupted::The training was cancelled, or it died and a worker goes on with it." ;;
  *) echo "::error title=Failed::The retraining failed with status $status." ;;
esac
exit "$status"
