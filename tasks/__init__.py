"""One Prefect task a file; each joins a piece of `cnn` with a piece of `infra`."""
