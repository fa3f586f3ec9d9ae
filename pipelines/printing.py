"""What commands print: one JSON document, or tables."""

import json
import sys
from typing import Any


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, sort_keys=True))


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print some columns of rows; wide, unless a terminal says how wide."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(table, highlight=False)


def print_parameters(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print defaults as --set takes them, in YAML."""
    if as_json:
        print_json(rows)
        return
    shown = [
        {**row, "default": row["default"] if isinstance(row["default"], str) else json.dumps(row["default"])}
        for row in rows
    ]
    print_table(shown, list(shown[0]))
