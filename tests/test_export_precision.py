"""int8 and float16: what they cost is stated and gated, and the checkpoint is still proven."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from serving_fixtures import make_run

from serving.check import check_serving
from serving.index import Index, unit
from serving.repository import MODEL, model_config, read_config
from serving.server import EmbeddedTriton
from unlabeled.data.table import ImageTable
from unlabeled.errors import CheckFailed, InputError
from unlabeled.export.models import KINDS, load_served
from unlabeled.export.onnx import OnnxModel, load_onnx, onnx_bytes
from unlabeled.export.parity import difference, onnx_equals_checkpoint
from unlabeled.export.proof import precision_of
from unlabeled.export.quantize import accuracy_cost, check_cost, reduce_precision
from unlabeled.files import read_json
from unlabeled.parameters import Export

PRECISIONS = ("int8", "float16")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def exact(run):
    """The classifier in float32."""
    return onnx_bytes(load_served("classifier", **run.inputs))


@pytest.fixture(scope="module")
def reduced(run, exact, tmp_path_factory):
    """The classifier at each precision."""
    folder = tmp_path_factory.mktemp("reduced")
    (folder / "float32").write_bytes(exact)
    for precision in PRECISIONS:
        (folder / precision).write_bytes(reduce_precision(exact, precision, run.images(60)))
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_depend_on_model_and_images_alone(run, exact, reduced, precision):
    assert reduce_precision(exact, precision, run.images(60)) == (reduced / precision).read_bytes()
    other = reduce_precision(exact, precision, run.images(60) // 2)
    assert (other == (reduced / precision).read_bytes()) is (precision == "float16")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_contract_and_versions_stay(reduced, precision):
    model = load_onnx(reduced / precision)
    assert model.ir_version == 8
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert precision_of(model) == precision and precision_of(load_onnx(reduced / "float32")) == "float32"
    (images,), (answer,) = model.graph.input, model.graph.output
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert answer.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert (reduced / precision).stat().st_size < 0.7 * (reduced / "float32").stat().st_size


@pytest.mark.parametrize(("precision", "largest"), [("int8", 0.1), ("float16", 0.005)])
def test_answers_stay_near_on_any_size(run, reduced, precision, largest):
    images = run.images(64, seed=9)
    model = OnnxModel(reduced / precision)
    cost = accuracy_cost(OnnxModel(reduced / "float32"), model, images)
    assert 0 < cost["max_difference"] < largest and cost["agreement"] > 0.9
    # float16 has no numbers of their own for rows beyond 2,048: the resize must not be in it.
    for large in (run.images(3, height=50, width=31), run.images(1, height=4001, width=4003)):
        assert np.abs(OnnxModel(reduced / "float32")(large) - model(large)).max() < largest


@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpoint_is_proven_and_a_weight_off_by_a_step_is_named(run, reduced, tmp_path, precision):
    assert onnx_equals_checkpoint(reduced / precision, "classifier", **run.inputs, precision=precision) == []
    model = load_onnx(reduced / precision)
    name = "head.weight" + "_quantized" * (precision == "int8")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    weight = numpy_helper.to_array(tensor).copy()
    place = np.unravel_index(np.abs(weight.astype(np.float32)).argmin(), weight.shape)
    weight[place] += 1 if precision == "int8" else 1e-3
    tensor.CopyFrom(numpy_helper.from_array(weight, name))
    onnx.save(model, tmp_path / "changed.onnx")
    [line] = onnx_equals_checkpoint(
        tmp_path / "changed.onnx", "classifier", **run.inputs, precision=precision
    )
    assert "half a step: head.weight" in line
    # The weights of another checkpoint.
    assert onnx_equals_checkpoint(reduced / precision, "encoder", **run.inputs, precision=precision)


@pytest.mark.parametrize("precision", ["float32", *PRECISIONS])
def test_what_a_file_says_of_itself_switches_no_comparison_off(run, reduced, tmp_path, precision):
    """A pair of Q and DQ that flattens the features, and another torch's name: each weight is what it was."""
    model = load_onnx(reduced / precision)
    *_, node = [node for node in model.graph.node if node.op_type == "Relu"]
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.float32(1e30), "s"), numpy_helper.from_array(np.uint8(0), "z")]
    )
    place = list(model.graph.node).index(node) + 1
    flat = "flat" if precision != "float16" else "flat_half"
    pair = [
        onnx.helper.make_node("QuantizeLinear", [node.output[0], "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], [flat]),
    ]
    if precision == "float16":
        pair[0].input[0] = "wide"
        pair[1].output[0] = "narrow"
        pair.insert(0, onnx.helper.make_node("Cast", [node.output[0]], ["wide"], to=onnx.TensorProto.FLOAT))
        pair.append(onnx.helper.make_node("Cast", ["narrow"], [flat], to=onnx.TensorProto.FLOAT16))
    for later in list(model.graph.node)[place:]:
        later.input[:] = [flat if name == node.output[0] else name for name in later.input]
    nodes = [*list(model.graph.node)[:place], *pair, *list(model.graph.node)[place:]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "changed.onnx")
    [line] = onnx_equals_checkpoint(
        tmp_path / "changed.onnx", "classifier", **run.inputs, precision=precision
    )
    told = "more than int8 costs" if precision == "int8" else f"has precision int8, recorded is {precision}"
    assert told in line


@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_wiring_of_the_same_layers_is_named(run, reduced, tmp_path, precision):
    model = load_onnx(reduced / precision)
    [add, *_] = [node for node in model.graph.node if node.op_type == "Add" and node.output[0] == "add_151"]
    add.input[1] = add.input[0]
    onnx.save(model, tmp_path / "changed.onnx")
    lines = onnx_equals_checkpoint(tmp_path / "changed.onnx", "classifier", **run.inputs, precision=precision)
    assert "the graph is not what the checkpoint makes" in lines[0]


def test_cost_beyond_what_is_allowed_is_refused():
    cost = {"agreement": 0.9, "accuracy_float32": 0.8, "accuracy": 0.79}
    check_cost("classifier", "int8", cost, 0.011)
    with pytest.raises(CheckFailed, match=r"int8 costs model classifier 0.0100 of accuracy"):
        check_cost("classifier", "int8", cost, 0.009)
    with pytest.raises(CheckFailed, match=r"0.1000 of agreement.*max_accuracy_drop allows 0.05"):
        check_cost("clusterer", "int8", {"agreement": 0.9}, 0.05)


def test_accuracy_is_stated_where_labels_are(run, reduced):
    images = ImageTable(run.table).images(np.arange(40))
    exact, int8 = OnnxModel(reduced / "float32"), OnnxModel(reduced / "int8")
    labels = int8(images).argmax(1)
    cost = accuracy_cost(exact, int8, images, labels)
    assert cost["accuracy"] == 1 and cost["accuracy_float32"] == cost["agreement"]
    assert "accuracy" not in accuracy_cost(exact, int8, images, np.full(40, -1))


def test_embeddings_are_held_to_their_variance_and_their_neighbours():
    """Less precision that takes away what tells images apart costs, however near 1 the cosines are."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    rng.shuffle(labels)
    embeddings = 10 + np.eye(4)[labels] + 0.1 * rng.standard_normal((200, 4))

    def model(answers):
        return lambda images: answers[images]

    def cost(found, known=labels):
        return accuracy_cost(model(embeddings), model(found), np.arange(200), known, embeddings=True)

    rounded = embeddings + rng.uniform(-0.05, 0.05, embeddings.shape)
    lost = (0.05**2 / 3) / embeddings.var(0).mean()
    assert cost(rounded)["agreement"] == pytest.approx(1 - lost, abs=2e-3)
    assert cost(rounded)["accuracy"] == cost(rounded)["accuracy_float32"] == 1
    check_cost("encoder", "int8", cost(rounded), 0.0)
    flat = 10 + 0.1 * rng.standard_normal((200, 4))
    assert cost(flat)["min_cosine"] > 0.95 and cost(flat)["accuracy"] < 0.5
    for known in (labels, None):
        with pytest.raises(CheckFailed, match="int8 costs model encoder"):
            check_cost("encoder", "int8", cost(flat, known), 0.1)


def test_options_stand_in_the_configuration():
    config = model_config(
        "encoder", 3, "embedding", 8, 16, response_cache=True, warmup=(1, 16), side=(28, 30)
    )
    assert config.response_cache.enable
    assert [warm.batch_size for warm in config.model_warmup] == [1, 16]
    assert list(config.model_warmup[0].inputs["images"].dims) == [3, 28, 30]
    with pytest.raises(InputError, match=r"export.warmup has a batch of 17; export.max_batch_size is 16"):
        model_config("encoder", 3, "embedding", 8, 16, warmup=(17,), side=(28, 28))


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_export_states_the_cost_and_triton_adds_none(tmp_path, precision):
    run = make_run(tmp_path / "run")
    options = {"precision": precision, "max_accuracy_drop": 0.2, "max_batch_size": 32}
    result = run.export(**options, response_cache=True, warmup=(1, 8))
    assert result["encoder_difference"] < 1e-5 and result[f"encoder_{precision}_min_cosine"] > 0.98
    parameters = Export(**options)
    check_serving(run.repository, run.index, tmp_path / "serving", parameters)
    written = read_json(tmp_path / "serving" / "serving.json")
    for kind in KINDS:
        cost = written["reduced"][kind]
        assert cost["precision"] == precision and ("accuracy" in cost) is (kind != "clusterer")
        assert (
            onnx_equals_checkpoint(run.repository / kind / MODEL, kind, **run.inputs, precision=precision)
            == []
        )
        assert read_config(run.repository / kind / "config.pbtxt").response_cache.enable
    index = Index(run.index)
    for kind in KINDS:  # what promotion, roll-out and `audit --live` compare with
        served = OnnxModel(run.repository / kind / MODEL)
        assert difference(index.golden[kind], served(index.golden["images"]))["max_difference"] < 1e-5
    table = ImageTable(run.table)
    encoder = OnnxModel(run.repository / "encoder" / MODEL)
    embeddings = unit(encoder(table.images(table.indices("train"))))
    assert np.abs(embeddings - index.embeddings).max() < 2e-3
    with EmbeddedTriton(run.repository) as server:
        log = server.log.read_text(errors="replace")
    assert "warmup" not in [line for line in log.splitlines() if line.startswith("E")]
    if precision == "int8":  # float16 may cost nothing at all
        with pytest.raises(CheckFailed, match="max_accuracy_drop"):
            run.export(**options | {"max_accuracy_drop": 0.0})
