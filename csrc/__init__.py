"""Kernels, and their way into torch."""

# First: the predictors' modules use kernels, which use the predictors' errors.
from attention_predictor import predictor as predictor
