"""What a run was made from: its record, and its steps as a graph of digests."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlabeled.files import read_json
from unlabeled.lineage.chain import inputs, open_inputs

# Pixels: width and height of a node, and the gaps between nodes.
NODE_WIDTH, NODE_HEIGHT = 106, 44
GAP_X, GAP_Y = 13, 14


def lineage(path: Path) -> dict[str, Any] | None:
    """Return what the page shows of the run record at `path`, None where there is none."""
    if not path.is_file():
        return None
    record = read_json(path)
    build, run = record["predicate"]["buildDefinition"], record["predicate"]["runDetails"]
    steps = record["predicate"]["steps"]
    data, code = build["resolvedDependencies"]
    return {
        "digest": record["digest"],
        "data": data,
        "code": code,
        "parameters": build["externalParameters"]["digest"],
        "settings": dict(_flat(build["externalParameters"]["parameters"])),
        "environment": run["builder"]["environment"],
        "metadata": run["metadata"],
        "files": len(record["subject"]),
        # Waiting and start-up between the steps count too: this is how long the run took.
        "seconds": max(step["ended"] for step in steps) - min(step["started"] for step in steps),
        "longest": max(step["seconds"] for step in steps) or 1,
        "steps": [{**step, "reads": list(inputs(step))} for step in steps],
        "open": open_inputs(steps),
        "graph": graph(steps),
    }


def graph(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the graph of the steps in pixels, laid out in layers; the steps of several methods are one node.

    An arrow stands where one step reads the bytes that an earlier one wrote; an arrow that a longer way
    already implies is left out.

    Args:
        steps: records of steps, each after those that it read from.

    Returns:
        width, height; nodes: {"name", "x", "y", "width", "height", "count", "seconds"}; edges: {"x1", "y1",
        "x2", "y2"}, from the right of a node to the left of another.
    """
    members: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    writers: dict[str, set[str]] = defaultdict(set)
    parents: dict[str, set[str]] = defaultdict(set)
    for step in steps:
        kind = step["name"].split("/")[0]
        members[kind].append(step)
        for _, digest in inputs(step):
            parents[kind] |= writers[digest] - {kind}
        for digest in step["outputs"].values():
            writers[digest].add(kind)

    # Only arrows from kinds that come earlier: the graph has no cycle.
    ancestors: dict[str, set[str]] = {}
    column: dict[str, int] = {}
    nodes: dict[str, dict[str, Any]] = {}
    for kind in members:
        parents[kind] &= nodes.keys()
        ancestors[kind] = parents[kind].union(*(ancestors[parent] for parent in parents[kind]))
        column[kind] = max((column[parent] + 1 for parent in parents[kind]), default=0)
        nodes[kind] = {
            "name": kind,
            "x": column[kind] * (NODE_WIDTH + GAP_X),
            "y": list(column.values())[:-1].count(column[kind]) * (NODE_HEIGHT + GAP_Y),
            "width": NODE_WIDTH,
            "height": NODE_HEIGHT,
            "count": len(members[kind]),
            "seconds": sum(step["seconds"] for step in members[kind]),
        }
    edges = [
        {
            "x1": nodes[parent]["x"] + NODE_WIDTH,
            "y1": nodes[parent]["y"] + NODE_HEIGHT / 2,
            "x2": nodes[kind]["x"],
            "y2": nodes[kind]["y"] + NODE_HEIGHT / 2,
        }
        for kind in nodes
        for parent in sorted(parents[kind])
        if not any(parent in ancestors[other] for other in parents[kind])
    ]
    return {
        "width": max(node["x"] for node in nodes.values()) + NODE_WIDTH,
        "height": max(node["y"] for node in nodes.values()) + NODE_HEIGHT,
        "nodes": list(nodes.values()),
        "edges": edges,
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
