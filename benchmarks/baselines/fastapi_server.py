"""The usual way to serve an ONNX file: FastAPI, uvicorn and onnxruntime; raw bytes in, raw bytes out.

MODEL=model.onnx SHAPE=3,32,32 python benchmarks/baselines/fastapi_server.py PORT WORKERS
"""

import os
import socket
import sys

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, Request, Response
from uvicorn.supervisors import Multiprocess

# As Triton's instances: one thread each, so that workers x threads stays within the cores.
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
shape = [int(size) for size in os.environ["SHAPE"].split(",")]
app = FastAPI()


@app.post("/infer")
async def infer(request: Request) -> Response:
    images = np.frombuffer(await request.body(), np.uint8).reshape(-1, *shape)
    # Within the event loop: with a worker per core a pool of threads only adds a hop, and was slower.
    [answer] = session.run(None, {"images": images})
    return Response(answer.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    port, workers = (int(argument) for argument in sys.argv[1:])
    config = uvicorn.Config(
        "fastapi_server:app", port=port, workers=workers, log_level="warning", access_log=False
    )
    listening = config.bind_socket()
    # Workers that share a socket leave Nagle's algorithm on: head and body would lie 40 ms apart.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    Multiprocess(config, [listening]).run()
