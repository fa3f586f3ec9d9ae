import os
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from serving_fixtures import CLASSES, CLUSTERS, exported_run, make_run, smooth_images
from torch.nn import functional as F

from serving.index import Index, write_index
from serving.repository import model_config, read_config, read_labels, write_model
from unlabeled.data.images import read_image
from unlabeled.digest import tree_digest
from unlabeled.errors import CheckFailed, InputError
from unlabeled.export.models import KINDS, cluster_classes, fit, load_served
from unlabeled.export.onnx import IR_VERSION, OPSET, OnnxModel, initializers, load_onnx, onnx_digest
from unlabeled.export.parity import compare, difference, onnx_equals_checkpoint, torch_outputs
from unlabeled.files import write_json


@pytest.fixture(scope="module")
def run():
    return exported_run()


def test_fit_leaves_images_of_the_training_size_as_they_are():
    images = torch.from_numpy(smooth_images(3, 3, 28, 28, seed=0))
    assert torch.equal(fit(images, (28, 28)), images.float())


@pytest.mark.parametrize("side", [1, 9, 27, 29, 61, 224, 1000])
def test_fit_equals_torch_antialias(side):
    images = torch.from_numpy(smooth_images(2, 3, side, side, seed=side))
    expected = F.interpolate(images.float(), (28, 28), mode="bilinear", antialias=True)
    assert (fit(images, (28, 28)) - expected).abs().max() < 1e-3


@pytest.mark.parametrize(("height", "width"), [(40, 90), (90, 40), (31, 64), (10, 25), (16, 17)])
@pytest.mark.parametrize("channels", [1, 3])
def test_fit_equals_what_ingest_does_with_a_file(tmp_path, height, width, channels):
    pixels = smooth_images(1, channels, height, width, seed=3)
    Image.fromarray(pixels[0].transpose(1, 2, 0).squeeze()).save(tmp_path / "image.png")
    ingested, _, _ = read_image(tmp_path / "image.png", "L" if channels == 1 else "RGB", 16, 10**6)
    # Pillow rounds to 8 bits after each of its two passes.
    assert np.abs(fit(torch.from_numpy(pixels), (16, 16)).numpy()[0] - ingested).max() <= 1


def test_fit_crops_the_centre():
    images = torch.zeros(1, 1, 8, 20, dtype=torch.uint8)
    images[..., 6:14] = 200
    assert (fit(images, (8, 8)) == 200).all()


@pytest.mark.parametrize("kind", KINDS)
def test_opset_and_ir_version_load_everywhere(run, kind):
    model = load_onnx(run.repository / kind / "1" / "model.onnx")
    assert (model.ir_version, [(entry.domain, entry.version) for entry in model.opset_import]) == (
        8,
        [("", 18)],
    )
    assert (IR_VERSION, OPSET) == (8, 18)
    (images,), (output,) = model.graph.input, model.graph.output
    assert images.name == "images" and images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dims = images.type.tensor_type.shape.dim
    assert [bool(dim.dim_param) for dim in dims] == [True, False, True, True] and dims[1].dim_value == 3
    assert output.name == ("embedding" if kind == "encoder" else "probabilities")


def test_batch_norm_is_folded_and_traces_are_gone(run):
    for kind in KINDS:
        model = load_onnx(run.repository / kind / "1" / "model.onnx")
        assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert b"/" + b"unlabeled/export" not in (run.repository / kind / "1" / "model.onnx").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(1, 3, 16, 16), (65, 3, 16, 16), (2, 3, 40, 16), (3, 3, 5, 90), (1, 3, 1, 1)]
)
def test_onnx_equals_torch_on_any_batch_and_size(run, kind, shape):
    images = run.images(shape[0], seed=7, height=shape[2], width=shape[3])
    expected = torch_outputs(load_served(kind, **run.inputs), images)
    answer = OnnxModel(run.repository / kind / "1" / "model.onnx")(images)
    assert np.abs(expected - answer).max() < 1e-5
    if kind != "encoder":
        assert answer.shape == (shape[0], len(CLASSES) if kind == "classifier" else CLUSTERS)
        assert np.abs(answer.sum(1) - 1).max() < 1e-6


def test_encoder_is_the_checkpoints_own(run):
    from unlabeled.nets.encoder import load_encoder

    images = run.images(4, seed=9)
    with torch.inference_mode():
        features = load_encoder(run.inputs["model"])(torch.from_numpy(images).float() / 255).numpy()
    assert np.abs(OnnxModel(run.repository / "encoder" / "1" / "model.onnx")(images) - features).max() < 1e-5


def test_clusterer_is_the_softmax_of_the_clusters_logits(run):
    from safetensors.numpy import load_file

    images = run.images(6, seed=4)
    features = OnnxModel(run.repository / "encoder" / "1" / "model.onnx")(images).astype(np.float64)
    clusters = load_file(run.inputs["labels"] / "clusters.safetensors")
    z = (features - clusters["mean"]) / clusters["scale"]
    logits = np.exp(z @ clusters["weight"].T + clusters["bias"])
    answer = OnnxModel(run.repository / "clusterer" / "1" / "model.onnx")(images)
    assert np.abs(answer - logits / logits.sum(1, keepdims=True)).max() < 1e-5


def test_clusters_know_the_class_matched_to_them(run, tmp_path):
    assert Index(run.index).models["clusterer"]["classes"] == [
        CLASSES[2],
        "",
        CLASSES[0],
        CLASSES[3],
        CLASSES[1],
    ]
    write_json(tmp_path / "scores.json", {"k": 5})
    assert cluster_classes(tmp_path, []) == []


def test_step_reports_parity_and_writes_what_serving_needs(run):
    for kind in KINDS:
        assert run.result[f"{kind}_difference"] < 1e-5 and run.result[f"{kind}_cosine"] > 1 - 1e-6
    index = Index(run.index)
    train = [f"image-{i:03d}" for i in range(60)]
    assert (
        len(index.ids) == 40
        and set(index.ids) <= set(train)
        and index.ids[0] == train[0]
        and index.ids[-1] == train[-1]
    )
    assert index.embeddings.dtype == np.float16 and np.allclose(
        np.linalg.norm(index.embeddings, axis=1), 1, atol=1e-3
    )
    assert index.thumbnails.shape == (40, 3, 16, 16) and index.thumbnails.dtype == np.uint8
    assert (index.thumbnails[0] == run.images(80, seed=2)[0]).all()
    assert (
        read_labels(run.repository, "classifier") == CLASSES and read_labels(run.repository, "encoder") == []
    )
    embeddings = OnnxModel(run.repository / "encoder" / "1" / "model.onnx")(index.thumbnails[5:8])
    positions, similarities = index.nearest(embeddings, 3)
    assert positions[:, 0].tolist() == [5, 6, 7] and similarities[0, 0] == pytest.approx(1, abs=1e-3)
    assert (np.diff(similarities, axis=1) <= 0).all()


def test_config_is_portable(run):
    config = read_config(run.repository / "classifier" / "config.pbtxt")
    assert config.backend == "onnxruntime" and config.max_batch_size == 32
    assert config.HasField("dynamic_batching") and not config.dynamic_batching.max_queue_delay_microseconds
    assert list(config.input[0].dims) == [3, -1, -1] and list(config.output[0].dims) == [len(CLASSES)]
    assert not config.instance_group
    groups = model_config("m", 1, "probabilities", 2, 8, instances=3).instance_group
    assert [(group.count, group.kind) for group in groups] == [(3, groups[0].KIND_AUTO)]


def test_labels_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match="3 outputs but 2 class names"):
        write_model(tmp_path, model_config("m", 1, "probabilities", 3, 8, labelled=True), b"", ["a", "b"])


def test_a_typo_in_the_configuration_is_named(tmp_path):
    (tmp_path / "config.pbtxt").write_text('name: "m"\nmax_batchsize: 3\n')
    with pytest.raises(InputError, match="max_batchsize"):
        read_config(tmp_path / "config.pbtxt")


@pytest.mark.slow
def test_same_bytes_from_elsewhere(run, tmp_path):
    again = make_run(tmp_path / "another place" / "run")
    code = (
        "import pathlib, sys; from unlabeled.export.models import load_served;"
        "from unlabeled.export.onnx import onnx_bytes;"
        "folder = pathlib.Path(sys.argv[1]); names = ('model', 'labels', 'classifier');"
        "served = load_served('clusterer', *(folder / name for name in names));"
        "pathlib.Path('model.onnx').write_bytes(onnx_bytes(served))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, str(again.folder)], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "model.onnx").read_bytes() == (
        run.repository / "clusterer" / "1" / "model.onnx"
    ).read_bytes()


def test_same_index_later(run, tmp_path):
    index = Index(run.index)
    arrays = {name: getattr(index, name) for name in ("ids", "embeddings", "thumbnails", "held_out")}
    # A zip archive keeps times to two seconds.
    time.sleep(max(0, run.index.stat().st_mtime + 2.5 - time.time()))
    write_index(tmp_path / "index", arrays, index.golden, index.models)
    assert tree_digest(tmp_path / "index") == tree_digest(run.index)


def test_file_equals_its_checkpoint(run):
    path = run.repository / "classifier" / "1" / "model.onnx"
    assert onnx_equals_checkpoint(path, "classifier", **run.inputs) == []


def changed(path, target, name, change):
    """A copy of an ONNX file in which one weight is another."""
    model = load_onnx(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(name))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] = change(values.flat[0])
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, target)
    return target


@pytest.mark.slow
def test_the_smallest_change_of_a_weight_is_named(run, tmp_path):
    path = run.repository / "encoder" / "1" / "model.onnx"
    other = changed(
        path, tmp_path / "model.onnx", "conv1.weight", lambda value: np.nextafter(value, np.float32(9))
    )
    (named,) = onnx_equals_checkpoint(other, "encoder", **run.inputs)
    assert "conv1.weight (1 in all)" in named and "weights differ" in named
    assert onnx_digest(other) != onnx_digest(path)


def test_other_answers_are_named(run, tmp_path):
    path = run.repository / "classifier" / "1" / "model.onnx"
    other = changed(path, tmp_path / "model.onnx", "head.bias", lambda value: value + 0.1)
    differences = onnx_equals_checkpoint(other, "classifier", **run.inputs)
    assert "head.bias" in differences[0] and "differs from torch" in differences[1]
    with pytest.raises(CheckFailed, match=r"differs from torch by .*export.tolerance"):
        compare(load_served("classifier", **run.inputs), other, run.images(4), tolerance=1e-5)


def test_another_producer_than_the_recorded_torch_is_named(run, tmp_path):
    model = load_onnx(run.repository / "classifier" / "1" / "model.onnx")
    model.producer_version = "2.8.0"
    onnx.save(model, tmp_path / "model.onnx")
    lines = onnx_equals_checkpoint(tmp_path / "model.onnx", "classifier", **run.inputs)
    assert "was written by pytorch 2.8.0, the recorded step ran torch" in lines[0]
    assert "the graph is not what the checkpoint makes" in lines[1]
    # That torch is not here: its file is proven by its outputs.
    assert not onnx_equals_checkpoint(
        tmp_path / "model.onnx", "classifier", **run.inputs, torch_version="2.8.0"
    )


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"GIF89a" + data[:200], id="other format"),
    ],
)
def test_broken_onnx_is_named(run, tmp_path, spoil):
    path = tmp_path / "model.onnx"
    path.write_bytes(spoil((run.repository / "encoder" / "1" / "model.onnx").read_bytes()))
    for read in (load_onnx, OnnxModel, onnx_digest):
        with pytest.raises(InputError, match=r"model\.onnx") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_missing_files_are_named(run, tmp_path):
    with pytest.raises(InputError, match=r"gone\.onnx"):
        load_onnx(tmp_path / "gone.onnx")
    with pytest.raises(InputError, match=r"clusters\.safetensors is missing"):
        load_served("clusterer", run.inputs["model"], tmp_path, run.inputs["classifier"])
    with pytest.raises(InputError, match="no served model 'decoder'"):
        load_served("decoder", **run.inputs)
    (tmp_path / "clusters.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no safetensors file"):
        load_served("clusterer", run.inputs["model"], tmp_path, run.inputs["classifier"])


def test_difference_sees_what_it_should():
    reference = np.array([[0.2, 0.8], [0.6, 0.4]], np.float32)
    same = difference(reference, reference)
    assert (
        same["max_difference"] == 0 and same["min_cosine"] == pytest.approx(1) and same["top1_agreement"] == 1
    )
    swapped = difference(reference, reference[:, ::-1])
    assert swapped["max_difference"] == pytest.approx(0.6) and swapped["top1_agreement"] == 0
    assert difference(100 * reference, 100 * reference + 1)["max_difference"] == pytest.approx(1 / 80)
    assert difference(reference, reference * np.nan)["max_difference"] == float("inf")
    assert difference(reference, reference[:1])["max_difference"] == float("inf")


def test_digest_of_weights_ignores_their_order(run, tmp_path):
    path = run.repository / "encoder" / "1" / "model.onnx"
    model = load_onnx(path)
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(reversed(tensors))
    onnx.save(model, tmp_path / "model.onnx")
    assert onnx_digest(tmp_path / "model.onnx") == onnx_digest(path)
    assert len(initializers(model)) == len(tensors)


@pytest.mark.slow
def test_loads_on_an_old_onnxruntime(run, tmp_path):
    """onnxruntime 1.19 stands for Triton 24.08; the newest is what all the other tests use."""
    target = str(tmp_path / "old")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", target, "onnxruntime==1.19.2"]
    if subprocess.run(install, timeout=200).returncode:
        pytest.skip("onnxruntime 1.19.2 cannot be installed from here")
    images = run.images(5, seed=1)
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import numpy as np, onnxruntime as o;"
        "assert o.__version__ == '1.19.2';"
        "s = o.InferenceSession(sys.argv[2], providers=['CPUExecutionProvider']);"
        "np.save(sys.argv[4], s.run(None, {'images': np.load(sys.argv[3])})[0])"
    )
    for kind in KINDS:
        path = run.repository / kind / "1" / "model.onnx"
        arguments = [target, path, tmp_path / "images.npy", tmp_path / "answer.npy"]
        subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
        assert np.abs(np.load(tmp_path / "answer.npy") - OnnxModel(path)(images)).max() < 1e-5
