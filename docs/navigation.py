"""A page that this version lacks is left out of the navigation; one it does not name goes last."""

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Fit the navigation to the pages that are there."""
    pages = {path.name for path in Path(config["docs_dir"]).glob("*.md")}
    named: set[str] = set()
    config["nav"] = _present(config["nav"], pages, named)
    config["nav"] += sorted(pages - named)
    return config


def _present(entries: list[Any], pages: set[str], named: set[str]) -> list[Any]:
    kept = []
    for entry in entries:
        title, value = next(iter(entry.items()))
        if isinstance(value, list):
            value = _present(value, pages, named)
        elif value in pages:
            named.add(value)
        else:
            continue
        if value:
            kept.append({title: value})
    return kept
