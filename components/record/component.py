from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def record(
    run: str,
    job: str,
    source: str,
    parameters: str,
    reference: str,
    registry: str,
    remote: str,
    data_digest: str,
    code_digest: str,
    raw: dsl.Input[dsl.Dataset],
    table: dsl.Input[dsl.Dataset],
    validation: dsl.Input[dsl.Artifact],
    baselines: dsl.Input[dsl.Artifact],
    models: dsl.Input[list[dsl.Model]],
    labels: dsl.Input[list[dsl.Dataset]],
    evaluations: dsl.Input[list[dsl.Artifact]],
    selection: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    model_labels: dsl.Input[dsl.Dataset],
    classifier: dsl.Input[dsl.Model],
    repository: dsl.Input[dsl.Model],
    index: dsl.Input[dsl.Dataset],
    serving: dsl.Input[dsl.Artifact],
    bundle: dsl.Output[dsl.Artifact],
):
    """Write the run record and push it with every artifact to the registry."""
    import json
    from pathlib import Path

    from unlabeled.lineage.record import method_artifacts, record
    from unlabeled.lineage.step import step

    artifacts = {"raw": raw, "table": table, "validation": validation, "baselines": baselines}
    artifacts |= method_artifacts(models, labels, evaluations)
    artifacts |= {"selection": selection, "model": model, "labels": model_labels, "classifier": classifier}
    artifacts |= {"repository": repository, "index": index, "serving": serving}
    with step("record", artifacts, {"bundle": bundle}, code_digest) as result:
        data = {"source": source, "digest": data_digest, "reference": reference}
        name = run.replace("{job}", job[:8])
        result.update(
            record(name, artifacts, json.loads(parameters), data, registry, remote, Path(bundle.path))
        )
