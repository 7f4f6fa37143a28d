"""MLflow: runs, metrics, the model registry, versions with their tags, and the history of promotions."""
