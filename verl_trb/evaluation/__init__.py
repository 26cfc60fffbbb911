"""Accuracy of models on sets of problems; `python -m verl_trb.evaluate` is the command."""
