"""Gradient samples of models that are evaluated in other ways than model(inputs) in eval mode."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mfac_torch import GradSampler, MFACPruningModifier, ScheduledModifierManager


def draw(sampler, model, count=1, names=None):
    parameters = {name: each for name, each in model.named_parameters() if names is None or name in names}
    return list(sampler.gradients(model, parameters, count))


def by_backward(model, loss):
    """The gradients of a copy, by the ordinary way."""
    copied = copy.deepcopy(model)
    loss(copied).backward()
    return {name: parameter.grad for name, parameter in copied.named_parameters()}


def assert_same(row, expected):
    assert row.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(row[name], gradient, rtol=0, atol=0)


# --- blocks that are evaluated again in their own backward pass


class Checkpointed(nn.Module):
    def __init__(self, first, later):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.first, self.later = first, later

    def forward(self, x):
        x = checkpoint(self.a, x.requires_grad_(), use_reentrant=True) if self.first else self.a(x)
        return self.c(checkpoint(self.b, x, use_reentrant=True) if self.later else self.b(x))


@pytest.mark.parametrize(("first", "later"), [(True, False), (False, True), (True, True)])
def test_reentrant_checkpoints_have_their_gradients(first, later):
    torch.manual_seed(0)
    model, batch = Checkpointed(first, later), (torch.randn(4, 8), torch.randint(2, (4,)))
    plain = Checkpointed(False, False)
    plain.load_state_dict(model.state_dict())
    expected = by_backward(plain, lambda copied: F.cross_entropy(copied(batch[0].clone()), batch[1]))
    (row,) = draw(GradSampler([batch], F.cross_entropy), model)
    assert_same(row, expected)
    assert all(gradient.any() for gradient in row.values())
    assert not batch[0].requires_grad  # the user's own tensor
    assert batch[0].grad is None


def test_gradients_of_everything_else_are_put_back_and_nothing_steps_inside_the_backward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    criterion = nn.Linear(2, 1)
    model[0].weight.grad = before = torch.full((4, 4), 7.0)
    stepped = []
    model[1].weight.register_post_accumulate_grad_hook(stepped.append)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = criterion

        def forward(self, output, target):
            return (self.criterion(output) - target).square().mean()

    draw(GradSampler([(torch.randn(3, 4), torch.randn(3, 1))], Loss()), model, names=["1.weight"])
    assert model[0].weight.grad is before
    assert torch.equal(before, torch.full((4, 4), 7.0))
    assert all(each.grad is None for each in (model[0].bias, model[1].weight, criterion.weight))
    assert not stepped
    model(torch.randn(3, 4)).sum().backward()
    assert len(stepped) == 1  # the hook is there again


def test_a_failing_loss_leaves_gradients_and_hooks_as_they_were():
    model = nn.Linear(4, 2)
    model.weight.grad = before = torch.ones(2, 4)
    stepped = []
    model.weight.register_post_accumulate_grad_hook(stepped.append)

    def failing(output, target):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw(GradSampler([(torch.randn(3, 4), torch.randn(3, 2))], failing), model)
    assert model.weight.grad is before
    model(torch.randn(3, 4)).sum().backward()
    assert len(stepped) == 1


# --- training mode


class Detector(nn.Module):
    """Returns losses in training mode, and boxes otherwise."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.frozen_norm = nn.BatchNorm1d(3)

    def forward(self, x, targets=None):
        boxes = self.frozen_norm(self.norm(self.body(x)))
        if not self.training:
            return [{"boxes": box} for box in boxes]
        return {"box": (boxes - targets).square().mean(), "size": boxes.abs().mean()}


def detector_batch():
    return torch.randn(6, 4), torch.randn(6, 3)


@pytest.mark.parametrize("was_training", [True, False])
def test_a_model_with_losses_in_training_mode_only(was_training):
    torch.manual_seed(0)
    model, batch = Detector().train(was_training), detector_batch()
    model.frozen_norm.eval()
    trained = copy.deepcopy(model)
    if not was_training:
        trained.train()
    expected = by_backward(trained, lambda copied: sum(copied(*batch).values()))
    flags = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    (row,) = draw(GradSampler([batch], training=True), model)
    assert_same(row, expected)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_statistics_are_put_back_when_the_loss_fails():
    model = Detector()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def failing(output, target):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw(GradSampler([([torch.randn(6, 4)], {"targets": torch.randn(6, 3)}, None)], failing, training=True), model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_without_training_such_a_model_is_an_error_with_the_cure():
    with pytest.raises(ValueError, match=r"the output of the model .* contains no loss .*training=True"):
        draw(GradSampler([detector_batch()]), Detector())


# --- batches and losses of Hugging Face


class Output(dict):
    """Stands in for a ModelOutput: a mapping with attributes."""

    __getattr__ = dict.get


class Classifier(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.layer, self.form = nn.Linear(4, 3), form

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.layer(input_ids * attention_mask)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        match self.form:
            case "attribute":
                return Output(logits=logits) if loss is None else Output(loss=loss, logits=logits)
            case "tuple":
                return (logits,) if loss is None else (loss, logits)
        return logits if loss is None else loss


def tokens():
    return {
        "input_ids": torch.randn(5, 4),
        "attention_mask": torch.ones(5, 1),
        "labels": torch.randint(3, (5,)),
    }


@pytest.mark.parametrize("form", ["attribute", "tuple", "tensor"])
def test_a_mapping_is_keyword_arguments_and_the_model_gives_its_loss(form):
    torch.manual_seed(0)
    model, batch = Classifier(form).eval(), tokens()
    inputs = batch["input_ids"] * batch["attention_mask"]
    expected = by_backward(model, lambda copied: F.cross_entropy(copied.layer(inputs), batch["labels"]))
    (row,) = draw(GradSampler([batch]), model)
    assert_same(row, expected)


def test_with_a_loss_function_the_labels_are_its_target():
    torch.manual_seed(0)
    model, batch = Classifier("tensor"), tokens()
    seen = []

    def loss(output, target):
        seen.append(target)
        return F.cross_entropy(output, target, label_smoothing=0.1)

    (row,) = draw(GradSampler([batch], loss), model)
    assert torch.equal(seen[0], batch["labels"])
    logits = lambda copied: copied(batch["input_ids"], batch["attention_mask"])  # noqa: E731
    expected = by_backward(model, lambda copied: F.cross_entropy(logits(copied), batch["labels"], label_smoothing=0.1))
    assert_same(row, expected)


def test_a_mapping_without_labels_is_refused_with_what_it_has():
    with pytest.raises(ValueError, match=r"a dict of input_ids, which has no labels for loss_fn"):
        draw(GradSampler([{"input_ids": torch.randn(5, 4)}], F.cross_entropy), Classifier("tensor"))


def test_a_mapping_without_labels_and_a_model_without_loss_is_an_error():
    batch = tokens()
    del batch["labels"]
    with pytest.raises(ValueError, match="the output of the model .* contains no loss .*add labels to the batches"):
        draw(GradSampler([batch]), Classifier("attribute"))


def test_a_model_that_does_not_take_the_batch_is_told_why_it_is_called_so():
    with pytest.raises(TypeError, match=r"no loss_fn, so it calls Linear with all of a batch .*too many positional"):
        draw(GradSampler([(torch.randn(2, 4), torch.randint(2, (2,)))]), nn.Linear(4, 2))


def test_a_real_model_of_transformers_is_pruned_without_any_wrapper():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertForSequenceClassification(config)
    batches = [
        transformers.BatchEncoding({"input_ids": torch.randint(20, (4, 6)), "labels": torch.randint(2, (4,))})
        for _ in range(4)
    ]
    manager = ScheduledModifierManager([MFACPruningModifier(final_sparsity=0.5, end_epoch=0.0, num_grads=4)])
    manager.apply(model, grad_sampler=GradSampler(batches))
    weight = model.get_parameter("bert.encoder.layer.0.output.dense.weight")
    assert int((weight == 0).sum()) == weight.numel() // 2


# --- arguments in the wrong place


@pytest.mark.parametrize(
    ("arguments", "logged"),
    [
        ((F.cross_entropy, [1]), "the batches come first"),
        ((nn.CrossEntropyLoss(), [1]), "the batches come first"),
        (([1], torch.tensor(1.0)), "loss_fn is a Tensor; pass a callable"),
        (([1], nn.CrossEntropyLoss), r"loss_fn is the class CrossEntropyLoss; pass an instance: CrossEntropyLoss\(\)"),
        ((torch.randn(3), F.cross_entropy), "data_loader_or_builder is a Tensor; pass an iterable of batches"),
        (({"x": torch.randn(3)}, F.cross_entropy), "data_loader_or_builder is a dict; pass an iterable of batches"),
    ],
)
def test_arguments_in_the_wrong_place_are_refused_by_name(arguments, logged):
    with pytest.raises(TypeError, match=logged):
        GradSampler(*arguments)


def test_the_dictionary_form_needs_no_loss_where_the_model_has_one():
    torch.manual_seed(0)
    batch = tokens()
    (row,) = draw(GradSampler.of({"data_loader_builder": lambda: [batch]}), Classifier("tuple"))
    assert row["layer.weight"].any()


# --- one batch for many samples


def test_a_single_batch_for_many_samples_is_said_once_with_the_number_of_distinct_rows(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    batches = [(torch.randn(4, 4), torch.randint(2, (4,))) for _ in range(2)]
    manager = ScheduledModifierManager(
        [MFACPruningModifier(final_sparsity=0.5, end_epoch=0.0, num_grads=8, num_recomputations=3)]
    )
    with caplog.at_level(logging.WARNING):
        manager.apply(model, grad_sampler=GradSampler(batches, F.cross_entropy))
    (warning,) = [record.getMessage() for record in caplog.records if "distinct" in record.getMessage()]
    assert warning.startswith("of 8 gradient samples only 2 are distinct")


def test_different_batches_are_not_spoken_of(caplog):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    batches = [(torch.randn(4, 4), torch.randint(2, (4,))) for _ in range(8)]
    manager = ScheduledModifierManager([MFACPruningModifier(final_sparsity=0.5, end_epoch=0.0, num_grads=8)])
    with caplog.at_level(logging.WARNING):
        manager.apply(model, grad_sampler=GradSampler(batches, F.cross_entropy))
    assert "distinct" not in caplog.text


# --- samples that tell nothing


@pytest.fixture(scope="module")
def trained():
    """A small convolutional network that knows its data, and the data in batches."""
    torch.manual_seed(0)
    labels = torch.randint(3, (64,))
    images = torch.randn(64, 1, 6, 6) + torch.randn(3, 1, 6, 6)[labels]
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    return model, list(zip(images.split(4), labels.split(4), strict=True))


def warnings_of(caplog, trained, loss, *, batches=None, training=False, damp=1e-5):
    """What is said where the trained network is pruned in one shot."""
    model, data = copy.deepcopy(trained[0]), trained[1] if batches is None else batches
    modifier = MFACPruningModifier(final_sparsity=0.5, end_epoch=0.0, num_grads=16, damp=damp)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sampler = GradSampler(data, loss, training=training)
        ScheduledModifierManager([modifier]).apply(model, grad_sampler=sampler)
    return [record.getMessage() for record in caplog.records if "gradient samples" in record.getMessage()]


def divergence(output, targets):
    return F.kl_div(F.log_softmax(output, dim=1), F.softmax(targets, dim=1), reduction="batchmean")


@pytest.mark.parametrize(
    ("loss", "damp", "said"),
    [
        (F.mse_loss, 1e-5, "all 16 gradient samples are zero, so M-FAC reduces to magnitude pruning"),
        (divergence, 1e-5, "the 16 gradient samples are as small as rounding errors"),
        (divergence, 1e-20, "the 16 gradient samples are as small as rounding errors"),
    ],
)
def test_a_network_that_is_distilled_against_itself_is_named_with_the_cure(caplog, trained, loss, damp, said):
    model, data = trained
    with torch.no_grad():
        batches = [(images, model(images)) for images, _ in data]
    (warning,) = warnings_of(caplog, trained, loss, batches=batches, damp=damp)
    assert warning.startswith(said)
    assert "sample the targets from its own output instead" in warning


def test_samples_of_one_batch_are_named_and_dropout_makes_them_differ(caplog, trained):
    one = trained[1][:1]
    (warning,) = warnings_of(caplog, trained, F.cross_entropy, batches=one)
    assert warning.startswith("of 16 gradient samples only 1 is distinct, so the Fisher has rank 1")
    assert warnings_of(caplog, trained, F.cross_entropy, batches=one, training=True) == []


def test_batches_of_the_same_images_in_another_order_are_nearly_equal(caplog, trained):
    images, labels = (torch.cat(each) for each in zip(*trained[1], strict=True))
    torch.manual_seed(1)
    orders = [torch.randperm(64) for _ in range(16)]
    (warning,) = warnings_of(caplog, trained, F.cross_entropy, batches=[(images[o], labels[o]) for o in orders])
    assert warning.startswith("the 16 gradient samples are nearly equal")


def test_a_loss_that_is_scaled_down_is_healthy_and_hidden_by_a_damping_that_is_not(caplog, trained):
    def scaled(output, targets):
        return 1e-4 * F.cross_entropy(output, targets)

    assert warnings_of(caplog, trained, F.cross_entropy) == []
    assert warnings_of(caplog, trained, scaled, damp=1e-13) == []
    (warning,) = warnings_of(caplog, trained, scaled)
    assert warning.startswith("the damping of 1e-05 hides the empirical Fisher of the 16 gradient samples")
    assert "Use damp: auto" in warning


# --- what the loss does not reach, and what does not fit


class Unread(nn.Module):
    """Has a part that a loss reads in training mode only."""

    def __init__(self):
        super().__init__()
        self.body, self.auxiliary = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.body(x) + self.auxiliary(x) if self.training else self.body(x)


def test_weights_that_no_sample_reaches_are_said_once(caplog):
    torch.manual_seed(0)
    model, batches = Unread(), [(torch.randn(4, 4), torch.randint(2, (4,))) for _ in range(4)]
    parameters = dict(model.named_parameters())
    for training in (False, True):
        caplog.clear()
        sampler = GradSampler(batches, F.cross_entropy, training=training)
        for _ in range(2):
            samples = sampler.gradients(model, parameters, 4)
            for _ in range(4):  # as a pruning step does, which takes so many and no more
                next(samples)
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == (0 if training else 1)
        assert training or "zero in every gradient sample for auxiliary.weight, auxiliary.bias, so" in warnings[0]


def test_what_a_reentrant_checkpoint_loses_is_said(caplog):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(checkpoint(self.a, x, use_reentrant=True))

    model = Checkpointed()
    sampler = GradSampler([(torch.randn(4, 4), torch.randint(2, (4,)))], F.cross_entropy)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        list(sampler.gradients(model, dict(model.named_parameters()), 1))
    assert "zero in every gradient sample for a.weight, a.bias, so" in caplog.text
    assert {record.name for record in caplog.records} == {"mfac_torch"}


def test_batches_that_the_model_does_not_take_are_refused_with_a_loss_too():
    model = nn.Linear(4, 2)
    sampler = GradSampler([{"image": torch.randn(4, 4), "labels": torch.randint(2, (4,))}], F.cross_entropy)
    with pytest.raises(
        TypeError, match=r"calls Linear with the inputs of a batch .* does not accept .*; pass batches that the model"
    ):
        next(sampler.gradients(model, {"weight": model.weight}, 1))


def test_a_loss_that_does_not_take_the_output_is_told_what_it_got():
    model = nn.Sequential(nn.Linear(4, 2))
    model.forward = lambda x: {"logits": model[0](x)}
    sampler = GradSampler([(torch.randn(4, 4), torch.randint(2, (4,)))], F.cross_entropy)
    with pytest.raises(TypeError) as caught:
        next(sampler.gradients(model, dict(model.named_parameters()), 1))
    assert caught.value.__notes__ == [
        "The GradSampler called loss_fn(output, target), where output is a dict that the model returned; let loss_fn "
        "take that."
    ]


def test_inference_mode_is_refused_by_name():
    model = nn.Linear(4, 2)
    sampler = GradSampler([(torch.randn(4, 4), torch.randint(2, (4,)))], F.cross_entropy)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"under torch.inference_mode\(\); call it outside"):
        next(sampler.gradients(model, {"weight": model.weight}, 1))
