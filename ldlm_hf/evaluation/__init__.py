"""Evaluation of pipelines: samples → scores → results, beside real text."""
