"""Malformed requests among good ones, against a live Triton server; benchmarks/malformed.py sends 10,000."""

from serving_fixtures import exported_run

from serving.malformed import KINDS, Target, memory, storm
from serving.repository import MODEL
from serving.server import EmbeddedTriton
from unlabeled.export.onnx import OnnxModel


def test_each_malformed_request_is_refused_and_the_good_ones_are_answered():
    run = exported_run()
    images = run.images(2)
    answer = OnnxModel(run.repository / "classifier" / MODEL)(images)
    with EmbeddedTriton(run.repository) as server:
        target = Target(server.http_url, server.grpc_url, "classifier", images, answer, max_batch_size=32)
        storm(target, 2 * len(KINDS))
        before = memory(server.process.pid)
        sent = storm(target, 8 * len(KINDS), seed=1)
        grown = memory(server.process.pid) - before
        assert server.process.poll() is None
    assert set(sent) == {*KINDS, "good"} and min(sent.values()) == 8
    assert grown < 30 << 20
