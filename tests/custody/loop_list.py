"""The loops that are tested, each with the modes that it is run in."""

from tests.custody import hidden_ids, loop_parts, models, oddities
from tests.custody.loops import Loop

PER_EXAMPLE = ("hooks", "functorch", "ew")
ALL = (*PER_EXAMPLE, "ghost", "fast")
FREE = ("hooks", "functorch", "fast")  # the loop's own loss
MOST = ("hooks", "ghost", "fast")
FIXED = {"sampling": "fixed"}
TOKENS = {"data": hidden_ids.Tokens, "model": models.TokenModel}
TWO = {"model": models.TwoInputs, "forward": loop_parts.two_inputs}


def collated(collate_fn, **options):
    return Loop(collate_fn.__name__, loader={"collate_fn": collate_fn}, **options)


def transforming(transform, **options):
    return Loop(transform.__name__, transform=transform, **options)


def using(updates, **options):
    return Loop(updates.__name__, updates=updates, **options)


def of_model(model, **options):
    return Loop(model.__name__, model=model, **options)


def of_loss(criterion, **options):
    return Loop(criterion.__name__, criterion=criterion, **options)


def odd(setup, **options):
    return Loop(setup.__name__, setup=setup, **options)


# ------------------------------------- ordinary loops: recorded in full, without a word
CONTROLS = [
    (Loop("plain"), (*ALL, "swept")),
    (Loop("shuffled", **FIXED), (*ALL, "swept")),
    (Loop("in_order", loader={"shuffle": False}, **FIXED), MOST),
    (Loop("last_dropped", loader={"batch_size": 5, "drop_last": True}, **FIXED), MOST),
    (Loop("two_workers", loader={"num_workers": 2}), ("hooks",)),
    (Loop("dicts", data=hidden_ids.dict_data, **FIXED), MOST),
    (Loop("soft_labels", data=hidden_ids.soft_label_data), ALL),
    (of_model(models.convolutional, data=hidden_ids.image_data), ALL),
    (of_model(models.normalised), ALL),
    (of_model(models.with_dropout), MOST),
    (of_model(models.linear_without_bias), ALL),
    (of_model(models.Recurrent, data=hidden_ids.sequence_data), ("hooks", "functorch")),
    (of_model(models.Attentive, data=hidden_ids.sequence_data), ("hooks", "functorch")),
    (Loop("two_inputs", data=hidden_ids.tripled_data, **TWO), MOST),
    (
        Loop(
            "keyword",
            data=hidden_ids.tripled_data,
            model=models.TwoInputs,
            forward=loop_parts.input_and_keyword,
        ),
        MOST,
    ),
    (
        Loop(
            "by_name", model=models.TwoInputs, forward=loop_parts.keyword_only, **FIXED
        ),
        MOST,
    ),
    (of_loss(models.Focal), ALL),
    (of_loss(models.smoothed_cross_entropy), ALL),
    (of_loss(models.summed_cross_entropy, private={"loss_reduction": "sum"}), ALL),
    (collated(loop_parts.stacked), MOST),
    (collated(loop_parts.padded, **TOKENS), MOST),
    (collated(loop_parts.padded_to_multiple, **TOKENS), MOST),
    (transforming(loop_parts.cloned), MOST),
    (transforming(loop_parts.through_numpy), MOST),
    (transforming(loop_parts.to_double_and_back), MOST),
    (transforming(loop_parts.viewed), MOST),
    (transforming(loop_parts.labels_copied), MOST),
    (transforming(loop_parts.labels_widened), MOST),
    (transforming(loop_parts.labels_as_column, targets=loop_parts.squeezed), MOST),
    (transforming(loop_parts.labels_as_probabilities), MOST),
    (transforming(loop_parts.labels_smoothed), MOST),
    (transforming(loop_parts.permuted), MOST),
    (transforming(loop_parts.sorted_rows), MOST),
    (transforming(loop_parts.every_other), MOST),
    (transforming(loop_parts.first_rows), MOST),
    (using(loop_parts.in_chunks, **FIXED), ("hooks", "functorch", "fast")),
    (using(loop_parts.accumulated, **FIXED), ("hooks", "functorch", "fast")),
    (using(loop_parts.memory_managed), MOST),
    (using(loop_parts.cleared_afterwards), ("hooks", "functorch", "fast")),
    (using(loop_parts.evaluated_between), MOST),
    (using(loop_parts.training_loss_looked_at), MOST),
    (using(loop_parts.two_batches_ahead), MOST),
    (using(loop_parts.all_listed), MOST),
    (using(loop_parts.listed_backwards), MOST),
    (Loop("adam", optimizer=oddities.adam), MOST),
    (Loop("momentum", optimizer=oddities.with_momentum), MOST),
    (odd(oddities.falling_learning_rate), MOST),
    (of_model(models.with_frozen_layer), MOST),
    (odd(oddities.average_kept), MOST),
    (odd(oddities.summed_gradient_kept), MOST),
    (odd(oddities.model_copied), MOST),
    (odd(oddities.noise_changed), MOST),
    (odd(oddities.clip_norm_changed), ("hooks", "fast")),
    (collated(loop_parts.reversed_rows), MOST),
    (collated(loop_parts.sorted_by_size), MOST),
    (collated(loop_parts.padded_sorted, **TOKENS), MOST),
]

# -------------------- right norms exist, but the program may not be sure: it may say so
UNCERTAIN = [
    (using(loop_parts.some_discarded), ("hooks", "fast")),
    (collated(loop_parts.truncated, **TOKENS), MOST),
    (collated(loop_parts.without_some), MOST),
    (collated(loop_parts.noisy), MOST),
    (collated(loop_parts.cropped), MOST),
    (transforming(loop_parts.doubled), MOST),
    (transforming(loop_parts.noised), MOST),
    (transforming(loop_parts.features_flipped), MOST),
    (transforming(loop_parts.permuted_and_doubled), MOST),
    (transforming(loop_parts.permuted_and_noised), MOST),
    (transforming(loop_parts.attacked), ("hooks", "functorch")),
    (transforming(loop_parts.doubled_in_place), MOST),
    (transforming(loop_parts.noised_in_place), MOST),
    (transforming(loop_parts.permuted_in_place), MOST),
    (transforming(loop_parts.permuted_by_assignment), MOST),
    (transforming(loop_parts.new_memory_by_data), MOST),
    (transforming(loop_parts.noise_as_second_input, **TWO), MOST),
    (transforming(loop_parts.half_as_second_input, **TWO), MOST),
    (Loop("two_views", forward=loop_parts.two_views), ("hooks", "functorch")),
    (using(loop_parts.own_loader), MOST),
    (using(loop_parts.whole_data_set), MOST),
    (using(loop_parts.own_indices), MOST),
    (using(loop_parts.loader_and_public_data), MOST),
    (odd(oddities.clamped_by_data), MOST),
    (odd(oddities.weights_reloaded), MOST),
    (
        of_model(
            models.BagModel,
            data=hidden_ids.Tokens,
            forward=loop_parts.bag_of_tokens,
            loader={"collate_fn": loop_parts.truncated},
        ),
        ("hooks",),
    ),
    (collated(loop_parts.shuffled_rows), MOST),
    (transforming(loop_parts.permuted_by_data), MOST),
    (transforming(loop_parts.permuted_by_numpy), MOST),
    (transforming(loop_parts.permuted_and_doubled_in_place), MOST),
    (transforming(loop_parts.two_swapped_by_numpy), MOST),
    (
        odd(oddities.layer_thawed_later, model=models.with_frozen_layer, **FIXED),
        ("ghost", "fast"),
    ),
    (odd(oddities.layer_frozen_later, **FIXED), MOST),
    (odd(oddities.layer_taken_out), ("ghost", "fast")),
    (odd(oddities.gradients_doubled), ("hooks", "functorch")),
]

# ----------------------------- no norm is right for every example: must be refused/said
BROKEN = [
    (collated(loop_parts.each_twice, breaks="identity"), MOST),
    (collated(loop_parts.each_twice_in_blocks, breaks="identity"), MOST),
    (transforming(loop_parts.row_overwritten, breaks="identity"), MOST),
    (transforming(loop_parts.mixed, breaks="identity"), MOST),
    (transforming(loop_parts.centred_by_batch, breaks="identity"), MOST),
    (transforming(loop_parts.first_row_twice, breaks="rows"), MOST),
    (transforming(loop_parts.first_row_only, breaks="rows"), MOST),
    (transforming(loop_parts.batch_twice, breaks="rows"), MOST),
    (transforming(loop_parts.drawn_with_replacement, breaks="rows"), MOST),
    (transforming(loop_parts.differences, breaks="identity"), MOST),
    (transforming(loop_parts.with_earlier_batch, breaks="identity"), MOST),
    (using(loop_parts.same_batch_twice_in_an_update, breaks="rows", **FIXED), FREE),
    (using(loop_parts.overlapping_parts, breaks="rows", **FIXED), FREE),
    (transforming(loop_parts.labels_permuted, breaks="loss"), ("hooks", "fast")),
    (transforming(loop_parts.labels_permuted, breaks="rows"), ("ghost",)),
    (transforming(loop_parts.labels_permuted_in_place, breaks="rows"), ("ghost",)),
    (transforming(loop_parts.inputs_permuted, breaks="rows"), ("ghost",)),
    (transforming(loop_parts.mean_as_second_input, breaks="rows", **TWO), MOST),
    (
        transforming(loop_parts.mean_as_second_input, breaks="rows", **TWO, **FIXED),
        MOST,
    ),
    (
        transforming(loop_parts.labels_permuted_in_place, breaks="loss"),
        ("hooks", "fast"),
    ),
    (transforming(loop_parts.inputs_permuted, breaks="loss"), ("hooks", "fast")),
    *(
        (of_loss(criterion, breaks="loss"), FREE)
        for criterion in (
            models.Contrastive,
            models.HardestHalf,
            models.WorstGroup,
            models.LossOfMean,
            models.Decorrelated,
            models.summed_cross_entropy,
        )
    ),
    (of_loss(models.weighted_cross_entropy, breaks="loss"), ("hooks", "fast", "swept")),
    (of_loss(models.ignoring_cross_entropy, breaks="loss"), ("hooks", "fast", "swept")),
    (collated(loop_parts.refilled, breaks="identity"), MOST),
    (collated(loop_parts.mixed_up, breaks="identity"), MOST),
    (collated(loop_parts.centred, breaks="identity"), MOST),
    (collated(loop_parts.inputs_sorted_only, breaks="identity"), MOST),
    (collated(loop_parts.with_negatives, breaks="identity", **TWO), MOST),
    (transforming(loop_parts.row_overwritten_by_numpy, breaks="identity"), MOST),
    (transforming(loop_parts.mixed_in_place, breaks="identity"), MOST),
    (transforming(loop_parts.mixed_by_numpy, breaks="identity"), MOST),
    (transforming(loop_parts.mixed_by_data, breaks="identity"), MOST),
    (transforming(loop_parts.cut_and_mixed_in_place, breaks="identity"), MOST),
    (transforming(loop_parts.centred_by_batch_in_place, breaks="identity"), MOST),
    (
        transforming(loop_parts.other_order_as_second_input, breaks="rows", **TWO),
        MOST,
    ),
    (
        transforming(loop_parts.earlier_batch_as_second_input, breaks="rows", **TWO),
        MOST,
    ),
    (
        transforming(
            loop_parts.second_input_permuted,
            breaks="rows",
            data=hidden_ids.tripled_data,
            **TWO,
        ),
        MOST,
    ),
    *(
        (of_model(model, breaks="model"), MOST)
        for model in (
            models.Centred,
            models.FunctionalBatchNorm,
            models.SoftmaxOverBatch,
            models.AttendsOverBatch,
            models.Rolled,
            models.ScaledByBatch,
        )
    ),
    *(
        (
            of_model(model, breaks="model", data=hidden_ids.sequence_data, **FIXED),
            ("hooks", "functorch"),
        )
        for model in (models.time_first_lstm, models.time_first_attention)
    ),
    (using(loop_parts.weights_stepped_by_data, breaks="weights"), MOST),
    (using(loop_parts.sharpness_aware, breaks="weights"), MOST),
    *(
        (of_loss(criterion, breaks="loss"), ("ghost",))
        for criterion in (
            models.Contrastive,
            models.HardestHalf,
            models.WorstGroup,
            models.LossOfMean,
            models.Decorrelated,
        )
    ),
]


def with_modes(loops, **changes):
    """Return one loop for each mode."""
    return [
        loop.having(mode=mode, **changes) for loop, modes in loops for mode in modes
    ]
