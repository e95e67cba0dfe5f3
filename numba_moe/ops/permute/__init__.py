"""Rows moved into expert order, and combined again: kernels, plans and public functions."""
