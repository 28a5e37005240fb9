"""Distillation on small tasks whose truth is known, with the pipeline's own towers-and-objectives Task: python -m benchmarks.kd --help."""
