"""KFP adapters: each component names its inputs, outputs and parameters, and lets the library do the work."""

import os

# One image for every step. KFP's subprocess runner warns of a name without "python" in it.
IMAGE = os.environ.get("UNLABELED_IMAGE", "localhost/unlabeled-python:0.1.0")
