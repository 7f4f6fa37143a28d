"""Tags of a registered version that others than their writers read."""

SERVING = "convoy.serving"
"""`pending`, `passed` or `failed`: the serving gate."""

VERDICT = "convoy.verdict"
"""`passed` or `refused`: the quality gate."""

VERDICT_SUMMARY = f"{VERDICT}_summary"
VERDICT_CHAMPION = f"{VERDICT}_champion"
"""`name/version` that it was judged against, or `none`."""

VERDICT_SHA256 = f"{VERDICT}_sha256"
NO_CHAMPION = "none"

TEMPERATURE = "convoy.temperature"
"""What logits are divided by for calibrated probabilities."""

DATASET_VERSION = "convoy.dataset_version"
