"""The state machines behind :func:`mfac_core.pruner.make_pruner`: one file for each kind of pruning."""
