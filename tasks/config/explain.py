"""Explains all keys: as comments in a YAML file, and as the page `flows/configuration.md`, which this module prints."""

import textwrap
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from typing import Any

import yaml

from tasks.config.deployment import ProjectConfig
from tasks.config.keys import Key, Section, sections_of, users_of_options
from tasks.config.retention import RetentionConfig
from tasks.config.run import RunConfig

STARTER_KEYS = """
dataset name recipe model epochs approval augment.flip data.image_size
deploy.schedule.cron deploy.schedule.timezone deploy.prune.cron deploy.notification.variable
""".split()  # noqa: SIM905
"""Keys in the `convoy.yaml` of a new project; the first is set, the others are commented out."""

STARTER_HEAD = """\
# The configuration of this project: `convoy train`, `sweep`, `retrain`, `trial`, `config` and
# `deploy` read it if they are called in this folder, `data check` and `errors` its names of columns.
# To set a key, remove the # before it, and before the section that it is in; `convoy config
# --explain` prints all keys. my_network.py is a network of your own: `model: my_network:SmallNet`
# trains it.
"""
COMMENT_CHARACTERS = 100  # of a line of comment
PAGE = """\
<!-- Generated: `.venv/bin/python -m tasks.config.explain > flows/configuration.md` -->
# Configuration

Every key of `convoy train`, `convoy resume` and deployments, with its default and its values; `null` means unset. The
sentences are the docstrings of the fields in `cnn/config` and `tasks/config`. `--set KEY=VALUE` sets a key, and
`convoy.yaml` or `--config FILE` is a YAML file of keys; [`flows/README.md`](README.md#train) says which wins. Only
`convoy deploy` uses `deploy.*`.

```
convoy config --explain > recipe.yaml            # the configuration with the sentences below, as a file for --config
convoy config --schema > convoy.schema.json      # JSON schema, for editors and CI
```

An editor with a YAML language server completes and checks keys if the file begins with
`# yaml-language-server: $schema=convoy.schema.json`.
"""


def explained(config: RunConfig) -> str:
    """Returns a configuration as YAML for `--config`; comments give each key's sentence, default and values."""
    values = config.resolved()
    lines: list[str] = []
    for section in sections_of(RunConfig, config.model):
        parts = section.name.split(".") if section.name else []
        outer, indent = "  " * (len(parts) - 1), "  " * len(parts)
        lines += [*(outer + line for line in _comment(section.text)), ""]
        if parts:
            lines[-1:] = [f"{outer}{parts[-1]}:" + ("" if section.keys else " {}")]
        of_section = reduce(getitem, parts, values)
        for key in section.keys:
            last = key.name.rpartition(".")[2]
            comment = _comment(key.text, f"Default: {_yaml(key.default)}; values: {key.values}")
            lines += [*(indent + line for line in (*comment, f"{last}: {_yaml(of_section[last])}")), ""]
    return "\n".join(lines).rstrip()


def starter() -> str:
    """Returns the `convoy.yaml` of a new project: `STARTER_KEYS`, with the sentences and defaults of `explained`."""
    sections = {section.name: section for section in sections_of(ProjectConfig)}
    keys = {key.name: key for section in sections.values() for key in section.keys}
    lines = [STARTER_HEAD]
    begun: set[str] = set()
    for name in STARTER_KEYS:
        *path, last = name.split(".")
        for depth, part in enumerate(path):
            if (inside := ".".join(path[: depth + 1])) not in begun:
                begun.add(inside)
                lines += [*_comment(sections[inside].text), f"#{'  ' * depth}{part}:"]
        mark = "" if name == STARTER_KEYS[0] else "#"
        lines += [*_comment(keys[name].text), f"{mark}{'  ' * len(path)}{last}: {_yaml(keys[name].default)}", ""]
    return "\n".join(lines)


def _comment(*texts: str) -> Iterator[str]:
    for paragraph in (paragraph for text in texts for paragraph in text.split("\n\n")):
        yield from textwrap.wrap(paragraph, COMMENT_CHARACTERS, initial_indent="# ", subsequent_indent="# ")


def _yaml(value: Any) -> str:
    """Returns a value in one line of YAML."""
    listed = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=float("inf"))
    return listed.strip()[1:-1]


def reference_page() -> str:
    """Returns the page about all keys, in Markdown."""
    top, *sections = sections_of(ProjectConfig)
    parts = [PAGE, *_table(top, "Top level")]
    for section in sections:
        if section.name == "network":
            for first, *more in users_of_options().values():
                (options,) = (each for each in sections_of(RunConfig, first) if each.name == "network")
                others = f"`{more[0]}`" if len(more) == 1 else f"{len(more)} more"
                parts += _table(options, f"`network` of `{first}`" + (f" and {others}" if more else ""))
        else:
            if section.name == "deploy.retention":
                section = section._replace(text="The [keys of `convoy prune`](#keys-of-convoy-prune).", keys=())
            parts += _table(section, f"`{section.name}`")
    (retention,) = sections_of(RetentionConfig)
    return "\n".join([*parts, *_table(retention, "Keys of `convoy prune`")]).rstrip()


def _table(section: Section, title: str) -> Iterator[str]:
    yield f"## {title}\n\n{section.text}\n"
    if section.keys:
        yield "| key | meaning | default | values |\n|---|---|---|---|"
        yield from map(_row, section.keys)
    yield ""


def _row(key: Key) -> str:
    cells = (f"`{key.name}`", key.text, f"`{_yaml(key.default)}`", key.values)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


if __name__ == "__main__":
    print(reference_page())
