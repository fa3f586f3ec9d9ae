"""From a folder of unlabeled images to a served, audited model."""

__version__ = "0.1.0"
