"""The modifiers of a recipe, in order: loaded from text, inspected, written as text again."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Self

import yaml

from mfac_core.files import write_file
from mfac_core.recipe import load_recipe, recipe_text
from mfac_core.recipe.linting import NO_PRUNING, lint
from mfac_core.settings.training import LearningRateFunction, LearningRateSchedule, SetLearningRate
from mfac_torch.modifier import EpochRangeModifier, Modifier, PruningModifier, Settings, modifier_for
from mfac_torch.ranks import is_first_process

__all__ = ["ModifierList"]

_logger = logging.getLogger("mfac_torch")


class ModifierList:
    """The recipe of a manager, independent of any model.

    Args:
        modifiers: The modifiers.
        metadata: Plain values by name that :meth:`save` writes into the recipe.

    Attributes:
        modifiers: The modifiers, in order.
        metadata: The metadata.

    Raises:
        TypeError: If ``modifiers`` is a recipe or a single modifier, or an entry is not a modifier.
        ValueError: If there are no modifiers.
    """

    def __init__(self, modifiers: Iterable[Modifier], metadata: Mapping[str, Any] | None = None) -> None:
        if isinstance(modifiers, str | os.PathLike):
            raise TypeError("modifiers is a path or text; pass a recipe to ScheduledModifierManager.from_yaml")
        if isinstance(modifiers, Modifier):
            name = type(modifiers).__name__
            raise TypeError(f"modifiers is a single {name}; pass a list of modifiers, such as [{name}(...)]")
        if not isinstance(modifiers, Iterable):
            raise TypeError(
                f"modifiers is a {type(modifiers).__name__}; pass a list of modifiers such as "
                "MFACPruningModifier(...), or a recipe to ScheduledModifierManager.from_yaml"
            )
        self.modifiers = tuple(modifiers)
        self.metadata = dict(metadata or {})
        self._logged: tuple[str, ...] = ()  # warnings of the linter about the recipe
        for modifier in self.modifiers:
            if not isinstance(modifier, Modifier):
                raise TypeError(
                    f"{modifier!r} is not a modifier; pass modifiers such as MFACPruningModifier(...), "
                    "or a recipe to ScheduledModifierManager.from_yaml"
                )
        if not self.modifiers:
            raise ValueError("there are no modifiers; pass at least one, such as MFACPruningModifier(...)")

    @classmethod
    def from_yaml(
        cls,
        file_path: str | os.PathLike[str],
        add_modifiers: Iterable[Modifier] | None = None,
        recipe_variables: Mapping[str, object] | str | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        unsupported: Literal["error", "skip"] = "error",
    ) -> Self:
        """Return the manager of a recipe.

        Args:
            file_path: Path of a recipe, or the text of one.
            add_modifiers: Further modifiers, after those of the recipe.
            recipe_variables: Values that override variables of the recipe: a mapping, JSON, or comma-separated
                ``name=value`` pairs.
            metadata: Plain values by name, in addition to the ``__metadata__`` of the recipe; :meth:`save` writes both.
            unsupported: ``skip`` leaves out modifiers that are known but not supported, with a warning.

        Returns:
            The manager.

        Raises:
            RecipeError: If the recipe is invalid; the message names line, key, rule and cure.
            TypeError: If ``file_path`` is neither a path nor text.
        """
        if not isinstance(file_path, str | os.PathLike):
            raise TypeError(
                f"file_path is a {type(file_path).__name__}; pass the path of a recipe or its text, or give modifiers "
                "made in Python to ScheduledModifierManager([MFACPruningModifier(...)])"
            )
        recipe = load_recipe(file_path, recipe_variables, unsupported=unsupported)
        modifiers = cls(
            [*map(modifier_for, recipe.modifiers), *(add_modifiers or ())], {**recipe.metadata, **(metadata or {})}
        )
        # It is not known yet whether there will be a sampler, or pruning modifiers of another recipe.
        modifiers._logged = tuple(each for each in lint(recipe, sampled=True) if each != NO_PRUNING)
        if is_first_process():
            for warning in modifiers._logged:
                _logger.warning("%s: %s", recipe.source, warning)
        return modifiers

    @classmethod
    def compose_staged(
        cls,
        base_recipe: str | os.PathLike[str] | ModifierList,
        additional_recipe: str | os.PathLike[str] | ModifierList,
        keep_original_epochs: bool = False,
        save_path: str | os.PathLike[str] | None = None,
    ) -> Self:
        r"""Return the manager of two recipes, the second of which begins when the first ends.

        Args:
            base_recipe: The first recipe: a path, a text, or a manager.
            additional_recipe: The second recipe.
            keep_original_epochs: Whether the second recipe keeps its epochs.
            save_path: Where to write the staged recipe; ``None`` writes none.

        Returns:
            The manager. Modifiers of the first recipe without an end epoch end with that recipe.

        Example:
            >>> first = "modifiers:\n- !EpochRangeModifier {start_epoch: 0, end_epoch: 3}"
            >>> staged = ModifierList.compose_staged(first, first)
            >>> [(modifier.start_epoch, modifier.end_epoch) for modifier in staged.modifiers]
            [(0.0, 3.0), (3.0, 6.0)]
        """
        base, additional = (
            recipe if isinstance(recipe, ModifierList) else cls.from_yaml(recipe)
            for recipe in (base_recipe, additional_recipe)
        )
        first = [modifier.settings for modifier in base.modifiers]
        second = [modifier.settings for modifier in additional.modifiers]
        if not keep_original_epochs:
            end = float(base.max_epochs)
            first = [_ended(settings, end) for settings in first]
            second = [_shifted(settings, end) for settings in second]
        staged = cls(map(modifier_for, [*first, *second]), {**base.metadata, **additional.metadata})
        if save_path is not None:
            staged.save(save_path)
        return staged

    @property
    def max_epochs(self) -> int:
        """How long to train: the last epoch of any modifier, rounded up; 0 if none has one."""
        return max(self._epochs(), default=0)

    @property
    def min_epochs(self) -> int:
        """The first epoch of any modifier, rounded up."""
        return min(self._epochs(), default=0)

    @property
    def epoch_modifiers(self) -> list[Modifier]:
        """The modifiers that set how long to train."""
        return [modifier for modifier in self.modifiers if isinstance(modifier, EpochRangeModifier)]

    @property
    def learning_rate_modifiers(self) -> list[Modifier]:
        """The modifiers that set learning rates."""
        of_rates = SetLearningRate | LearningRateFunction | LearningRateSchedule
        return [modifier for modifier in self.modifiers if isinstance(modifier.settings, of_rates)]

    @property
    def pruning_modifiers(self) -> list[PruningModifier]:
        """The modifiers that prune."""
        return [modifier for modifier in self.modifiers if isinstance(modifier, PruningModifier)]

    def iter_modifiers(self) -> Iterator[Modifier]:
        """Yield the modifiers, in order.

        Yields:
            Each modifier.
        """
        yield from self.modifiers

    def to_string_lines(self, include_metadata: bool = True) -> list[str]:
        """Return the modifiers as the lines of a recipe.

        Args:
            include_metadata: Whether to include the metadata.

        Returns:
            The lines; :meth:`from_yaml` reads them.
        """
        text = recipe_text([modifier.settings for modifier in self.modifiers])
        if include_metadata and self.metadata:
            text = yaml.safe_dump({"__metadata__": self.metadata}, sort_keys=False) + text
        return text.splitlines()

    def save(self, file_path: str | os.PathLike[str], include_metadata: bool = True) -> None:
        """Write the modifiers to a file, as a recipe.

        Args:
            file_path: The file; its folder is created if missing.
            include_metadata: Whether to include the metadata.
        """
        write_file(file_path, ("\n".join(self.to_string_lines(include_metadata)) + "\n").encode())

    def __str__(self) -> str:
        return "\n".join(self.to_string_lines())

    def _epochs(self) -> Iterator[int]:
        for modifier in self.modifiers:
            yield math.ceil(modifier.start_epoch)
            if modifier.end_epoch >= 0:
                yield math.ceil(modifier.end_epoch)


def _ended(settings: Settings, end: float) -> Settings:
    has_no_end = getattr(settings, "end_epoch", None) == math.inf
    return _with(settings, end_epoch=max(end, settings.start_epoch)) if has_no_end else settings


def _shifted(settings: Settings, by: float) -> Settings:
    epochs = [name for name in ("start_epoch", "end_epoch") if hasattr(settings, name)]
    return _with(settings, **{name: getattr(settings, name) + by for name in epochs})


def _with(settings: Any, **fields: float) -> Settings:
    changed: Settings = dataclasses.replace(settings, **fields)
    return changed
