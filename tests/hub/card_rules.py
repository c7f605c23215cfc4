"""What the loopback Hub's `validate-yaml` rejects: the documented part of the real server's rules."""

from __future__ import annotations

import re
from typing import Any

import yaml

REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$", re.ASCII)
YAML_BLOCK = re.compile(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def metadata(content: str) -> Any:
    """The YAML block of a card; `None` when there is none. Raises `ValueError` when it is not YAML."""
    block = YAML_BLOCK.match(content)
    if block is None:
        return None
    try:
        return yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML: {error}") from None


def problems(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the card `content`."""
    try:
        data = metadata(content)
    except ValueError as error:
        return [str(error)], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    errors = []
    if not isinstance(data.get("license", "mit"), str | list):
        errors.append('"license" must be a string or a list')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required when "license" is "other"')
    for key in ("base_model", "datasets"):
        value = data.get(key, [])
        for repo_id in value if isinstance(value, list) else [value]:
            if not isinstance(repo_id, str) or len(repo_id) > 96 or not REPO_ID.match(repo_id):
                errors.append(f'"{key}" with value {repo_id!r} is not valid. It should be a model or dataset id')
    if not all(isinstance(tag, str) for tag in data.get("tags") or []):
        errors.append('"tags" must be a list of strings')
    for entry in data.get("model-index") or []:
        for result in entry.get("results", []):
            for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if key not in result.get(part, {}):
                    errors.append(f'"model-index[0].results[0].{part}.{key}" is required')
            if not all("type" in metric and "value" in metric for metric in result.get("metrics", [{}])):
                errors.append('"model-index[0].results[0].metrics[0]" needs "type" and "value"')
    return errors, []
