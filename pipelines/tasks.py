"""The tasks of a pipeline that is made already: what each is given beside its inputs."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from kfp import dsl
from kfp.dsl import pipeline_context

from unlabeled.workspace import THREADS


def with_tasks(pipeline: Any, settle: Callable[[str, dsl.PipelineTask], None], **options: Any) -> Any:
    """Return a pipeline each of whose tasks went through `settle`; the one given stays as it is.

    Args:
        pipeline: made by `dsl.pipeline`.
        settle: takes a component's name, `self_label`, and its task.
        options: of `dsl.pipeline`.
    """
    build = pipeline.pipeline_func

    @functools.wraps(build)
    def settled(*arguments: Any, **named: Any) -> Any:
        outputs = build(*arguments, **named)
        for task in pipeline_context.Pipeline.get_default_pipeline().tasks.values():
            settle(task.component_spec.name.replace("-", "_"), task)
        return outputs

    return dsl.pipeline(name=pipeline.name, description=pipeline.description, **options)(settled)


def with_threads(pipeline: Any, threads: Mapping[str, str]) -> Any:
    """Return a pipeline whose steps have the OMP_NUM_THREADS given by component, and the others this process's."""

    def settle(name: str, task: dsl.PipelineTask) -> None:
        if name in threads:
            task.set_env_variable(THREADS, threads[name])

    return with_tasks(pipeline, settle)
