"""The record of a run: an in-toto Statement with SLSA provenance over everything that its steps wrote.

https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1. The record depends on the artifacts, the
parameters, the code and the environment of the recorder, not on the clock: recording again gives the same bytes.
Recorded again on another machine, a run keeps the record that the registry has.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unlabeled import __version__
from unlabeled.digest import Digests, blocks, files_below, json_digest, stream_digests
from unlabeled.environment import environment
from unlabeled.errors import CheckFailed
from unlabeled.files import atomic_path, link_or_copy, read_json, write_json
from unlabeled.lineage.chain import Content, Step, open_inputs, ordered
from unlabeled.lineage.git import source_commit
from unlabeled.lineage.leaderboard import leaderboard
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.signature import sign
from unlabeled.lineage.step import DIGEST, STEP, ArtifactLike, step_record
from unlabeled.lineage.tracked import PROVENANCE, RECORD, STATEMENT, write_tracked
from unlabeled.parameters import Parameters, validated

BUILD_TYPE, BUILDER = "urn:unlabeled:training:v1", "urn:unlabeled:pipeline"


def record(
    run: str,
    artifacts: Mapping[str, ArtifactLike],
    parameters: Mapping[str, Any],
    data: Mapping[str, Any],
    registry: str,
    remote: str,
    bundle: Path,
) -> dict[str, Any]:
    """Lay out a run's bundle, prove its chain, write its record and push both to the registry.

    Args:
        run: name of the run.
        artifacts: by their path in the bundle (`table`, `methods/simclr/model`); each carries its digest and
            the record of its step as metadata. `raw` is the data as it came, `table` the image table.
        parameters: all parameters of the run.
        data: `source`, `digest` (DVC's, of the raw files) and `reference`, an earlier run that drift was
            measured against, or an empty string.
        registry, remote: git URL and DVC URL; empty: nothing is pushed.
        bundle: folder to write: the artifacts, record.json, leaderboard.json, metrics.json, params.yaml,
            dvc.yaml and bundle.dvc; record.sig where UNLABELED_SIGNING_KEY names a key. Of a run that the
            registry holds already, record.json and record.sig are the registry's.

    Returns:
        run, digest (of the record), files, bytes, selected, and what `Registry.push` returns.

    Raises:
        CheckFailed: bytes differ from what their step signed; a step read what no step wrote; steps ran
            different code; the raw data are not the pinned data; the registry does not keep what it is given.
        InputError: a parameter or the signing key is wrong, or the registry cannot be written.
    """
    values = validated(Parameters, parameters).model_dump(mode="json")
    makers = {name: _signed(name, artifact) for name, artifact in artifacts.items()}
    steps = ordered(makers.values())
    with atomic_path(bundle) as folder:
        for name, artifact in artifacts.items():
            link_or_copy(artifact.path, folder / name)
        files = {name: _digests(file) for name, file in files_below(folder).items()}
        content = Content(
            sha256={name: file.sha256 for name, file in files.items()},
            md5={name: file.md5 for name, file in files.items()},
        )
        _check_bytes(artifacts, makers, content)
        _check_chain(steps)
        if content.dvc("raw") != data["digest"]:
            raise CheckFailed(
                f"the raw data have the DVC digest {content.dvc('raw')}, pinned is {data['digest']}"
            )
        described = _described(data, folder)
        board = leaderboard(folder, run, described, makers)
        tracked = write_tracked(
            folder, board, values, content, {name: file.size for name, file in files.items()}
        )
        statement = {
            "_type": STATEMENT,
            "subject": [_descriptor(name, file) for name, file in files.items()],
            "predicateType": PROVENANCE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {"parameters": values, "digest": json_digest(values)},
                    "internalParameters": {},
                    "resolvedDependencies": [_data(described), _code(steps[0]["code"])],
                },
                "runDetails": {
                    "builder": {
                        "id": BUILDER,
                        "version": {"unlabeled": __version__},
                        "environment": environment(),
                    },
                    "metadata": {
                        "invocationId": run,
                        "startedOn": _time(min(step["started"] for step in steps)),
                        "finishedOn": _time(max(step["ended"] for step in steps)),
                    },
                    "byproducts": [_descriptor(name, _digests(folder / name)) for name in tracked],
                },
                "steps": steps,
                "artifacts": {
                    name: {"step": makers[name]["name"], "digest": content.tree(name)} for name in artifacts
                },
            },
        }
        statement["digest"] = json_digest(statement)
        write_json(folder / RECORD, statement)
        sign(folder / RECORD)
    pushed = Registry(registry, remote).push(run, bundle) if registry else {}
    return {
        "run": run,
        "digest": read_json(bundle / RECORD)["digest"],
        "files": len(files),
        "bytes": sum(file.size for file in files.values()),
        "selected": board["selected"],
        **pushed,
    }


def method_artifacts(
    models: Sequence[ArtifactLike], labels: Sequence[ArtifactLike], evaluations: Sequence[ArtifactLike]
) -> dict[str, ArtifactLike]:
    """Return the methods' artifacts by their path in the bundle; labels and evaluation go to their model."""
    names = {
        model.metadata[DIGEST]: read_json(Path(model.path) / "config.json")["method"] for model in models
    }
    found = {f"methods/{names[model.metadata[DIGEST]]}/model": model for model in models}
    for kind, artifacts in (("labels", labels), ("evaluation", evaluations)):
        for artifact in artifacts:
            found[f"methods/{names[step_record(artifact)['inputs']['model']]}/{kind}"] = artifact
    return dict(sorted(found.items()))


def dependency(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what a record tells of `data` or `code`."""
    entries = record["predicate"]["buildDefinition"]["resolvedDependencies"]
    return next(entry for entry in entries if entry["name"] == name)


def describe(record: Mapping[str, Any]) -> list[str]:
    """Return a record as lines for a reader."""
    predicate = record["predicate"]
    details, data, code = predicate["runDetails"], dependency(record, "data"), dependency(record, "code")
    environment = details["builder"]["environment"]
    size = sum(subject["annotations"]["size"] for subject in record["subject"])
    gpus = ", ".join(environment["gpus"]) or "none"
    dirty = ", with changes" if code["annotations"]["dirty"] else ""
    lines = [
        f"run       {details['metadata']['invocationId']}",
        f"started   {details['metadata']['startedOn']}",
        f"finished  {details['metadata']['finishedOn']}",
        f"data      {data['uri']}, DVC {data['digest']['dvc']}",
        f"code      {code['digest']['tree']}, commit {code['digest'].get('gitCommit', 'unknown')}{dirty}",
        f"machine   {environment['cpu']}, {environment['cores']} cores, GPUs: {gpus}",
        f"python    {environment['python']}, {len(environment['distributions'])} distributions",
        f"record    {record['digest']}",
        f"artifacts {len(record['subject'])} files, {size / 1e6:.1f} MB",
        "",
        f"{'step':28} {'seconds':>9}  writes",
    ]
    for step in predicate["steps"]:
        written = ", ".join(f"{name} {digest[:12]}" for name, digest in step["outputs"].items())
        lines.append(f"{step['name']:28} {step['seconds']:9.1f}  {written}")
    return lines


def _signed(name: str, artifact: ArtifactLike) -> Step:
    if STEP not in artifact.metadata or DIGEST not in artifact.metadata:
        raise CheckFailed(f"artifact {name} carries no record of the step that made it")
    return step_record(artifact)


def _check_bytes(artifacts: Mapping[str, ArtifactLike], makers: Mapping[str, Step], content: Content) -> None:
    for name, artifact in artifacts.items():
        digest, signed = content.tree(name), artifact.metadata[DIGEST]
        if digest != signed or digest not in makers[name]["outputs"].values():
            raise CheckFailed(
                f"artifact {name} has digest {digest[:12]}, its step {makers[name]['name']} signed "
                f"{signed[:12]}: the bytes at {artifact.path} were changed; remove them and run again"
            )


def _check_chain(steps: Sequence[Step]) -> None:
    for reader, name, digest in open_inputs(steps):
        raise CheckFailed(
            f"step {reader} read {name} with digest {digest[:12]}, which no step before it wrote"
        )
    first = steps[0]
    for step in steps:
        if step["code"] != first["code"]:
            raise CheckFailed(
                f"step {step['name']} ran code {step['code'][:12]}, "
                f"step {first['name']} ran code {first['code'][:12]}"
            )


def _described(data: Mapping[str, Any], bundle: Path) -> dict[str, Any]:
    """The data as told, and as their table tells."""
    summary = read_json(bundle / "table" / "summary.json")
    told = {key: summary[key] for key in ("counts", "classes", "channels", "image_size") if key in summary}
    return {**data, **told}


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    annotations = {key: value for key, value in data.items() if key not in ("source", "digest")}
    return {
        "name": "data",
        "uri": data["source"],
        "digest": {"dvc": data["digest"]},
        "annotations": annotations,
    }


def _code(tree: str) -> dict[str, Any]:
    commit, dirty = source_commit()
    digest = {"tree": tree, **({"gitCommit": commit} if commit else {})}
    return {"name": "code", "digest": digest, "annotations": {"dirty": dirty}}


def _descriptor(name: str, file: Digests) -> dict[str, Any]:
    return {
        "name": name,
        "digest": {"sha256": file.sha256, "md5": file.md5},
        "annotations": {"size": file.size},
    }


def _digests(path: Path) -> Digests:
    with open(path, "rb") as file:
        return stream_digests(blocks(file))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
