from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from mfac_core.errors import RecipeError
from mfac_core.recipe import EpochRange, Recipe, load_recipe
from mfac_core.recipe.formats import MODIFIERS
from mfac_core.recipe.indentation import restore_indentation
from mfac_core.settings.pruning import MFACSettings
from tests.core.recipe_lines import mfac, only, refusal

ROOT = Path(__file__).parents[2]

# As web pages show it: the indentation is lost.
DOCUMENTED = """\
pruning_modifiers:
- !MFACPruningModifier
params: __ALL_PRUNABLE__
init_sparsity: 0.05
final_sparsity: 0.85
start_epoch: 1.0
end_epoch: 61.0
update_frequency: 4.0
num_grads: {0.0: 256, 0.5: 512, 0.75: 1024, 0.83: 1400}
fisher_block_size: 10000
available_gpus: ["cuda:0"]
"""
DOCUMENTED_SETTINGS = MFACSettings(
    params=("__ALL_PRUNABLE__",),
    initial_sparsity=0.05,
    final_sparsity=0.85,
    start_epoch=1.0,
    end_epoch=61.0,
    update_frequency=4.0,
    num_gradients={0.0: 256, 0.5: 512, 0.75: 1024, 0.83: 1400},
    block_size=10000,
    devices=("cuda:0",),
)


class TestDocumentedExample:
    def test_it_loads_as_it_stands(self, caplog):
        caplog.set_level(logging.INFO, logger="mfac_core")
        assert load_recipe(DOCUMENTED).modifiers == (DOCUMENTED_SETTINGS,)
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert record.getMessage().startswith("<text>: restored the indentation")

    def test_it_loads_indented(self, caplog):
        caplog.set_level(logging.INFO, logger="mfac_core")
        head, tag, *keys = DOCUMENTED.splitlines()
        assert only("\n".join([head, "  " + tag, *("    " + key for key in keys)])) == DOCUMENTED_SETTINGS
        assert only("\n".join([head, tag, *("  " + key for key in keys)])) == DOCUMENTED_SETTINGS
        assert not caplog.records

    def test_errors_in_it_have_the_lines_of_the_text_as_it_stands(self):
        message = refusal(DOCUMENTED.replace("fisher_block_size: 10000", "fisher_block_size: 0"))
        assert message.startswith("<text>:10: MFACPruningModifier.fisher_block_size: 0 must be a positive integer")

    def test_it_loads_next_to_other_modifiers_that_lost_their_indentation(self):
        text = (
            f"# a note\ntraining_modifiers:\n- !EpochRangeModifier\nstart_epoch: 0.0\nend_epoch: 70.0\n\n{DOCUMENTED}"
        )
        assert load_recipe(text).modifiers == (EpochRange(end_epoch=70.0), DOCUMENTED_SETTINGS)

    def test_it_loads_when_two_items_of_one_list_lost_their_indentation(self):
        text = DOCUMENTED + "- !EpochRangeModifier\nend_epoch: 70.0\nversion: 1.1.0\n"
        assert load_recipe(text).modifiers == (DOCUMENTED_SETTINGS, EpochRange(end_epoch=70.0))

    def test_it_loads_with_nested_options_and_lists_that_lost_their_indentation(self):
        text = DOCUMENTED.replace("num_grads", "mfac_options:\nnum_grads").replace(" __ALL_PRUNABLE__", "\n- a\n- b")
        loaded = only(text)
        assert loaded.params == ("a", "b")
        assert loaded.num_gradients == DOCUMENTED_SETTINGS.num_gradients

    def test_items_with_indentation_are_left_alone(self):
        text = "training_modifiers:\n- !EpochRangeModifier\n  end_epoch: 70.0\n" + DOCUMENTED
        assert load_recipe(text).modifiers == (EpochRange(end_epoch=70.0), DOCUMENTED_SETTINGS)

    def test_restoring_keeps_the_number_of_lines(self):
        assert len(restore_indentation(DOCUMENTED).splitlines()) == len(DOCUMENTED.splitlines())

    def test_restoring_leaves_other_yaml_alone(self):
        text = mfac("params:", "- a", "- b") + "num_epochs: 3\nother_modifiers: []\n"
        assert restore_indentation(text) == text


class TestSourceForms:
    @pytest.mark.parametrize("suffix", [".yaml", ".yml", ".YAML"])
    def test_yaml_file(self, tmp_path, suffix):
        path = tmp_path / f"recipe{suffix}"
        path.write_text(mfac(), encoding="utf-8")
        assert load_recipe(path) == load_recipe(str(path))
        assert load_recipe(path).source == str(path)
        assert load_recipe(path).modifiers == load_recipe(mfac()).modifiers

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("---\n{}---\n# Title\n", 5),
            ("\n<!-- a licence\n---\nwith a rule -->\n\n---\n{}---\n", 10),
            ("<!-- one --><!-- two -->\n---\n{}---\nprose with --- in it\n---\n", 6),
            ("---\n# --- a comment\nnote: 'a --- b'\nblock: |\n  ---\n{}---\n", 9),
            ("---  \r\n{}---\r\n", 5),
            ("+++\n{}+++\n# Title\n", 5),
            ("<!-- one\ntwo --> \n+++\n# --- no end\n{}+++\nprose\n+++\n", 8),
            ("\ufeff---\n{}---\n", 5),
        ],
    )
    def test_markdown_front_matter(self, tmp_path, text, line):
        path = tmp_path / "recipe.md"
        text = text.format(mfac())
        path.write_text(text, encoding="utf-8", newline="")
        assert only(path) == only(text) == only(mfac())
        wrong = text.replace("end_epoch: 10.0", "end_epoch: -1")
        path.write_text(wrong, encoding="utf-8", newline="")
        assert refusal(path).startswith(f"{path}:{line}: MFACPruningModifier.end_epoch: ")
        assert refusal(wrong).startswith(f"<text>:{line}: MFACPruningModifier.end_epoch: ")

    def test_a_list_of_modifiers_without_a_key(self):
        lines = "- !EpochRangeModifier\n  end_epoch: 3\n- !GMPruningModifier {final_sparsity: 0.5, end_epoch: -2}\n"
        assert refusal(lines).startswith("<text>:3: GMPruningModifier.end_epoch: -2.0 is out of range")
        assert len(load_recipe(lines.replace("-2", "2")).modifiers) == 2

    def test_a_modifier_without_a_list(self):
        assert only("!EpochRangeModifier\n  end_epoch: 3\n") == EpochRange(end_epoch=3.0)

    def test_a_yaml_document_may_begin_with_a_document_marker(self):
        assert only("---\n" + mfac()) == only(mfac())

    def test_windows_line_ends(self, tmp_path):
        text = DOCUMENTED.replace("\n", "\r\n")
        assert only(text) == DOCUMENTED_SETTINGS
        (tmp_path / "recipe.yaml").write_bytes(text.encode())
        assert only(tmp_path / "recipe.yaml") == DOCUMENTED_SETTINGS
        assert refusal(text.replace("10000", "0")).startswith("<text>:10: MFACPruningModifier.fisher_block_size: 0")

    def test_a_file_that_begins_with_a_byte_order_mark(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text("\ufeff" + mfac(), encoding="utf-8")
        assert only(path) == only(mfac())

    def test_the_delimiter_that_opens_the_front_matter_closes_it(self, tmp_path):
        path = tmp_path / "recipe.md"
        path.write_text("+++\n" + mfac() + "---\n", encoding="utf-8")
        assert (
            f"{path}:1: the YAML front matter that begins here is never closed; add a line that is exactly `+++`"
            in (refusal(path))
        )

    @pytest.mark.parametrize("text", ["# Title\n\nno front matter\n", "<!-- never closed\n---\n" + mfac()])
    def test_markdown_without_front_matter(self, tmp_path, text):
        path = tmp_path / "recipe.md"
        path.write_text(text, encoding="utf-8")
        assert f"{path}:1: no YAML front matter" in refusal(path)

    def test_markdown_text_without_front_matter(self):
        assert "<text>:1: no YAML front matter" in refusal("<!-- only a comment -->\n" + mfac())

    def test_front_matter_that_is_never_closed(self, tmp_path):
        path = tmp_path / "recipe.md"
        path.write_text("\n---\n" + mfac() + "----\n", encoding="utf-8")
        assert f"{path}:2: the YAML front matter that begins here is never closed" in refusal(path)

    def test_missing_file(self, tmp_path):
        assert refusal(tmp_path / "none.yaml").startswith(
            f"{tmp_path / 'none.yaml'}: there is no such file; give the path"
        )

    @pytest.mark.parametrize("text", ["pruning_modifiers: []", "!MFACPruningModifier {}", "end_epoch: 3"])
    def test_text_in_one_line(self, text):
        assert (
            refusal(text)
            == f"{text}: there is no such file; if this is the text of a recipe, it must contain a newline"
        )

    def test_folder(self, tmp_path):
        assert "this is a folder" in refusal(tmp_path)

    def test_wrong_suffix(self, tmp_path):
        path = tmp_path / "recipe.json"
        path.write_text("{}", encoding="utf-8")
        message = refusal(path)
        assert message.startswith(f"{path}: a recipe cannot have the suffix '.json'")
        assert ".yaml, .yml, .md" in message

    def test_stub(self):
        assert "SparseZoo stubs are not supported yet" in refusal("zoo:cv/classification/resnet_v1-50")

    def test_file_that_is_not_utf8(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(b"note: \xff\n")
        assert f"{path}: the file is not UTF-8 text" in refusal(path)


class TestDocumentErrors:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("\n", "<text>: the recipe is empty"),
            ("# nothing\n", "<text>: the recipe is empty"),
            ("\n- a\n- b\n", "<text>:2: a recipe must be a mapping"),
            (
                "a: 1\nb: [1,\nc: 2\n",
                "<text>:3: this is not valid YAML: while parsing a flow sequence on line 2, expected",
            ),
            ("a: 1\nb: *missing\n", "<text>:2: this is not valid YAML: found undefined alias"),
            ("a: 1\n---\nb: 2\n", "<text>:2: this is not valid YAML: expected a single document"),
            ("a: 1\nb: \x07\n", "<text>:2: the character U+0007 is not allowed in YAML"),
            ("a: " + "[" * 600 + "\n", "<text>: the YAML is nested too deeply"),
            ("a: 1\n? [b]\n: 2\n", "<text>:2: a key must be a single value"),
            ("num_epochs: 3\n", "<text>: no modifiers found; write at least one item under a key"),
            ("pruning_modifiers: []\nversion: 1\n", "<text>: no modifiers found"),
            ("pruning_modifiers:\nversion: 1\n", "<text>: no modifiers found"),
            (
                "a: 1\npruning_modifiers: 3\n",
                "<text>:2: pruning_modifiers: this key contains `modifiers`, so it must hold",
            ),
            ("stage_1:\n  pruning_modifiers: []\n", "<text>: no modifiers found"),
            ("stage_1:\n  pruning_modifiers: 3\n", "<text>:2: pruning_modifiers: this key contains `modifiers`, so it"),
            ("a_modifiers:\n  - text\n", "<text>:2: an item of a modifiers list must begin with a modifier"),
            ("a_modifiers:\n  b: 1\n", "<text>:2: b: this is not a modifier; a key that contains `modifiers` holds"),
            (
                "s:\n  a_modifiers:\n    ConstantPruningModifier:\n      start: 0\n",
                "<text>:3: ConstantPruningModifier: modifiers as keys, with start, end and targets, are not supported; "
                "write an item of a list, such as `- !ConstantPruningModifier`",
            ),
            ("a: 1\nb: !!int x\nc_modifiers:\n  - !EpochRangeModifier {end_epoch: eval(b)}\n", "is not a valid !!int"),
        ],
    )
    def test_what_is_wrong_and_where(self, text, expected):
        assert expected in refusal(text)

    @pytest.mark.parametrize(
        ("text", "key", "first", "second"),
        [
            (mfac("num_grads:", "  0.0: 3", "  0.5: 5", "  0.50: 7"), "0.50", 7, 8),
            (mfac("num_grads:", "  0.0: 3", "  0: 7"), "0", 6, 7),
            ("a: 1\n" + mfac() + "a: 2\n", "a", 1, 6),
            (mfac() + "other: {x: {y: 1, z: 2,\n y: 3}}\n", "y", 5, 6),
            (mfac() + "pruning_modifiers: []\n", "pruning_modifiers", 1, 5),
        ],
    )
    def test_duplicate_keys(self, text, key, first, second):
        expected = f"<text>:{second}: the key {key} is given twice, on lines {first} and {second}; keep one"
        assert refusal(text) == expected

    def test_of_a_key_that_a_modifier_gives_twice_the_last_counts_as_in_recipes_that_shipped(self, caplog):
        (settings,) = load_recipe(mfac("damp: 1.0e-4", "mask_type: unstructured", "damp: 1.0e-5")).pruning

        assert settings.damping == 1e-5
        assert [record.getMessage() for record in caplog.records if "twice" in record.getMessage()] == [
            "<text>:7: the key damp is given twice, on lines 5 and 7; the last one counts, keep only that"
        ]

    @pytest.mark.parametrize(
        "value",
        [
            "!!python/object/apply:os.system ['touch {path}']",
            "!!python/object/new:os.system ['touch {path}']",
            "!!python/name:os.system",
            "!Unknown x",
        ],
    )
    @pytest.mark.parametrize(
        "place", ["    params: {}", "stuff: {}", "stuff: [{{a: {}}}]", "__metadata__: {}", "  - {}", "? {}\n: 1"]
    )
    def test_nothing_is_run(self, tmp_path, value, place):
        path = tmp_path / "was_run"
        text = mfac() + place.format(value.format(path=path)) + "\n"
        with pytest.raises(RecipeError, match=r"^<text>:5: "):
            load_recipe(text)
        assert not path.exists()

    def test_a_modifier_outside_a_modifiers_list(self):
        text = mfac() + "pruning_modifier:\n  - !EpochRangeModifier\n    end_epoch: 3\n"
        assert refusal(text).startswith("<text>:6: the tag !EpochRangeModifier is not allowed here")


class TestRecipesInUse:
    """Forms that recipes written for SparseML have, from its first era to its last."""

    def test_a_recipe_that_a_manager_saved_names_every_key(self):
        text = """version: 1.1.0

__metadata__:

modifiers:
    - !GMPruningModifier
        end_epoch: 36.0
        final_sparsity: 0.6
        global_sparsity: False
        init_sparsity: 0.25
        inter_func: cubic
        leave_enabled: True
        log_types: __ALL__
        mask_type: unstructured
        params: ['conv2d_1/kernel:0', 'blocks.0.weight']
        phased: False
        score_type: magnitude
        start_epoch: 1.0
        update_frequency: 0.5

    - !ACDCPruningModifier
        compression_sparsity: 0.9
        end_epoch: 75
        global_sparsity: True
        leave_enabled: False
        log_types: null
        mask_type: unstructured
        momentum_buffer_reset: True
        params: ['re:.*conv*']
        start_epoch: 5
        update_frequency: 5

    - !SetLearningRateModifier
        constant_logging: False
        end_epoch: -1
        learning_rate: 0.002505
        log_types: __ALL__
        param_groups: null
        start_epoch: 0.0

    - !LearningRateModifier
        constant_logging: False
        end_epoch: -1.0
        init_lr: 0.0006
        log_types: __ALL__
        lr_class: StepLR
        lr_kwargs: {'step_size': 10, 'gamma': 0.25}
        start_epoch: 40.0
        update_frequency: -1.0
"""
        assert [type(each).__name__ for each in load_recipe(text).modifiers] == [
            "MagnitudeSettings",
            "ACDCSettings",
            "SetLearningRate",
            "LearningRateSchedule",
        ]

    def test_a_recipe_card_with_targets_behind_an_anchor(self, tmp_path):
        path = tmp_path / "recipe.md"
        path.write_text(
            """<!--
A licence.
-->

---
# Epochs
end_epoch: &end_epoch 3.0
targets: &targets
  0.90: ['a.weight', 'b.weight']  # --- early layers
  0.95: [c.weight]

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: *end_epoch

pruning_modifiers:
  - !MFACPruningModifier
    params: []
    init_sparsity: 0.35
    final_sparsity: *targets
    start_epoch: 1.0
    end_epoch: 2.0
    update_frequency: 1.0
    num_grads: 256

  - !SetWeightDecayModifier
    weight_decay: 0.0
    start_epoch: *end_epoch
---

# A title
"""
        )
        _, pruning, _ = load_recipe(path).modifiers
        assert pruning.final_sparsity == {0.9: ("a.weight", "b.weight"), 0.95: ("c.weight",)}

    def test_a_recipe_with_distillation_beside_pruning(self, caplog):
        text = """
modifiers:
  - !EpochRangeModifier
    start_epoch: 0
    end_epoch: 3

training_modifiers:
  - !LearningRateFunctionModifier
    start_epoch: 0.0
    end_epoch: 3.0
    lr_func: cyclic_linear
    cycle_epochs: 0.25
    init_lr: 5e-4
    final_lr: 5e-6

  - !OBSPruningModifier
    params: [
      "re:encoder.layer.*.query.weight",
      "re:encoder.layer.*.key.weight",
    ]
    init_sparsity: 0.7
    final_sparsity: 0.97
    start_epoch: 0
    end_epoch: 2.75
    update_frequency: 0.25
    global_sparsity: True
    mask_type: block4
    num_grads: 1024
    damp: 1e-7
    fisher_block_size: 32
    grad_sampler_kwargs:
      batch_size: 16

distillation_modifiers:
  - !DistillationModifier
     hardness: 1.0
     distill_output_keys: [logits]
"""
        assert refusal(text).startswith("<text>:35: DistillationModifier is not supported; remove it from the recipe")
        _, _, pruning = load_recipe(text, unsupported="skip").modifiers
        assert (pruning.sampler_options, pruning.block_size, pruning.mask_type) == ({"batch_size": 16}, 32, "block4")
        assert [record.getMessage() for record in caplog.records] == [
            "<text>:35: DistillationModifier is not supported and is left out"
        ]

    def test_recipes_of_the_last_era_are_refused_by_name(self):
        text = """
first_stage:
  run_type: oneshot
  obcq_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "0:0"
second_stage:
  run_type: train
  pruning_modifiers:
    ConstantPruningModifier: {targets: __ALL__, start: 0}
"""
        first, second = refusal(text).splitlines()
        assert first.startswith("<text>:5: SparseGPTModifier is not supported")
        assert second.startswith("<text>:11: ConstantPruningModifier: modifiers as keys, with start, end and ")
        assert refusal(text[: text.index("second_stage")]).startswith("<text>:5: SparseGPTModifier is not supported")


@pytest.mark.parametrize("value", [{"final_sparsity": 0.5}, [], 3, None, b"a.yaml"])
def test_what_is_neither_a_path_nor_text_is_refused(value):
    with pytest.raises(TypeError, match=f"the recipe is a {type(value).__name__}; pass the path of a file or the text"):
        load_recipe(value)


class TestMetadata:
    def test_they_are_kept_as_they_stand(self):
        text = "__metadata__: {a: &x [1, 2:4, 'eval(b)'], b: *x, deep: {c: {d: {e: {f: [[2025-01-02]]}}}}, n: null}\n"
        metadata = load_recipe(text + mfac()).metadata
        assert metadata == {
            "a": [1, "2:4", "eval(b)"],
            "b": [1, "2:4", "eval(b)"],
            "deep": {"c": {"d": {"e": {"f": [["2025-01-02"]]}}}},
            "n": None,
        }
        assert metadata["a"] is metadata["b"]  # text that repeats itself by aliases stays small

    @pytest.mark.parametrize("text", ["", "__metadata__:\n", "__metadata__: {}\n"])
    def test_there_may_be_none(self, text, caplog):
        assert load_recipe(text + mfac()).metadata == {}
        assert not caplog.records

    def test_what_is_not_a_mapping_is_left_out_and_said(self, caplog):
        assert load_recipe("__metadata__: draft\n" + mfac()).metadata == {}
        assert [record.getMessage() for record in caplog.records] == [
            "<text>:1: __metadata__: 'draft' is not a mapping and is ignored; write `name: value` lines below it"
        ]

    def test_what_holds_itself_is_refused(self):
        assert "__metadata__: this contains an alias of itself" in refusal("__metadata__: &a {b: [*a]}\n" + mfac())


class TestShippedFiles:
    @pytest.mark.parametrize("path", sorted((ROOT / "recipes").iterdir()), ids=lambda path: path.name)
    def test_every_recipe_loads(self, path, caplog):
        caplog.set_level(logging.INFO, logger="mfac_core")
        assert load_recipe(path).pruning
        assert not caplog.records

    def test_imagenet_recipe_is_the_documented_example(self):
        recipe = load_recipe(ROOT / "recipes" / "imagenet_gradual.md")
        assert recipe.pruning == (DOCUMENTED_SETTINGS,)
        assert recipe.max_epochs > DOCUMENTED_SETTINGS.end_epoch

    def test_digits_recipe(self):
        recipe = load_recipe(ROOT / "recipes" / "digits_gradual.yaml")
        expected = MFACSettings(
            initial_sparsity=0.3,
            final_sparsity=0.96,
            start_epoch=1.0,
            end_epoch=6.0,
            scope="global",
            num_gradients={0.0: 40, 0.5: 80, 0.75: 120},
            damping=1e-7,
        )
        assert recipe == Recipe((EpochRange(end_epoch=8.0), expected), str(ROOT / "recipes" / "digits_gradual.yaml"))

    def test_examples_of_the_reference_page_load(self):
        page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
        examples = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
        assert len(examples) >= 5
        for example in examples:
            assert load_recipe(example, unsupported="skip").modifiers

    def test_the_reference_page_names_every_modifier_and_key(self):
        page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
        for name, modifier in MODIFIERS.items():
            assert f"`{name}`" in page
            for key in (*modifier.keys, *modifier.nested):
                assert f"`{key}`" in page, key
