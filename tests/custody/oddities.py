"""What programs do to the model and the optimizer that ``make_private`` returned.

Each function of a run is called once, right after ``make_private``. What must happen
later is put into ``run.between``, which is called before each update with its number.
"""

import copy

import torch


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=1e-3)


def with_momentum(module):
    return torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)


def falling_learning_rate(run):
    schedule = torch.optim.lr_scheduler.StepLR(run.optimizer, 2, 0.5)
    run.between = lambda number: number and schedule.step()


def average_kept(run):
    """A moving average of the weights, in a model of its own."""
    average = copy.deepcopy(run.module)

    def update(_):
        pairs = zip(average.parameters(), run.module.parameters(), strict=True)
        for kept, now in pairs:
            kept.data.mul_(0.9).add_(now.data, alpha=0.1)

    run.between = update


def noise_changed(run):
    """A schedule for the noise, written by hand."""

    def lower(number):
        run.optimizer.noise_multiplier = 1e-4 * 0.9**number

    run.between = lower


def clip_norm_changed(run):
    def raise_it(number):
        run.optimizer.max_grad_norm = 1e3 * 1.1**number

    run.between = raise_it


def layer_frozen_later(run):
    def freeze(number):
        if number == 3:
            run.module[0].requires_grad_(False)

    run.between = freeze


def layer_thawed_later(run):
    def thaw(number):
        if number == 3:
            run.module[0].requires_grad_(True)

    run.between = thaw


def layer_taken_out(run):
    """The optimizer no longer updates the first layer, whose gradients go on."""
    first = set(run.module[0].parameters())
    for group in run.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in first]


def gradients_doubled(run):
    """Per-example gradients are changed before they are clipped."""
    clip, run.gradient_factor = run.optimizer.pre_step, 2.0

    def changed(*args, **options):
        for parameter in run.module.parameters():
            if parameter.grad_sample is not None:
                parameter.grad_sample = 2 * parameter.grad_sample
        return clip(*args, **options)

    run.optimizer.pre_step = changed


def summed_gradient_kept(run):
    """A hook of the program's own on the optimizer that Opacus wraps."""
    run.seen = []
    run.inner_optimizer.register_step_pre_hook(lambda *_: run.seen.append(1))


def clamped_by_data(run):
    """A projection of the weights, past autograd."""
    run.has_harmless_writes = True

    def clamp(_):
        for parameter in run.module.parameters():
            parameter.data.clamp_(-0.3, 0.3)

    run.between = clamp


def model_copied(run):
    """A snapshot of the wrapped model in the middle of training."""
    run.between = lambda number: setattr(run, "snapshot", copy.deepcopy(run.model))


def weights_reloaded(run):
    """Loads the state dict of two updates ago."""
    states, run.has_harmless_writes = [], True

    def reload(number):
        states.append(copy.deepcopy(run.module.state_dict()))
        if number == 4:
            run.module.load_state_dict(states[2])

    run.between = reload
