"""M-FAC pruning for Keras 3. Not supported yet: each name says so when it is asked for."""

_NOT_YET = ("MFACPruningCallback", "prune_one_shot")


def __getattr__(name: str) -> object:
    if name in _NOT_YET:
        raise ImportError(
            f"{name} is not supported yet. Until it is, prune the arrays of model.get_weights() with mfac_core.prune, "
            "or train with PyTorch and mfac_torch."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
