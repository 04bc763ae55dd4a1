"""Exceptions that a caller may want to distinguish."""

__all__ = ["DeviceError", "IllConditionedError", "MemoryBudgetError", "RecipeError", "SettingError"]


class SettingError(ValueError):
    """A setting has a value that its rule does not allow.

    Attributes:
        field: Name of the setting in the code (``num_gradients``).
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class RecipeError(ValueError):
    """A recipe cannot be read; each message names file, line, key, rule and cure.

    Args:
        *messages: One for each error, in the order of the recipe's lines.
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
    """The damped Fisher of a block cannot be inverted accurately; the cure is more damping."""
