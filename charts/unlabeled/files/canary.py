"""Ask every model of this pod's Triton for one image, round after round: a model whose backend is dead is "ready" too.

A model that fails three times running is unloaded and loaded, which starts its backend anew; to load it alone would
do nothing. While a model fails, the file ANSWERING is away, and with it the pod is out of the Service. A server that
is busy, starts or stops is not judged: only an internal error, or a model that is not loaded, counts.
"""

import os
import pathlib
import signal
import sys
import time

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

ANSWERING = pathlib.Path(os.environ["ANSWERING"])
INTERVAL = float(os.environ["INTERVAL_SECONDS"])
KEY = {"triton-grpc-protocol-control-key": os.environ.get("TRITON_CONTROL_KEY", "")}
DEAD = ("StatusCode.INTERNAL", "StatusCode.UNKNOWN")
LONGEST_PAUSE = 60.0
RANDOM = np.random.default_rng()


def is_dead(client: triton.InferenceServerClient, model: str) -> bool:
    """Ask for one random image, since a response cache answers a known one without the model.

    One failure may be that of another request in the same batch, three are not.
    """
    for _ in range(3):
        try:
            inputs = []
            for tensor in client.get_model_metadata(model, client_timeout=10).inputs:
                shape = [size if size > 0 else 8 for size in tensor.shape]
                shape[0] = 1
                inputs.append(triton.InferInput(tensor.name, shape, tensor.datatype))
                image = RANDOM.integers(0, 256, shape).astype(triton_to_np_dtype(tensor.datatype))
                inputs[-1].set_data_from_numpy(image)
            client.infer(model, inputs, client_timeout=10)
            return False
        except InferenceServerException as error:
            if error.status() not in DEAD:
                return False
            print(f"{model} fails: {error.message()}", flush=True)
        time.sleep(0.2)
    return True


def broken_models(client: triton.InferenceServerClient) -> list[str]:
    """The models that are not loaded, and those that are but fail."""
    models = client.get_model_repository_index(headers=KEY, client_timeout=10).models
    loaded = {model.name for model in models if model.state == "READY"}
    gone = {model.name for model in models if model.state not in ("READY", "LOADING")} - loaded
    return sorted(gone | {name for name in loaded if is_dead(client, name)})


def mend(client: triton.InferenceServerClient, model: str) -> None:
    print(f"{model} does not answer: it is unloaded and loaded", flush=True)
    try:
        client.unload_model(model, headers=KEY, client_timeout=30)
        client.load_model(model, headers=KEY, client_timeout=300)
    except InferenceServerException as error:
        print(f"{model} cannot be loaded: {error.message()}", flush=True)


def main() -> None:
    client = triton.InferenceServerClient(
        os.environ["TRITON_URL"], channel_args=[("grpc.enable_http_proxy", 0)]
    )
    pause = INTERVAL
    while True:
        try:
            broken = broken_models(client)
        except InferenceServerException as error:
            print(f"no answer from Triton: {error.message()}", flush=True)
            time.sleep(INTERVAL)
            continue
        if broken:
            ANSWERING.unlink(missing_ok=True)
            for model in broken:
                mend(client, model)
        else:
            ANSWERING.touch()
            pause = INTERVAL
        time.sleep(pause)
        # Where mending does not help, it is not tried all the time.
        if broken:
            pause = min(2 * pause, LONGEST_PAUSE)


if __name__ == "__main__":
    # The first process of a container ignores SIGTERM, unless it says otherwise.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    main()
