"""The exceptions that a caller may want to tell apart."""

__all__ = ["DeviceError", "IllConditionedError", "MemoryBudgetError", "RecipeError", "SettingError"]


class SettingError(ValueError):
    """A setting has a value that its rule does not allow.

    Attributes:
        field: Name of the setting, in the terms of the code (``num_gradients``).
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class RecipeError(ValueError):
    """A recipe cannot be read; each message names file, line, key, rule and cure.

    Args:
        *messages: One for each thing that is wrong, in the order of the recipe's lines.
    """

    @property
    def messages(self) -> tuple[str, ...]:
        """One message for each thing that is wrong."""
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.args)


class DeviceError(ValueError):
    """A listed device does not exist or cannot be used; the message lists those that can."""


class MemoryBudgetError(MemoryError):
    """A run would need more memory than there is; the message names settings that would fit."""


class IllConditionedError(ArithmeticError):
    """The damped Fisher of a block cannot be inverted accurately; the cure is more damping."""
