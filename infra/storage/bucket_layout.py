"""Builds all keys of the bucket. `tasks/README.md` has the table of what each object holds, and when it is deleted.

Each name below is a function of the parts of its key. Those that end with a slash are prefixes of several objects.
"""

from collections.abc import Callable

One = Callable[[str], str]
Two = Callable[[str, str], str]
Numbered = Callable[[str, int], str]

COMMIT = "commit.json"

RUNS, INVITATIONS = "runs/", "nodes/invitations/"
DATASETS, SHARDS, STEPS, JOURNALS, REPORTS = "datasets/", "shards/", "steps/", "journals/", "reports/"
SOURCES, LISTINGS, RAW, PRETRAINED, PUBLISHED = "sources/", "listings/", "raw/", "pretrained/", "published/"
MODELS, PRUNING, PROBE = "models/", "pruning/", "probe/"

# By digest, or by the SHA-256 of the content.
source_record: One = (SOURCES + "{}.json").format
raw_file: One = (RAW + "{}").format
listing: One = (LISTINGS + "{}.parquet").format
shard: One = (SHARDS + "{}.safetensors").format
pretrained_weights: One = (PRETRAINED + "{}.safetensors").format

# By the digest of a step of preprocessing; the journal is that of an unfinished one.
preprocess_record: One = (STEPS + "preprocess/{}.json").format
journal: One = (JOURNALS + "{}/").format
survey_parts: One = (JOURNALS + "{}/survey/").format
survey_part: Numbered = (JOURNALS + "{}/survey/{:012}.npz").format
packed_shards: One = (JOURNALS + "{}/shards/").format
packed_shard: Callable[[str, str, int], str] = (JOURNALS + "{}/shards/{}/{:08}.json").format

# By dataset version.
dataset_manifest: One = (DATASETS + "{}/manifest.json").format
index_record: One = (DATASETS + "{}/index.json").format
image_index: Two = (DATASETS + "{}/index/{}.parquet").format
data_report: Two = (REPORTS + "data/{}/{}/").format

# By MLflow run. Prefixes of checkpoints sort like steps.
run: One = (RUNS + "{}/").format
run_record: One = (RUNS + "{}/run.json").format
checkpoints: One = (RUNS + "{}/checkpoints/").format
checkpoint: Numbered = (RUNS + "{}/checkpoints/step-{:08}/").format
trained_weights: Two = (RUNS + "{}/weights/{}.safetensors").format
outcome: One = (RUNS + "{}/weights/" + COMMIT).format
reference_images: One = (RUNS + "{}/reference.safetensors").format
test_predictions: One = (RUNS + "{}/test-predictions.safetensors").format
nodes: One = (RUNS + "{}/nodes/").format
node_order: One = (RUNS + "{}/nodes/order").format
node_reports: One = (RUNS + "{}/nodes/report/").format
node_report: Two = (RUNS + "{}/nodes/report/{}").format
invitation: One = (INVITATIONS + "{}").format

# By model.
promotions: One = (MODELS + "{}/history/").format
promotion: Numbered = (MODELS + "{}/history/{:08}.json").format
verdicts: One = (MODELS + "{}/verdicts/").format
verdict: Two = (MODELS + "{}/verdicts/{}.json").format

prune_mark: One = (PRUNING + "{}").format
probe: One = (PROBE + "{}/").format


def published_weights(name: str) -> str:
    return f"{PUBLISHED}{name.replace('/', '-')}.json"


def part(key: str, number: int) -> str:
    """Returns a part of a key between slashes, counted from 0; "" if the key is shorter."""
    parts = key.split("/")
    return parts[number] if number < len(parts) else ""
