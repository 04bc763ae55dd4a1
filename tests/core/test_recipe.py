from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from mfac_core.errors import RecipeError, SettingError
from mfac_core.recipe import EpochRange, Recipe, SetLearningRate, load_recipe
from mfac_core.recipe.indentation import restore_indentation
from mfac_core.recipe.modifiers import MODIFIERS
from mfac_core.settings import MagnitudeSettings, MFACSettings

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


def item(*keys: str, modifier: str = "MFACPruningModifier") -> str:
    return "\n".join(["pruning_modifiers:", f"  - !{modifier}", *(f"    {key}" for key in keys), ""])


def mfac(*keys: str) -> str:
    """Keys begin on line 5."""
    return item("final_sparsity: 0.8", "end_epoch: 10.0", *keys)


def only(text: str, **options: object):
    (modifier,) = load_recipe(text, **options).modifiers
    return modifier


def refusal(text: str, **options: object) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(text, **options)
    return str(caught.value)


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

    def test_a_yaml_document_may_begin_with_a_document_marker(self):
        assert only("---\n" + mfac()) == only(mfac())

    def test_windows_line_ends(self):
        assert only(DOCUMENTED.replace("\n", "\r\n")) == DOCUMENTED_SETTINGS

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
            ("stage_1:\n  pruning_modifiers: []\n", "<text>:1: stage_1: stages are not supported yet"),
            ("a: 1\nb: !!int x\nc_modifiers:\n  - !EpochRangeModifier {end_epoch: eval(b)}\n", "is not a valid !!int"),
        ],
    )
    def test_what_is_wrong_and_where(self, text, expected):
        assert expected in refusal(text)

    @pytest.mark.parametrize(
        ("text", "key", "first", "second"),
        [
            (mfac("damp: 1.0e-4", "damp: 1.0e-5"), "damp", 5, 6),
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


class TestAnchorsAndVariables:
    def test_anchors_aliases_and_merge_keys(self):
        text = """
defaults: &defaults
  update_frequency: 2.0
  damp: 1.0e-3
more: &more {damp: 5.0, num_grads: 7}
end: &end 10.0
params: &params [a, b]
pruning_modifiers:
  - !MFACPruningModifier
    <<: [*defaults, *more]
    update_frequency: 3.0
    final_sparsity: 0.8
    end_epoch: *end
    params: *params
  - !MagnitudePruningModifier
    <<: *defaults
    damp: 1
"""
        message = refusal(text)
        assert message.startswith("<text>:17: MagnitudePruningModifier.damp: unknown key")
        loaded = only(text[: text.index("  - !Magnitude")])
        assert (loaded.update_frequency, loaded.damping, loaded.num_gradients) == (3.0, 1e-3, {0.0: 7})
        assert (loaded.end_epoch, loaded.params) == (10.0, ("a", "b"))

    def test_errors_in_merged_keys_have_the_line_where_they_are_written(self):
        text = "defaults: &defaults\n  damp: -1\n" + mfac("<<: *defaults")
        assert refusal(text).startswith("<text>:2: MFACPruningModifier.damp: -1.0 is out of range")

    @pytest.mark.parametrize("value", ["3", "[3]"])
    def test_merging_what_is_no_mapping(self, value):
        assert "the merge key << must be followed by an alias of a mapping" in refusal(mfac(f"<<: {value}"))

    def test_circles_end_in_an_error(self):
        assert "merges a mapping into itself" in refusal("a: &a\n  <<: *a\n" + mfac("<<: *a"))
        assert "nested too deeply" in refusal(mfac("params: &p [*p]"))

    def test_deep_aliases_are_not_expanded(self):
        levels = ["x0: &x0 [a]"] + [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 40)]
        text = "\n".join(levels) + "\n" + mfac("params: *x39")
        assert "MFACPruningModifier.params: lists and mappings are nested too deeply here" in refusal(text)
        assert only("\n".join(levels) + "\n" + mfac()) == only(mfac())

    @pytest.mark.parametrize("use", ["eval(end)", "'eval( end )'", "*end"])
    def test_variables_and_what_replaces_them(self, use):
        text = "end: &end 10.0\n" + item("final_sparsity: 0.8", f"end_epoch: {use}")
        assert only(text).end_epoch == 10.0
        assert only(text, variables={"end": 20}).end_epoch == 20.0
        assert only(text, variables={}).end_epoch == 10.0

    def test_variables_keep_their_types(self):
        text = "n: 5\nb: true\ns: linear\nf: 1e-4\nnone: null\n" + mfac(
            "num_grads: {0.0: eval(n)}",
            "global_sparsity: eval(b)",
            "inter_func: eval(s)",
            "damp: eval(f)",
            "fisher_block_size: eval(none)",
            "params: [eval(s)]",
        )
        loaded = only(text)
        assert (loaded.num_gradients, loaded.scope, loaded.interpolation) == ({0.0: 5}, "global", "linear")
        assert (loaded.damping, loaded.block_size, loaded.params) == (1e-4, None, ("linear",))

    def test_variables_may_be_replaced_by_lists_and_mappings(self):
        text = "n: 5\np: a\n" + mfac("num_grads: eval(n)", "params: eval(p)")
        loaded = only(text, variables={"n": {0.0: 3, 0.5: 4}, "p": ["b", "c"]})
        assert (loaded.num_gradients, loaded.params) == ({0.0: 3, 0.5: 4}, ("b", "c"))

    def test_a_variable_may_refer_to_another(self):
        text = "a: eval(b)\nb: 7.0\n" + item("final_sparsity: 0.8", "end_epoch: eval(a)")
        assert only(text).end_epoch == 7.0
        assert only(text, variables={"b": 9.0}).end_epoch == 9.0

    def test_a_variable_may_not_refer_to_itself(self):
        text = "a: eval(b)\nb: eval(a)\n" + mfac("damp: eval(a)")
        assert refusal(text).startswith(
            "<text>:7: MFACPruningModifier.damp: the variable a refers to itself (a -> b -> a)"
        )

    def test_errors_of_a_variable_have_the_line_of_the_key_that_uses_it(self):
        text = "lam: 1.0\n" + mfac("damp: eval(lam)")
        assert refusal(text, variables={"lam": -2.0}).startswith(
            "<text>:6: MFACPruningModifier.damp: -2.0 is out of range"
        )

    @pytest.mark.parametrize("expression", ["n * 2", "2", "n + m", "max(n, 2)", "n.real", ""])
    def test_arithmetic_is_refused_by_name(self, expression):
        message = refusal("n: 5\n" + mfac(f'num_grads: "eval({expression})"'))
        assert message.startswith("<text>:6: MFACPruningModifier.num_grads: ")
        assert "arithmetic in eval(...) is not supported yet" in message

    def test_arithmetic_around_eval_is_refused_by_name(self):
        assert "arithmetic in eval(...) is not supported yet" in refusal("n: 5\n" + mfac("num_grads: 2 * eval(n)"))

    def test_unknown_variable_in_the_recipe(self):
        message = refusal("num_epochs: 5\n" + mfac("damp: eval(nun_epochs)"))
        assert message.startswith("<text>:6: MFACPruningModifier.damp: nun_epochs is not a variable of this recipe")
        assert "(did you mean num_epochs?); its variables are num_epochs" in message

    def test_unknown_variable_from_outside(self):
        message = refusal("num_epochs: 5\n" + mfac(), variables={"epochs": 3})
        assert message == (
            "<text>: variables: epochs is not a variable of this recipe (did you mean num_epochs?); "
            "its variables are num_epochs"
        )

    @pytest.mark.parametrize("name", ["version", "__metadata__", "pruning_modifiers", "several"])
    def test_what_is_no_variable(self, name):
        text = "version: 1.1.0\n__metadata__: x\nseveral: [1, 2]\n" + mfac()
        assert f"{name} is not a variable: this recipe has none" in refusal(text, variables={name: 1})


class TestMFACKeys:
    # Key lines -> what they change in the settings.
    CHANGES = (
        (["params: __ALL__"], {"params": ("__ALL__",)}),
        (["params: [conv.weight, 're:fc.*']"], {"params": ("conv.weight", "re:fc.*")}),
        (["init_sparsity: 0.1"], {"initial_sparsity": 0.1}),
        (["final_sparsity: 0.5"], {"final_sparsity": 0.5}),
        (["start_epoch: 2"], {"start_epoch": 2.0}),
        (["end_epoch: 12"], {"end_epoch": 12.0}),
        (["update_frequency: 0.5"], {"update_frequency": 0.5}),
        (["inter_func: linear"], {"interpolation": "linear"}),
        (["leave_enabled: false"], {"leave_enabled": False}),
        (["mask_type: unstructured"], {}),
        (["log_types: __ALL__"], {}),
        (["global_sparsity: true"], {"scope": "global"}),
        (["global_sparsity: false"], {}),
        (["num_grads: 128"], {"num_gradients": {0.0: 128}}),
        (["num_grads: {0: 64, 0.5: 128}"], {"num_gradients": {0.0: 64, 0.5: 128}}),
        (["num_grads:", "  0.0: 64", "  5e-1: 128"], {"num_gradients": {0.0: 64, 0.5: 128}}),
        (["fisher_block_size: 50"], {"block_size": 50}),
        (["fisher_block_size: null"], {"block_size": None}),
        (["fisher_block_size: None"], {"block_size": None}),
        (["fisher_block_size:"], {"block_size": None}),
        (["damp: 1.0e-3"], {"damping": 1e-3}),
        (["damp: 1e-3"], {"damping": 1e-3}),
        (["damp: 2E+1"], {"damping": 20.0}),
        (["available_gpus: ['cuda:0', 'cuda:1']"], {"devices": ("cuda:0", "cuda:1")}),
        (["available_gpus: []"], {"devices": ("cpu",)}),
        (["available_devices: ['cuda:0']"], {"devices": ("cuda:0",)}),
        (["available_devices: []"], {"devices": ("cpu",)}),
        (["grads_device: cuda:0"], {"gradients_device": "cuda:0"}),
        (["update: joint"], {"update": "joint"}),
        (["mfac_options:"], {}),
        (["mfac_options: {num_grads: 32, damp: 1e-2}"], {"num_gradients": {0.0: 32}, "damping": 1e-2}),
        (
            ["mfac_options:", "  fisher_block_size: 9", "  available_gpus: ['cuda:1']", "  grads_device: cuda:1"],
            {"block_size": 9, "devices": ("cuda:1",), "gradients_device": "cuda:1"},
        ),
    )

    @pytest.mark.parametrize(("keys", "changes"), CHANGES, ids=lambda case: "" if isinstance(case, dict) else case[0])
    def test_every_key_changes_its_setting(self, keys, changes):
        base = {"final_sparsity: 0.8": "final_sparsity", "end_epoch: 10.0": "end_epoch"}
        others = [line for line, key in base.items() if not keys[0].startswith(key)]
        loaded = only(item(*others, *keys))
        assert loaded == MFACSettings(**{"final_sparsity": 0.8, "end_epoch": 10.0, **changes})

    def test_every_key_is_among_these_tests(self):
        tested = {line.partition(":")[0].strip() for keys, _ in self.CHANGES for line in keys}
        assert set(MODIFIERS["MFACPruningModifier"].keys) - {"num_pages"} <= tested

    def test_integers_become_floats(self):
        loaded = only(item("final_sparsity: 0.8", "end_epoch: 10", "init_sparsity: 0"))
        assert isinstance(loaded.end_epoch, float)
        assert isinstance(loaded.initial_sparsity, float)

    @pytest.mark.parametrize(
        ("lines", "name"),
        [(["num_pages: 2"], "num_pages"), (["mfac_options: {num_pages: 2}"], "mfac_options.num_pages")],
    )
    def test_num_pages_is_ignored_with_a_warning(self, lines, name, caplog):
        assert only(mfac(*lines)) == only(mfac())
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(f"<text>:5: MFACPruningModifier.{name}: has no effect")

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("params: 3", "params: 3 must be a name or a list of names"),
            ("params: [a, 3]", "params: ['a', 3] must be a name or a list of names"),
            ("params: {a: b}", "params: {'a': 'b'} must be a name or a list of names"),
            ("params: []", "params: () must be a name or a non-empty list of names"),
            ("init_sparsity: 1.0", "init_sparsity: 1.0 is out of range; the rule is 0 <= init_sparsity < 1"),
            ("init_sparsity: 0.9", "init_sparsity: 0.9 is above final_sparsity 0.8"),
            ("init_sparsity: __FROM_PARAM__", "init_sparsity: '__FROM_PARAM__' is not supported yet"),
            ("start_epoch: -1", "start_epoch: -1.0 is out of range; the rule is start_epoch >= 0"),
            ("start_epoch: .nan", "start_epoch: nan is not a finite number"),
            ("start_epoch: yes", "start_epoch: True is not a finite number"),
            ("update_frequency: 0", "update_frequency: 0.0 is out of range; the rule is update_frequency > 0"),
            ("update_frequency: 1e-9", "update_frequency: 1e-09 epochs makes more than 1000000 pruning steps"),
            ("update_frequency: '1e-1'", "update_frequency: '1e-1' is text where a number must stand"),
            ("update_frequency: [1]", "update_frequency: [1] is not a finite number"),
            (f"update_frequency: {10**400}", "is too large a number"),
            ("inter_func: cosine", "inter_func: 'cosine' is not one of linear, cubic, inverse_cubic"),
            ("leave_enabled: 1", "leave_enabled: 1 is not a boolean"),
            ("mask_type: 2:4", "YAML reads 2:4 as a number, so write it as"),
            ("mask_type: block4", "mask_type: 'block4' is not supported yet; supported is unstructured"),
            ("mask_type: [1, 4]", "mask_type: [1, 4] is not supported yet"),
            ("global_sparsity: 1", "global_sparsity: 1 must be true (all weights compete) or false"),
            ("num_grads: 0", "num_grads: 0 at sparsity 0.0 is not a number of rows"),
            ("num_grads: true", "num_grads: True must be a positive integer, or a mapping"),
            ("num_grads: '64'", "num_grads: '64' must be a positive integer, or a mapping"),
            ("num_grads: [64]", "num_grads: [64] must be a positive integer, or a mapping"),
            ("num_grads: 1e2", "num_grads: 100.0 must be a positive integer, or a mapping"),
            ("num_grads: {0.5: 64}", "num_grads: {0.5: 64} lacks the key 0.0"),
            ("num_grads: {a: 64}", "num_grads: the key 'a' is not a sparsity"),
            ("num_grads: {0.0: 64.0}", "num_grads: 64.0 at sparsity 0.0 is not a number of rows"),
            ("fisher_block_size: 0", "fisher_block_size: 0 must be a positive integer, or null"),
            ("fisher_block_size: true", "fisher_block_size: True must be a positive integer, or null"),
            ("fisher_block_size: 2.5", "fisher_block_size: 2.5 must be a positive integer, or null"),
            ("damp: 0", "damp: 0.0 is out of range; the rule is damp > 0"),
            ("damp: high", "damp: 'high' is text where a number must stand"),
            ("available_gpus: cuda:0", "available_gpus: 'cuda:0' must be a list of device names"),
            ("available_gpus: [0]", "available_gpus: [0] must be a list of device names"),
            ("available_gpus:", "available_gpus: None must be a list of device names"),
            ("available_devices: [a, a]", "available_devices: ['a', 'a'] names a device twice"),
            ("grads_device: 0", "grads_device: 0 must be a device name"),
            ("update: both", "update: 'both' is not one of independent, joint"),
            ("mfac_options: 3", "mfac_options: this must be followed by `key: value` lines"),
            ("mfac_options: {params: a}", "mfac_options.params: unknown key; the keys are num_grads, "),
            ("mfac_options: {dmap: 1.0}", "mfac_options.dmap: unknown key (did you mean damp?)"),
            ("mfac_options: {damp: -1}", "mfac_options.damp: -1.0 is out of range; the rule is damp > 0"),
            ("finl_sparsity: 3", "finl_sparsity: unknown key (did you mean final_sparsity?); the keys are params, "),
            ("qqq: 3", "qqq: unknown key; the keys are params, init_sparsity, "),
            ("grad_sampler_kwargs: {}", "grad_sampler_kwargs: this key is not supported yet"),
            ("phased: true", "phased: this key is not supported yet"),
            ("available_gpus: [[[[[a]]]]]", "available_gpus: lists and mappings are nested too deeply"),
        ],
    )
    def test_wrong_values(self, line, expected):
        message = refusal(mfac(line))
        assert message.startswith("<text>:5: MFACPruningModifier.")
        assert expected in message

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            (
                ["final_sparsity: 1", "end_epoch: 1"],
                "<text>:3: MFACPruningModifier.final_sparsity: 1.0 is out of range",
            ),
            (
                ["end_epoch: 1", "final_sparsity: {0.9: [a]}"],
                "<text>:4: MFACPruningModifier.final_sparsity: {0.9: ['a']} is",
            ),
            (
                ["final_sparsity: 0.5", "start_epoch: 3", "end_epoch: 1"],
                "<text>:5: MFACPruningModifier.end_epoch: 1.0 is before start_epoch 3.0",
            ),
            (["final_sparsity: 0.5"], "<text>:2: MFACPruningModifier: end_epoch is missing; add it"),
            (["damp: 1"], "<text>:2: MFACPruningModifier: final_sparsity and end_epoch are missing; add them"),
            ([], "<text>:2: MFACPruningModifier: final_sparsity and end_epoch are missing; add them"),
        ],
    )
    def test_compulsory_keys(self, keys, expected):
        assert refusal(item(*keys)).startswith(expected)

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            (
                ["available_gpus: []", "available_devices: []"],
                "<text>:6: MFACPruningModifier.available_devices: available_gpus on line 5 already gives this setting",
            ),
            (
                ["damp: 1.0", "mfac_options:", "  damp: 1.0"],
                "<text>:7: MFACPruningModifier.mfac_options.damp: damp on line 5 already gives this setting",
            ),
            (
                ["mfac_options: {available_gpus: []}", "available_devices: []"],
                "<text>:6: MFACPruningModifier.available_devices: mfac_options.available_gpus on line 5 already",
            ),
            (
                ["num_pages: 1", "mfac_options: {num_pages: 1}"],
                "<text>:6: MFACPruningModifier.mfac_options.num_pages: num_pages on line 5 already gives this setting",
            ),
        ],
    )
    def test_one_setting_given_by_two_keys(self, keys, expected):
        assert refusal(mfac(*keys)).startswith(expected)

    def test_the_cause_is_kept(self):
        with pytest.raises(RecipeError) as caught:
            load_recipe(mfac("damp: 0"))
        assert isinstance(caught.value.__cause__, SettingError)
        assert caught.value.__cause__.field == "damping"


class TestModifiers:
    @pytest.mark.parametrize("prefix", ["", "pytorch.", "keras.", "tensorflow."])
    def test_tags_with_and_without_the_name_of_a_framework(self, prefix):
        assert only(item("end_epoch: 3", modifier=f"{prefix}EpochRangeModifier")) == EpochRange(end_epoch=3.0)

    @pytest.mark.parametrize(
        ("modifier", "keys", "expected"),
        [
            (
                "MagnitudePruningModifier",
                ["final_sparsity: 0.8", "end_epoch: 3", "init_sparsity: 0.2", "params: a", "inter_func: linear"],
                MagnitudeSettings(
                    final_sparsity=0.8, end_epoch=3.0, initial_sparsity=0.2, params=("a",), interpolation="linear"
                ),
            ),
            (
                "GMPruningModifier",
                ["final_sparsity: 0.8", "end_epoch: 3"],
                MagnitudeSettings(final_sparsity=0.8, end_epoch=3.0),
            ),
            (
                "GMPruningModifier",
                ["final_sparsity: 0.8", "end_epoch: 3", "global_sparsity: true"],
                MagnitudeSettings(final_sparsity=0.8, end_epoch=3.0, scope="global"),
            ),
            ("EpochRangeModifier", ["start_epoch: 1", "end_epoch: 3"], EpochRange(start_epoch=1.0, end_epoch=3.0)),
            ("SetLearningRateModifier", ["learning_rate: 1e-3"], SetLearningRate(learning_rate=1e-3)),
            (
                "SetLearningRateModifier",
                ["learning_rate: 1", "start_epoch: 2", "constant_logging: true", "log_types: __ALL__"],
                SetLearningRate(learning_rate=1.0, start_epoch=2.0),
            ),
        ],
    )
    def test_modifier_becomes_settings(self, modifier, keys, expected):
        loaded = only(item(*keys, modifier=modifier))
        assert type(loaded) is type(expected)
        assert loaded == expected

    @pytest.mark.parametrize(
        ("modifier", "keys", "expected"),
        [
            ("EpochRangeModifier", [], "<text>:2: EpochRangeModifier: end_epoch is missing; add it"),
            (
                "EpochRangeModifier",
                ["end_epoch: 0"],
                ":3: EpochRangeModifier.end_epoch: 0.0 is out of range; the rule is end_",
            ),
            (
                "EpochRangeModifier",
                ["start_epoch: -1", "end_epoch: 1"],
                ":3: EpochRangeModifier.start_epoch: -1.0 is out of",
            ),
            (
                "EpochRangeModifier",
                ["end_epoch: true"],
                ":3: EpochRangeModifier.end_epoch: True is not a finite number",
            ),
            (
                "SetLearningRateModifier",
                ["learning_rate: 0"],
                ":3: SetLearningRateModifier.learning_rate: 0.0 is out of",
            ),
            ("SetLearningRateModifier", ["learning_rate: 1.5"], "the rule is 0 < learning_rate <= 1"),
            ("SetLearningRateModifier", ["learning_rate: .inf"], "learning_rate: inf is not a finite number"),
            (
                "SetLearningRateModifier",
                ["learning_rate: 1", "start_epoch: -1"],
                ":4: SetLearningRateModifier.start_epoch: -1.0",
            ),
            ("SetLearningRateModifier", ["param_groups: [0]"], "param_groups: this key is not supported yet"),
            ("SetLearningRateModifier", [], "<text>:2: SetLearningRateModifier: learning_rate is missing"),
            (
                "MagnitudePruningModifier",
                ["global_sparsity: true"],
                ":3: MagnitudePruningModifier.global_sparsity: unknown key",
            ),
            ("MagnitudePruningModifier", ["num_grads: 3"], ":3: MagnitudePruningModifier.num_grads: unknown key"),
            (
                "MagnitudePruningModifier",
                ["mfac_options: {}"],
                ":3: MagnitudePruningModifier.mfac_options: unknown key",
            ),
            (
                "GMPruningModifier",
                ["score_type: movement"],
                ":3: GMPruningModifier.score_type: this key is not supported yet",
            ),
            ("GMPruningModifier {a: 1}", [], ":2: GMPruningModifier.a: unknown key"),
            ("GMPruningModifier [a]", [], ":2: GMPruningModifier: this must be followed by `key: value` lines"),
            ("GMPruningModifier text", [], ":2: GMPruningModifier: this must be followed by `key: value` lines"),
        ],
    )
    def test_wrong_modifiers(self, modifier, keys, expected):
        assert expected in refusal(item(*keys, modifier=modifier))

    def test_unknown_modifier(self):
        message = refusal(item("end_epoch: 3", modifier="MFACPrunningModifier"))
        assert message == (
            "<text>:2: !MFACPrunningModifier is not a modifier (did you mean MFACPruningModifier?); "
            f"supported are {', '.join(MODIFIERS)}"
        )

    @pytest.mark.parametrize("tag", ["", "!other.EpochRangeModifier", "!!EpochRangeModifier"])
    def test_items_that_are_no_modifiers(self, tag):
        message = refusal(f"a_modifiers:\n  - {tag} {{end_epoch: 3}}\n")
        assert message.startswith("<text>:2: an item of a modifiers list must begin with a modifier")

    @pytest.mark.parametrize(
        "name",
        [
            "ACDCPruningModifier",
            "ConstantPruningModifier",
            "DistillationModifier",
            "GlobalMagnitudePruningModifier",
            "LearningRateFunctionModifier",
            "MFACGlobalPruningModifier",
            "OBSPruningModifier",
            "QuantizationModifier",
            "SetWeightDecayModifier",
            "TrainableParamsModifier",
        ],
    )
    @pytest.mark.parametrize("prefix", ["", "pytorch."])
    def test_modifiers_of_sparseml_that_are_not_supported_yet(self, name, prefix):
        message = refusal(item("x: 1", modifier=prefix + name))
        assert message.startswith(f"<text>:2: {name} is not supported yet; ")
        assert "supported are MFACPruningModifier, " in message

    def test_the_global_modifiers_say_what_to_write_instead(self):
        message = refusal(item(modifier="MFACGlobalPruningModifier"))
        assert "write !MFACPruningModifier with global_sparsity: true" in message

    def test_document_order_and_properties(self):
        text = (
            "late_modifiers:\n  - !SetLearningRateModifier {learning_rate: 0.1, start_epoch: 90}\n"
            + mfac()
            + "training_modifiers:\n  - !EpochRangeModifier {end_epoch: 14}\n"
            + "  - !GMPruningModifier {final_sparsity: 0.5, end_epoch: 3}\n"
        )
        recipe = load_recipe(text)
        kinds = (SetLearningRate, MFACSettings, EpochRange, MagnitudeSettings)
        assert tuple(type(modifier) for modifier in recipe.modifiers) == kinds
        assert recipe.pruning == (recipe.modifiers[1], recipe.modifiers[3])
        assert recipe.max_epochs == 14.0
        assert recipe.source == "<text>"

    def test_max_epochs_counts_pruning_and_is_zero_without_an_end(self):
        assert load_recipe(mfac()).max_epochs == 10.0
        assert load_recipe(item("learning_rate: 0.1", modifier="SetLearningRateModifier")).max_epochs == 0.0

    def test_recipes_cannot_be_changed(self):
        with pytest.raises(AttributeError):
            load_recipe(mfac()).source = "other"
        with pytest.raises(AttributeError):
            EpochRange(end_epoch=3.0).end_epoch = 4.0

    def test_version_and_metadata_are_ignored(self):
        assert only("version: 1.1.0\n__metadata__: {a: [1]}\n" + mfac()) == only(mfac())


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
            assert load_recipe(example).modifiers

    def test_the_reference_page_names_every_modifier_and_key(self):
        page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
        for name, modifier in MODIFIERS.items():
            assert f"`{name}`" in page
            for key in (*modifier.keys, *modifier.nested, *modifier.unsupported):
                assert f"`{key}`" in page, key
