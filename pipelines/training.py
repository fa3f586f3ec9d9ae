"""The pipeline: from a source of images to a served, recorded, reported model."""

import functools
import inspect
from typing import Any, NamedTuple

from kfp import dsl

from components.baselines.component import baselines
from components.check_serving.component import check_serving
from components.check_validation.component import check_validation
from components.evaluate.component import evaluate
from components.export.component import export
from components.finetune.component import finetune
from components.ingest.component import ingest
from components.pin.component import pin
from components.pretrain.component import pretrain
from components.record.component import record
from components.report.component import report
from components.select.component import select
from components.self_label.component import self_label
from components.validate.component import validate


class Outputs(NamedTuple):
    bundle: dsl.Artifact
    report: dsl.HTML


@dsl.pipeline(name="unlabeled-training", description="From unlabeled images to a served, audited model")
def training(
    run: str,
    source: str,
    data_digest: str,
    code_digest: str,
    registry: str,
    remote: str,
    reference: str,
    seed: int,
    threads: int,
    methods: list,
    ingest_parameters: dict,
    validation_parameters: dict,
    encoder_parameters: dict,
    training_parameters: dict,
    self_label_parameters: dict,
    evaluation_parameters: dict,
    finetuning_parameters: dict,
    export_parameters: dict,
    parameters: str,
) -> Outputs:
    """Every step takes the digests of data and code, so that no cache can serve a result of other data or code.

    Args:
        run: name under which the run is recorded; `{job}` in it becomes the beginning of KFP's id of the run.
        source: what `ingest` reads.
        data_digest: DVC's digest of the source.
        code_digest: digest of the four packages.
        registry: git URL of the registry.
        remote: URL of its DVC remote.
        reference: an earlier run whose table drift is measured against, or an empty string.
        seed: seed of everything random.
        threads: CPU threads of a method's steps; 0: all.
        methods: learning signals, each {"name": …, settings …}.
        parameters: all parameters of the run as JSON, for the record; each `…_parameters` is a section of them.
    """
    common = {"data_digest": data_digest, "code_digest": code_digest}
    ingested = ingest(source=source, parameters=ingest_parameters, **common)
    table = ingested.outputs["table"]
    validated = validate(
        table=table,
        parameters=validation_parameters,
        reference=reference,
        registry=registry,
        remote=remote,
        **common,
    )
    # A step of its own: of one that fails, servers before 2.16 keep nothing, not even the page of what failed.
    accepted = check_validation(validation=validated.outputs["validation"], **common)
    floor = baselines(
        table=table,
        parameters=evaluation_parameters,
        methods=methods,
        encoder=encoder_parameters,
        seed=seed,
        **common,
    ).after(accepted)

    with dsl.ParallelFor(methods, name="methods") as method:
        pretrained = pretrain(
            method=method,
            encoder=encoder_parameters,
            training=training_parameters,
            seed=seed,
            table=table,
            **common,
        ).after(accepted)
        model = pretrained.outputs["model"]
        probe = {"method": method, "table": table, "model": model, "seed": seed, "threads": threads, **common}
        labelled = self_label(parameters=self_label_parameters, **probe)
        evaluated = evaluate(parameters=evaluation_parameters, **probe)

    # A Collected serves one consumer: the compiler alters it.
    def candidates() -> dict[str, dsl.Collected]:
        return {
            "models": dsl.Collected(model),
            "labels": dsl.Collected(labelled.outputs["labels"]),
            "evaluations": dsl.Collected(evaluated.outputs["evaluation"]),
        }

    selected = select(**candidates(), **common)
    chosen = {"table": table, "model": selected.outputs["model"], "labels": selected.outputs["model_labels"]}
    classifier = finetune(parameters=finetuning_parameters, seed=seed, **chosen, **common).outputs[
        "classifier"
    ]
    exported = export(parameters=export_parameters, classifier=classifier, **chosen, **common)
    served = {name: exported.outputs[name] for name in ("repository", "index")}
    serving = check_serving(parameters=export_parameters, **served, **common).outputs["serving"]

    recorded = record(
        run=run,
        job=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        source=source,
        parameters=parameters,
        reference=reference,
        registry=registry,
        remote=remote,
        raw=ingested.outputs["raw"],
        table=table,
        validation=validated.outputs["validation"],
        baselines=floor.outputs["baselines"],
        selection=selected.outputs["selection"],
        model=selected.outputs["model"],
        model_labels=selected.outputs["model_labels"],
        classifier=classifier,
        serving=serving,
        **served,
        **candidates(),
        **common,
    )
    recorded.set_caching_options(enable_caching=False)
    page = report(bundle=recorded.outputs["bundle"], **common)
    return Outputs(bundle=recorded.outputs["bundle"], report=page.outputs["report"])


@dsl.pipeline(name=training.name, description=training.description)
@functools.wraps(training.pipeline_func)
def training_on_fresh_data(*arguments: Any) -> Any:
    """The same for a schedule: a digest or a reference that is empty is found anew when a run starts."""
    asked = inspect.signature(training.pipeline_func).bind(*arguments).arguments
    pinned = pin(**{name: asked[name] for name in pin.component_spec.inputs})
    pinned.set_caching_options(enable_caching=False)
    return training.pipeline_func(**{**asked, **pinned.outputs})
