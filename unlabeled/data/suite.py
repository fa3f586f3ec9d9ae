"""The Great Expectations suite of an image table, and its run.

The `meta` of an expectation holds its `name`, its `bound`, the `relation` of what is `observed` to it, and the
`parameter` of section `validation` that sets the bound, if one does.
"""

import math
from collections.abc import Sequence
from typing import Any

import great_expectations as gx
import numpy as np
import pandas as pd
from great_expectations import expectations as gxe
from great_expectations.data_context.types.base import (
    DataContextConfig,
    InMemoryStoreBackendDefaults,
    ProgressBarsConfig,
)
from great_expectations.expectations.metadata_types import FailureSeverity
from great_expectations.expectations.row_conditions import Column

from unlabeled.data import faults
from unlabeled.parameters import Validation

TEXT, WHOLE, NUMBER = ["str"], ["int64", "int32", "Int64Dtype", "Int32Dtype"], ["float64", "float32"]
COLUMNS = {
    "id": TEXT, "split": TEXT, "label": WHOLE, "sha256": TEXT, "height": WHOLE, "width": WHOLE,
    "mean": NUMBER, "std": NUMBER, "entropy": NUMBER,
}  # fmt: skip
RANGES = {"mean": (0, 1), "std": (0, 1), "entropy": (0, 8), "height": (1, None), "width": (1, None)}
IDS = 10  # ids of offenders that a result names


def expect_rows(rows: pd.DataFrame, images: int, classes: int, parameters: Validation) -> list[Any]:
    """Return what is expected of the rows of `faults.with_faults`, for so many images and classes."""
    suite: list[Any] = [
        gxe.ExpectTableColumnsToMatchSet(
            column_set=list(COLUMNS),
            exact_match=False,
            meta=_meta(
                "columns", "exactly", len(COLUMNS), observed=sum(column in rows for column in COLUMNS)
            ),
        ),
        gxe.ExpectTableRowCountToEqual(value=images, meta=_meta("rows, one per image", "exactly", images)),
        gxe.ExpectColumnValuesToBeUnique(column="id", meta=_meta("repeated id", "at most", 0)),
        gxe.ExpectColumnValuesToBeInSet(
            column="split",
            value_set=["train", "test"],
            meta=_meta("split other than train and test", "at most", 0),
        ),
    ]
    for column, types in COLUMNS.items():
        meta = _meta(f"type of {column}", "like", types[0])
        if types is TEXT:
            suite.append(gxe.ExpectColumnValuesToBeOfType(column=column, type_=types[0], meta=meta))
        else:
            suite.append(gxe.ExpectColumnValuesToBeInTypeList(column=column, type_list=types, meta=meta))
        if column != "label":
            # An expectation of values holds where there are none.
            suite.append(
                gxe.ExpectColumnValuesToNotBeNull(
                    column=column, meta=_meta(f"missing {column}", "at most", 0)
                )
            )
    for column, (low, high) in RANGES.items():
        name = f"{column} below {low}" if high is None else f"{column} outside {low} to {high}"
        suite.append(
            gxe.ExpectColumnValuesToBeBetween(
                column=column, min_value=low, max_value=high, meta=_meta(name, "at most", 0)
            )
        )
    for split in ("train", "test"):
        suite.append(
            gxe.ExpectTableRowCountToBeBetween(
                min_value=parameters.min_images,
                row_condition=_in(split),
                meta=_meta(f"images in {split}", "at least", parameters.min_images, parameter="min_images"),
            )
        )
    return [
        *suite,
        _few(faults.DUPLICATE, parameters, "max_exact_duplicates"),
        _few(faults.NEAR_DUPLICATE, parameters, "max_near_duplicates", FailureSeverity.WARNING),
        _few(faults.LEAK, parameters, "max_leakage", row_condition=_in("test")),
        _few(
            faults.NEAR_LEAK,
            parameters,
            "max_near_leakage",
            FailureSeverity.WARNING,
            row_condition=_in("test"),
        ),
        _few(faults.CONSTANT, parameters, "max_constant"),
        *_expect_labels(rows, classes, parameters.min_class_balance),
    ]


def _expect_labels(rows: pd.DataFrame, classes: int, min_balance: float) -> list[Any]:
    if not classes:
        return [
            gxe.ExpectColumnValuesToBeNull(column="label", meta=_meta("label without classes", "at most", 0))
        ]
    balance = faults.class_balance(rows)
    suite = [
        gxe.ExpectColumnValuesToBeBetween(
            column="label",
            min_value=0,
            max_value=classes - 1,
            meta=_meta("label that is no class", "at most", 0),
        ),
        gxe.ExpectColumnDistinctValuesToContainSet(
            column="label",
            value_set=list(range(classes)),
            row_condition=_in("train"),
            # An unlabeled train split beside a labelled test split is no fault, only worth knowing.
            severity=FailureSeverity.CRITICAL if balance and min_balance else FailureSeverity.WARNING,
            meta=_meta("classes in train", "at least", classes),
        ),
    ]
    if balance:
        suite.append(
            gxe.ExpectColumnValuesToBeInSet(
                column=faults.RARE,
                value_set=[False],
                row_condition=_in("train"),
                meta=_meta(
                    faults.RARE, "at least", min_balance, parameter="min_class_balance", observed=balance
                ),
            )
        )
    return suite


def expect_drift(distances: pd.DataFrame, max_drift: float) -> list[Any]:
    """Return what is expected of the distances of `faults.drift`, one row."""
    return [
        gxe.ExpectColumnMaxToBeBetween(
            column=column,
            max_value=max_drift,
            meta=_meta(f"drift of {column}", "at most", max_drift, parameter="max_drift"),
        )
        for column in distances
    ]


def _meta(
    name: str, relation: str, bound: float | str, parameter: str = "", **observed: float
) -> dict[str, Any]:
    return {"name": name, "relation": relation, "bound": bound, "parameter": parameter, **observed}


def _in(split: str) -> Any:
    return Column("split") == split


def _few(
    fault: str,
    parameters: Validation,
    parameter: str,
    severity: FailureSeverity = FailureSeverity.CRITICAL,
    row_condition: Any = None,
) -> Any:
    share = getattr(parameters, parameter)
    return gxe.ExpectColumnValuesToBeInSet(
        column=fault,
        value_set=[False],
        mostly=1 - share,
        severity=severity,
        row_condition=row_condition,
        meta=_meta(fault, "at most", share, parameter=parameter),
    )


def run(rows: pd.DataFrame, suite: list[Any]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Hold the rows against the suite, without a network, a file or a progress bar.

    Returns:
        A result per expectation, in the order of the suite, with nothing that differs between runs: {"name",
        "severity", "success", "observed" (a share of the rows looked at, a count, a distance or a type),
        "relation", "bound", "parameter": what sets the bound, or "", "offenders": count, "ids": the first ones};
        and by name the positions of all offenders: int64.
    """
    context = gx.get_context(
        mode="ephemeral",
        project_config=DataContextConfig(
            store_backend_defaults=InMemoryStoreBackendDefaults(),
            progress_bars=ProgressBarsConfig(globally=False),
            analytics_enabled=False,
        ),
    )
    asset = context.data_sources.add_pandas("table").add_dataframe_asset("rows")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": rows})
    validation = batch.validate(gx.ExpectationSuite("table", expectations=suite), result_format="BASIC")
    # They come in an order of their own.
    found = {result.expectation_config.meta["name"]: result for result in validation.results}  # type: ignore[union-attr]
    results, offending = [], {}
    for expectation in suite:
        meta = expectation.meta
        looked_at, positions = _offending(rows, expectation)
        offending[meta["name"]] = positions
        result = found[meta["name"]]
        observed = meta.get("observed", result.result.get("observed_value"))
        if not result.result:  # it raised: texts have no range
            observed = "no comparable values"
        elif isinstance(expectation, gxe.ExpectColumnDistinctValuesToContainSet):
            observed = meta["bound"] - result.result["missing_count"]
        elif observed is None:
            observed = len(positions) / max(looked_at, 1)
        results.append(
            {
                "name": meta["name"],
                "severity": expectation.severity.value,
                "success": bool(result.success),
                "observed": observed.item() if isinstance(observed, np.generic) else observed,
                "relation": meta["relation"],
                "bound": meta["bound"],
                "parameter": meta["parameter"],
                "offenders": len(positions),
                "ids": ids(rows, positions[:IDS]),
            }
        )
    return results, offending


def ids(rows: pd.DataFrame, positions: Sequence[int] | np.ndarray) -> list[str]:
    """Return the ids of the rows at `positions`, `row n` where there is none."""
    return [
        f"row {position}" if pd.isna(name) else str(name)
        for position, name in ((position, rows["id"].iloc[position]) for position in positions)
    ]


def _offending(rows: pd.DataFrame, expectation: Any) -> tuple[int, np.ndarray]:
    """Return how many rows an expectation looks at, and the positions of all that break it.

    Great Expectations can list them too, at ten times the cost.
    """
    condition = getattr(expectation, "row_condition", None)
    looked_at = np.ones(len(rows), bool)
    if condition:
        looked_at = (rows[condition.column.name] == condition.parameter).to_numpy(bool, na_value=False)
    breaks = pd.Series(False, rows.index)
    if isinstance(expectation, gxe.ExpectColumnValuesToNotBeNull):
        breaks = rows[expectation.column].isna()
    elif isinstance(expectation, gxe.ExpectColumnValuesToBeNull):
        breaks = rows[expectation.column].notna()
    elif isinstance(expectation, gxe.ExpectColumnValuesToBeUnique):
        breaks = rows[expectation.column].duplicated(keep=False)
    elif isinstance(expectation, gxe.ExpectColumnValuesToBeInSet):
        breaks = rows[expectation.column].notna() & ~rows[expectation.column].isin(expectation.value_set)
    elif isinstance(expectation, gxe.ExpectColumnValuesToBeBetween):
        values = pd.to_numeric(rows[expectation.column], errors="coerce").astype("float64")
        high = math.inf if expectation.max_value is None else expectation.max_value
        breaks = (values < expectation.min_value) | (values > high)
    return int(looked_at.sum()), np.flatnonzero(breaks.to_numpy(bool) & looked_at)
