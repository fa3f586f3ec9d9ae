"""Validation of an image table: what is expected of it, what holds, and which images offend."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from unlabeled.data.faults import drift, with_faults
from unlabeled.data.suite import COLUMNS, expect_drift, expect_rows, ids, run
from unlabeled.data.table import TABLE, ImageTable
from unlabeled.data.validation_page import Offender, render, thumbnails
from unlabeled.data.verdict import PAGE, REPORT
from unlabeled.digest import file_digest
from unlabeled.errors import InputError
from unlabeled.files import atomic_path, write_bytes, write_json
from unlabeled.parameters import Validation

SHOWN, SHOWN_EACH = 40, 8  # thumbnails in all, and of one expectation


def validate(table: Path, output: Path, parameters: Validation, reference: Path | None) -> dict[str, Any]:
    """Hold an image table against its expectations. Labels are looked at as data; nothing is trained on them.

    Args:
        table: folder of an `ImageTable`.
        output: folder to write: `validation.json` {"success", "severity" of the worst failure or null,
            "images", "expectations": [see `suite.run`], "drift": {column: distance, "reference": sha256},
            empty without a reference}; `offenders.parquet` (id, expectation), all of them; `thumbnails.npy`
            uint8 (n, C, H, W) of a few, n at most 40, and `thumbnails.json` [{"id", "expectation"}];
            `index.html`, the same for people.
        parameters: the bounds.
        reference: `table.parquet` of an earlier run, to measure drift against.

    Returns:
        {"images", "expectations", "failed", "warnings"}: counts; a warning is a failed expectation that stops no
        run. Here none stops anything: `unlabeled.data.verdict.check` does.

    Raises:
        InputError: the table or the reference cannot be read or lacks a column.
    """
    images = ImageTable(table)
    rows = _read(images.folder / TABLE)
    earlier = None if reference is None else _read(reference)
    with_columns, repeated = with_faults(images, rows, parameters)
    results, offending = run(
        with_columns, expect_rows(with_columns, len(images), len(images.classes), parameters)
    )
    distances: dict[str, Any] = {}
    if reference is not None and earlier is not None:
        frame = pd.DataFrame([drift(rows, earlier)])
        results += run(frame, expect_drift(frame, parameters.max_drift))[0]
        distances = {"reference": file_digest(reference), **frame.iloc[0].to_dict()}
    failed = [result for result in results if not result["success"]]
    critical = [result for result in failed if result["severity"] == "critical"]
    report = {
        "success": not critical,
        "severity": "critical" if critical else "warning" if failed else None,
        "images": len(rows),
        "expectations": results,
        "drift": distances,
    }
    shown = [
        Offender(
            int(position),
            result["name"],
            int(repeated[result["name"]][position]) if result["name"] in repeated else None,
        )
        for result in sorted(results, key=lambda result: result["success"])
        for position in offending.get(result["name"], [])[:SHOWN_EACH]
        if position < len(images)
    ][:SHOWN]
    with atomic_path(output) as folder:
        folder.mkdir()
        write_json(folder / REPORT, report)
        listing = [
            rows[["id"]].iloc[positions].assign(expectation=name) for name, positions in offending.items()
        ]
        pd.concat(listing, ignore_index=True).to_parquet(folder / "offenders.parquet", index=False)
        np.save(folder / "thumbnails.npy", thumbnails(images, [offender.position for offender in shown]))
        names = ids(rows, [offender.position for offender in shown])
        captions = [{"id": name, "expectation": offender.expectation} for name, offender in zip(names, shown)]
        write_json(folder / "thumbnails.json", captions)
        write_bytes(folder / PAGE, render(report, images, rows, earlier, shown).encode())
    return {
        "images": len(rows),
        "expectations": len(results),
        "failed": len(critical),
        "warnings": len(failed) - len(critical),
    }


def _read(file: Path) -> pd.DataFrame:
    try:
        rows = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    missing = ", ".join(column for column in COLUMNS if column not in rows)
    if missing:
        raise InputError(f"{file} lacks the column {missing}: make the table again with `unlabeled ingest`")
    return rows
