"""Builds all keys of the bucket. `tasks/README.md` has the table of what each object holds, and when it is deleted."""

COMMIT = "commit.json"

RUNS, INVITATIONS = "runs/", "nodes/invitations/"
DATASETS, SHARDS, STEPS, JOURNALS, REPORTS = "datasets/", "shards/", "steps/", "journals/", "reports/"
SOURCES, LISTINGS, RAW, PRETRAINED, PUBLISHED = "sources/", "listings/", "raw/", "pretrained/", "published/"
MODELS, PRUNING, PROBE = "models/", "pruning/", "probe/"


def source_record(source: str) -> str:
    return f"{SOURCES}{source}.json"


def raw_file(sha256: str) -> str:
    return f"{RAW}{sha256}"


def listing(digest: str) -> str:
    return f"{LISTINGS}{digest}.parquet"


def preprocess_record(step: str) -> str:
    return f"{STEPS}preprocess/{step}.json"


def journal(step: str) -> str:
    """Returns the prefix of the journal of an unfinished preprocessing."""
    return f"{JOURNALS}{step}/"


def survey_parts(step: str) -> str:
    """Returns the prefix of its measurements."""
    return f"{journal(step)}survey/"


def survey_part(step: str, first: int) -> str:
    return f"{survey_parts(step)}{first:012}.npz"


def packed_shards(step: str) -> str:
    """Returns the prefix of its records of shards."""
    return f"{journal(step)}shards/"


def packed_shard(step: str, split: str, number: int) -> str:
    return f"{packed_shards(step)}{split}/{number:08}.json"


def dataset_manifest(version: str) -> str:
    return f"{DATASETS}{version}/manifest.json"


def index_record(version: str) -> str:
    return f"{DATASETS}{version}/index.json"


def image_index(version: str, sha256: str) -> str:
    return f"{DATASETS}{version}/index/{sha256}.parquet"


def shard(sha256: str) -> str:
    return f"{SHARDS}{sha256}.safetensors"


def data_report(version: str, digest: str) -> str:
    """Returns the prefix of a report of the data gate."""
    return f"{REPORTS}data/{version}/{digest}/"


def pretrained_weights(sha256: str) -> str:
    return f"{PRETRAINED}{sha256}.safetensors"


def published_weights(name: str) -> str:
    return f"{PUBLISHED}{name.replace('/', '-')}.json"


def run(run_id: str) -> str:
    """Returns the prefix of all objects of a training, except its invitation."""
    return f"{RUNS}{run_id}/"


def run_record(run_id: str) -> str:
    return f"{run(run_id)}run.json"


def checkpoints(run_id: str) -> str:
    """Returns the prefix of a training's checkpoints."""
    return f"{run(run_id)}checkpoints/"


def checkpoint(run_id: str, step: int) -> str:
    """Returns the prefix of a checkpoint; prefixes sort like steps."""
    return f"{checkpoints(run_id)}step-{step:08d}/"


def trained_weights(run_id: str, sha256: str) -> str:
    return f"{run(run_id)}weights/{sha256}.safetensors"


def outcome(run_id: str) -> str:
    return f"{run(run_id)}weights/{COMMIT}"


def reference_images(run_id: str) -> str:
    return f"{run(run_id)}reference.safetensors"


def test_predictions(run_id: str) -> str:
    return f"{run(run_id)}test-predictions.safetensors"


def nodes(run_id: str) -> str:
    """Returns the prefix of the board."""
    return f"{run(run_id)}nodes/"


def node_order(run_id: str) -> str:
    return f"{nodes(run_id)}order"


def node_reports(run_id: str) -> str:
    """Returns the prefix of the nodes' reports."""
    return f"{nodes(run_id)}report/"


def node_report(run_id: str, node: str) -> str:
    return node_reports(run_id) + node


def invitation(run_id: str) -> str:
    return INVITATIONS + run_id


def promotions(name: str) -> str:
    """Returns the prefix of a model's promotions and rollbacks."""
    return f"{MODELS}{name}/history/"


def promotion(name: str, number: int) -> str:
    return f"{promotions(name)}{number:08}.json"


def verdicts(name: str) -> str:
    """Returns the prefix of the verdicts on versions of a model."""
    return f"{MODELS}{name}/verdicts/"


def verdict(name: str, sha256: str) -> str:
    return f"{verdicts(name)}{sha256}.json"


def prune_mark(prune: str) -> str:
    return PRUNING + prune


def probe(number: str) -> str:
    """Returns the prefix of a probe's objects."""
    return f"{PROBE}{number}/"


def part(key: str, number: int) -> str:
    """Returns a part of a key between slashes, counted from 0; "" if the key is shorter."""
    parts = key.split("/")
    return parts[number] if number < len(parts) else ""
