"""Exceptions that a caller may want to distinguish."""

__all__ = ["DeviceError", "IllConditionedError", "MemoryBudgetError", "RankError", "RecipeError", "SettingError"]


class SettingError(ValueError):
    """A setting has a value that is not allowed.

    Args:
        field: Name of the setting in the code, such as ``num_gradients``.
        message: The value, the rule and the cure.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class RecipeError(ValueError):
    """A recipe cannot be read.

    Each argument is the message of one error, with file, line, key, rule and cure, in the order of the recipe's lines.
    """

    @property
    def messages(self) -> tuple[str, ...]:
        """One message for each error."""
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.args)


class DeviceError(ValueError):
    """A device does not exist or cannot be used; the message lists those that can."""


class MemoryBudgetError(MemoryError):
    """A run needs more memory than is free; the message names settings that fit."""


class IllConditionedError(ArithmeticError):
    """The damped Fisher of a block cannot be inverted accurately; increase the damping."""


class RankError(RuntimeError):
    """Another rank (process of the same run) has failed, is gone, or differs from this one; the message names it."""
