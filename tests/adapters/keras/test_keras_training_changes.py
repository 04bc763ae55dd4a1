"""Learning rates, weight decay and frozen variables of a recipe, by the step."""

import re

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_core.errors import SettingError  # noqa: E402
from mfac_keras import MFACPruningCallback  # noqa: E402
from mfac_keras.optimizers import innermost, optimizer_state  # noqa: E402

BODY = "tiny/body/kernel"
RATES = pytest.mark.feature("learning rates of a recipe")
DECAY = pytest.mark.feature("weight decay of a recipe")
TRAINABLE = pytest.mark.feature("variables that a recipe freezes for some epochs")


def modifier(name, **keys):
    lines = "".join(f"    {key}: {value}\n" for key, value in keys.items())
    return f"  - !{name}\n{lines}"


def recipe(*modifiers):
    return "modifiers:\n" + "".join(modifiers)


class Rates(keras.callbacks.Callback):
    """Notes the learning rate of each optimizer that each training step is made with."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_begin(self, batch, logs=None):
        leaves = innermost(self.model.optimizer)
        self.rates.append([round(float(leaf.learning_rate.numpy()), 6) for leaf in leaves])


class Weights(keras.callbacks.Callback):
    """Notes every weight, and what optimizers remember of it, after each training step."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append({variable.name + variable.path: self.all_of(variable) for variable in self.model.weights})

    def all_of(self, variable):
        slots = [slot for leaf in innermost(self.model.optimizer) for slot in optimizer_state(leaf, variable)]
        return [each.numpy().copy() for each in (variable, *slots)]

    def changes(self, layer):
        """Whether anything of a layer is changed by each step but the first."""
        pairs = zip(self.values[:-1], self.values[1:], strict=True)
        return [
            any(
                not np.array_equal(old, new)
                for name in before
                if f"/{layer}/" in name
                for old, new in zip(before[name], after[name], strict=True)
            )
            for before, after in pairs
        ]


def rates_of(task, text, optimizer=None, *others, **options):
    rates = Rates()
    model = task.model(optimizer or keras.optimizers.SGD(0.2))
    task.fit(model, MFACPruningCallback(text, verbose=0), *others, rates, **options)
    return rates.rates


def two_optimizers():
    optimizers = {".*head.*": keras.optimizers.SGD(0.2, momentum=0.9)}
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.2), optimizers))


@RATES
def test_a_learning_rate_is_set_at_its_step_beside_pruning(task):
    text = task.recipe() + "  - !SetLearningRateModifier\n    learning_rate: 0.05\n    start_epoch: 1.6\n"
    assert rates_of(task, text, epochs=3) == [[0.2]] * 8 + [[0.05]] * 7


@RATES
def test_a_function_moves_the_rate_at_each_step_and_ends_exactly(task):
    text = recipe(
        modifier(
            "LearningRateFunctionModifier",
            lr_func="linear",
            init_lr=0.1,
            final_lr=0.01,
            start_epoch=1.0,
            end_epoch=1.55,  # the step nearest to it is that of epoch 1.6
        )
    )
    expected = [0.2] * 5 + [0.1, 0.067273, 0.034545] + [0.01] * 2
    assert [rate for (rate,) in rates_of(task, text, epochs=2)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.once
@RATES
def test_a_schedule_of_pytorch_is_followed_epoch_by_epoch(task):
    keys = {"lr_class": "StepLR", "lr_kwargs": "{step_size: 1, gamma: 0.5}", "init_lr": 0.1}
    text = recipe(modifier("LearningRateModifier", start_epoch=1.0, end_epoch=3.0, **keys))
    rates = [rate for (rate,) in rates_of(task, text)]
    assert rates == pytest.approx([0.2] * 5 + [0.1] * 5 + [0.05] * 10)


@RATES
def test_outside_its_time_the_rate_is_yours(task):
    class Mine(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch in {0, 2}:
                self.model.optimizer.learning_rate = 0.7

    text = recipe(modifier("SetLearningRateModifier", learning_rate=0.05, start_epoch=1.0))
    assert rates_of(task, text, None, Mine(), epochs=3) == [[0.7]] * 5 + [[0.05]] * 5 + [[0.7]] * 5


@RATES
@pytest.mark.needs("MultiOptimizer")
def test_a_parameter_group_is_an_optimizer_of_a_multi_optimizer(task):
    first = modifier("SetLearningRateModifier", learning_rate=0.01, start_epoch=1.0, param_groups=[1])
    optimizer = two_optimizers()
    number = [type(leaf).__name__ for leaf in innermost(optimizer)].index("SGD")
    text = recipe(first.replace("[1]", f"[{number}]"))
    rates = [dict(zip("01", each, strict=True)) for each in rates_of(task, text, optimizer, epochs=2)]
    assert [each[str(number)] for each in rates] == [0.2] * 5 + [0.01] * 5
    assert [each[str(1 - number)] for each in rates] == [0.2] * 10


@RATES
@pytest.mark.needs("MultiOptimizer")
@pytest.mark.parametrize("of_head", [True, False])
def test_an_optimizer_beside_may_have_a_schedule_of_its_own(task, of_head):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    rates = (0.2, schedule) if of_head else (schedule, 0.2)
    default, head = map(keras.optimizers.SGD, rates)
    optimizer = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(default, {".*head.*": head}))
    number = [isinstance(leaf.learning_rate, keras.Variable) for leaf in innermost(optimizer)].index(True)
    text = recipe(modifier("SetLearningRateModifier", learning_rate=0.01, param_groups=[number]))
    history = task.fit(task.model(optimizer), MFACPruningCallback(text, verbose=0), epochs=1)
    assert float(innermost(optimizer)[number].learning_rate.numpy()) == pytest.approx(0.01)
    assert "learning_rate" not in history.history


@pytest.mark.once
@RATES
def test_any_other_optimizer_is_the_parameter_group_0(task):
    text = recipe(modifier("SetLearningRateModifier", learning_rate=0.01, param_groups=[0]))
    assert rates_of(task, text, epochs=1) == [[0.01]] * 5
    with pytest.raises(SettingError, match=r"SetLearningRateModifier.param_groups: 1 is not .* the optimizer has 1,"):
        rates_of(task, text.replace("[0]", "[1]"))


@RATES
def test_an_optimizer_with_a_schedule_of_its_own_is_refused(task):
    text = task.recipe() + "  - !SetLearningRateModifier\n    learning_rate: 0.05\n"
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    with pytest.raises(ValueError, match="has a learning rate schedule"):
        task.fit(task.model(keras.optimizers.SGD(schedule)), MFACPruningCallback(text))
    task.fit(task.model(keras.optimizers.SGD(schedule)), MFACPruningCallback(task.recipe(), verbose=0), epochs=2)


@DECAY
@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_weight_decay_is_set_at_its_step(task, kind, options):
    task.x[:] = 0  # so that the kernel of the first layer has no gradient
    model = task.model(getattr(keras.optimizers, kind)(0.1, weight_decay=0.02), **options)
    weights = Weights()
    text = recipe(
        modifier("SetWeightDecayModifier", weight_decay=0.5, start_epoch=0.6),
        modifier("SetWeightDecayModifier", weight_decay=0.0, start_epoch=1.2),
    )
    task.fit(model, MFACPruningCallback(text, verbose=0), weights, epochs=2)
    norms = [
        float(np.linalg.norm(next(each[0] for name, each in values.items() if "body/kernel" in name)))
        for values in weights.values
    ]
    factors = [after / before for before, after in zip(norms[:-1], norms[1:], strict=True)]
    assert factors == pytest.approx([0.998] * 2 + [0.95] * 3 + [1.0] * 4, rel=1e-5)


@DECAY
def test_both_weight_decays_of_muon_are_set(task):
    optimizer = keras.optimizers.Muon(0.01, weight_decay=0.1)
    if not hasattr(optimizer, "adam_weight_decay"):
        pytest.skip(f"the Muon of keras {keras.__version__} has a single weight decay")
    model = task.model(optimizer)
    text = recipe(modifier("SetWeightDecayModifier", weight_decay=0.25))
    task.fit(model, MFACPruningCallback(text, verbose=0), epochs=1)
    assert (model.optimizer.weight_decay, model.optimizer.adam_weight_decay) == (0.25, 0.25)


@DECAY
def test_the_weight_decay_of_a_resumed_run_is_that_of_the_recipe(task, tmp_path):
    text = task.recipe() + modifier("SetWeightDecayModifier", weight_decay=0.5, start_epoch=1.0)
    path = tmp_path / "state"
    task.fit(task.model(), MFACPruningCallback(text, state_path=path, verbose=0), epochs=2)
    for resumed in (
        MFACPruningCallback(text, state_path=path, verbose=0),
        MFACPruningCallback(text, steps_per_epoch=5, verbose=0),
    ):
        model = task.model()
        assert model.optimizer.weight_decay is None
        task.fit(model, resumed, initial_epoch=2, epochs=3)
        assert model.optimizer.weight_decay == 0.5


@TRAINABLE
@pytest.mark.parametrize(
    "optimizer",
    ["adam with decay", "accumulating", "scaled", pytest.param("multi", marks=pytest.mark.needs("MultiOptimizer"))],
)
def test_a_frozen_layer_does_not_change_and_neither_does_what_the_optimizer_remembers(task, optimizer):
    made = {
        "adam with decay": lambda: keras.optimizers.Adam(0.1, weight_decay=0.1, clipnorm=1.0),
        "accumulating": lambda: keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2),
        "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1)),
        "multi": two_optimizers,
    }[optimizer]()
    keys = {"params": "['re:.*/body/']", "trainable": "false", "start_epoch": 1.2, "end_epoch": 2.0}
    weights = Weights()
    text = recipe(modifier("TrainableParamsModifier", **keys))
    task.fit(task.model(made), MFACPruningCallback(text, verbose=0), weights, epochs=3)
    # of the 15 steps all but the first
    assert weights.changes("body") == [True] * 5 + [False] * 4 + [True] * 5
    assert all(weights.changes("head"))


@TRAINABLE
def test_a_later_modifier_counts_more_while_both_are_there(task):
    every = {"params": "__ALL__", "trainable": "false", "start_epoch": 0.0}
    head = {"params": "['re:.*/head/']", "trainable": "true", "start_epoch": 1.0, "end_epoch": 2.0}
    weights = Weights()
    text = recipe(modifier("TrainableParamsModifier", **every), modifier("TrainableParamsModifier", **head))
    model = task.model()
    task.fit(model, MFACPruningCallback(text, verbose=0), weights, epochs=3)
    assert not any(weights.changes("body"))
    assert weights.changes("head") == [False] * 4 + [True] * 5 + [False] * 5
    again = Weights()
    task.fit(model, again, epochs=1)
    assert all(again.changes("body"))
    assert len(model.trainable_variables) == 4


@TRAINABLE
def test_what_is_frozen_is_pruned_all_the_same(task, watch):
    frozen = modifier("TrainableParamsModifier", params="['re:.*/body/kernel']", trainable="false", start_epoch=0.0)
    pruning = MFACPruningCallback(task.recipe() + frozen, verbose=0)
    watching = watch(pruning)
    model = task.model()
    before = task.kernels(model)["tiny/body/kernel"]
    task.fit(model, pruning, watching)
    after = task.kernels(model)["tiny/body/kernel"]
    assert watching.grown == 0
    assert watching.steps > 2
    assert np.count_nonzero(after) < 24
    assert np.isin(before, after).mean() < 0.9  # the update of M-FAC has moved what is kept


@pytest.mark.once
@TRAINABLE
def test_a_variable_of_a_layer_that_is_not_trainable_cannot_be_unfrozen(task):
    model = task.model()
    model.layers[0].trainable = False
    model.compile("adam", "mse")
    text = recipe(modifier("TrainableParamsModifier", params="['re:.*kernel']", trainable="true"))
    with pytest.raises(SettingError, match=r"tiny/body/kernel cannot be unfrozen .* set layer.trainable = True"):
        task.fit(model, MFACPruningCallback(text))
    task.fit(model, MFACPruningCallback(text.replace("true", "false"), verbose=0), epochs=1)


@pytest.mark.once
@TRAINABLE
@pytest.mark.parametrize("strict", [True, False])
def test_params_that_match_nothing_are_an_error_unless_the_recipe_says_otherwise(task, strict, caplog):
    keys = {"params": "['re:.*nothing']", "trainable": "false", "params_strict": str(strict).lower()}
    callback = MFACPruningCallback(recipe(modifier("TrainableParamsModifier", **keys)), verbose=0)
    if strict:
        with pytest.raises(SettingError, match=r"'re:\.\*nothing' matches no variable"):
            task.fit(task.model(), callback, epochs=1)
    else:
        task.fit(task.model(), callback, epochs=1)
        (warning,) = [record for record in caplog.records if "is left out" in record.getMessage()]
        assert (warning.levelname, warning.name) == ("WARNING", "mfac_keras")
        assert "'re:.*nothing' matches no variable of the model" in warning.getMessage()


@TRAINABLE
def test_an_interrupted_fit_leaves_nothing_frozen(task):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = task.model()
    text = recipe(modifier("TrainableParamsModifier", params="__ALL__", trainable="false"))
    with pytest.raises(KeyboardInterrupt):
        task.fit(model, MFACPruningCallback(text, verbose=0), Stop())
    weights = Weights()
    task.fit(model, weights, epochs=1)
    assert all(weights.changes("body"))


@pytest.mark.once
@RATES
def test_a_recipe_that_does_not_prune_sets_what_it_sets_and_says_so(task, caplog):
    text = recipe(
        modifier("EpochRangeModifier", start_epoch=0.0, end_epoch=2.0),
        modifier("SetLearningRateModifier", learning_rate=0.01),
    )
    callback = MFACPruningCallback(text, verbose=0)
    history = task.fit(task.model(keras.optimizers.SGD(0.2)), callback, epochs=2)
    assert float(callback.model.optimizer.learning_rate.numpy()) == pytest.approx(0.01)
    assert history.history["sparsity"] == [0.0, 0.0]
    assert callback.masks == {}
    assert "the recipe has no pruning modifier: nothing is pruned" in caplog.text


FROZEN_AND_DECAYED = recipe(
    modifier("TrainableParamsModifier", params="['re:.*/body/']", trainable="false", start_epoch=1.0, end_epoch=2.0),
    modifier("SetWeightDecayModifier", weight_decay=0.5, start_epoch=1.0),
)


@TRAINABLE
@pytest.mark.backends("tensorflow")
def test_each_replica_is_frozen_and_decayed(task, two_replicas):
    plain = task.model("sgd")
    task.fit(plain, MFACPruningCallback(FROZEN_AND_DECAYED, verbose=0), epochs=3)
    with two_replicas.scope():
        model = task.model("sgd")
    weights = Weights()
    task.fit(model, MFACPruningCallback(FROZEN_AND_DECAYED, verbose=0), weights, epochs=3)
    assert weights.changes("body") == [True] * 4 + [False] * 5 + [True] * 5
    for one, other in zip(plain.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@TRAINABLE
@pytest.mark.backends("jax")
def test_weights_on_two_devices_are_frozen_and_decayed(task):
    plain = task.model("sgd")
    task.fit(plain, MFACPruningCallback(FROZEN_AND_DECAYED, verbose=0), epochs=3)
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"]))
    try:
        model = task.model("sgd")
        weights = Weights()
        task.fit(model, MFACPruningCallback(FROZEN_AND_DECAYED, verbose=0), weights, epochs=3)
    finally:
        keras.distribution.set_distribution(None)
    assert weights.changes("body") == [True] * 4 + [False] * 5 + [True] * 5
    for one, other in zip(plain.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@TRAINABLE
@pytest.mark.backends("tensorflow", "jax")
def test_changes_wait_for_the_end_of_an_execution(task):
    class Bodies(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            bodies.append(task.kernels(self.model)[BODY])

    bodies = []
    text = FROZEN_AND_DECAYED.replace("end_epoch: 2.0", "end_epoch: 3.0").replace(
        "start_epoch: 1.0", "start_epoch: 0.6"
    )
    task.fit(task.model("sgd", steps_per_execution=5), MFACPruningCallback(text, verbose=0), Bodies(), epochs=4)
    changes = [not np.array_equal(one, other) for one, other in zip(bodies[:-1], bodies[1:], strict=True)]
    assert changes == [False, False, True]


@RATES
def test_the_learning_rate_is_in_the_logs_where_the_recipe_sets_it(task):
    text = recipe(modifier("SetLearningRateModifier", learning_rate=0.05, start_epoch=1.0))
    history = task.fit(task.model("sgd"), MFACPruningCallback(text, verbose=0), epochs=3, validation_data=task.batch(0))
    assert history.history["learning_rate"] == pytest.approx([0.01, 0.05, 0.05])
    assert set(history.history) == {"loss", "val_loss", "sparsity", "learning_rate"}
    plain = task.fit(task.model("sgd"), MFACPruningCallback(task.recipe(), verbose=0), epochs=1)
    assert set(plain.history) == {"loss", "sparsity"}


@pytest.mark.once
@TRAINABLE
def test_what_is_pruned_while_it_is_frozen_is_warned_of(task, caplog):
    keys = {"params": "['re:.*/body/']", "trainable": "false", "start_epoch": 1.5}
    text = task.recipe() + modifier("TrainableParamsModifier", **keys)
    task.fit(task.model(), MFACPruningCallback(text, verbose=0))
    warned = "MFACPruningModifier prunes tiny/body/kernel while TrainableParamsModifier freezes them"
    assert warned in caplog.text
    caplog.clear()
    task.fit(task.model(), MFACPruningCallback(text.replace("1.5", "3.2"), verbose=0))
    assert "freezes" not in caplog.text


@TRAINABLE
@DECAY
def test_changes_are_told_when_they_are_made(task, caplog):
    with caplog.at_level("INFO", logger="mfac_keras"):
        task.fit(task.model("sgd"), MFACPruningCallback(FROZEN_AND_DECAYED, verbose=0), epochs=3)
    logged = [line.getMessage() for line in caplog.records if line.levelname == "INFO" and line.name == "mfac_keras"]
    assert [re.sub("sgd[_0-9]*", "sgd", line.lower()) for line in logged] == [
        "the weight decay of sgd is 0.5",
        "from step 5, frozen: tiny/body/kernel, tiny/body/bias",
        "from step 10, frozen: nothing, all variables are trained again",
    ]


@pytest.mark.once
def test_a_recipe_for_longer_training_than_fit_makes_is_warned_of(task, caplog):
    text = task.recipe() + modifier("EpochRangeModifier", end_epoch=9.0)
    text += modifier("SetWeightDecayModifier", weight_decay=0.1, start_epoch=7.0)
    task.fit(task.model(), MFACPruningCallback(text, verbose=0), epochs=4)
    assert "training ends at epoch 4, but the recipe trains until epoch 9 (EpochRangeModifier)" in caplog.text
    assert "SetWeightDecayModifier: nothing happens, because its start_epoch 7 lies at or after the end" in caplog.text
