"""Continual adaptation of click-through-rate models on Ray."""
