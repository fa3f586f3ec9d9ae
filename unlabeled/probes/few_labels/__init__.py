"""Classifiers from few labels and many images: one training loop, a file for each method."""
