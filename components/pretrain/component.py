from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pretrain(
    method: dict,
    encoder: dict,
    training: dict,
    seed: int,
    data_digest: str,
    code_digest: str,
    table: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train an encoder with one learning signal."""
    import shutil
    from pathlib import Path

    from components.pretrain import train_job
    from unlabeled.lineage.step import step
    from unlabeled.parameters import Encoder, Training, validated
    from unlabeled.training import pretrain
    from unlabeled.workspace import checkpoint_folder

    with step(
        f"pretrain/{method['name']}", {"table": table}, {"model": model}, code_digest, metrics
    ) as result:
        net, settings = validated(Encoder, encoder, "encoder"), validated(Training, training, "training")
        key = [method, net.model_dump(), settings.model_dump(), seed, table.metadata["digest"], code_digest]
        checkpoints = checkpoint_folder(*key)
        train = train_job.pretrain if train_job.wanted() else pretrain.pretrain
        result.update(train(Path(table.path), Path(model.path), method, net, settings, seed, checkpoints))
        # They serve an unfinished training; a finished one that is asked for anew starts anew.
        shutil.rmtree(checkpoints, ignore_errors=True)
