"""The causes for which the example of a sample is uncertain or unknown, in words.

A cause belongs to a link of the chain of custody: *identity* (position i of the batch
is the example that it is taken for) or *rows* (every input has each example once, in
one order). Its state says what follows for the samples concerned:

* *unattributed*: their example is not known, so their norms are left out;
* *unchecked*: they are assumed to be the examples of the delivered batch in its order,
  without confirmation;
* *largest*: they are several known examples in an order that is not known, and each
  example is charged the largest of their norms;
* *repeated*: their example is known, and is in the batch a second time;
* *beside*: their example is known, and the model was given something beside it, or a
  part of it that others may decide.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ADDED_IN_COLLATE",
    "ALIKE",
    "ALIKE_IN_COLLATE",
    "ANOTHER_INPUT",
    "ANOTHER_PASS",
    "BESIDE_BATCHES",
    "BY_HAND",
    "CAUSES",
    "CHANGED_IN_COLLATE",
    "CHANGED_IN_PLACE",
    "COLLATE",
    "COMPUTED",
    "CONTENTS_OF_OTHERS",
    "COUPLED",
    "CUT_INPUT",
    "EQUAL_COPIES",
    "EQUAL_INPUTS",
    "EQUAL_NUMBERS",
    "INPUTS_DISAGREE",
    "LABELS_CHANGED",
    "LABELS_KEPT",
    "MISMATCH",
    "MIXED",
    "MIXED_IN_COLLATE",
    "MOVED_AND_CHANGED",
    "MOVED_IN_DATA_SET",
    "NOTHING_KEPT",
    "NOT_DELIVERED",
    "NO_DELIVERY",
    "NO_INDICES",
    "NUMBER_IN_COLLATE",
    "OTHER_BATCHES",
    "OTHER_SIZE",
    "OWN_BATCHES",
    "PARTS_IN_COLLATE",
    "PASSES_DISAGREE",
    "REPEATED",
    "ROWS_IN_MODEL",
    "ROWS_OF_OTHERS",
    "SEVERAL_BATCHES",
    "SHARED_INPUT",
    "TAKEN_OVER",
    "TRUSTED",
    "TWO_TENSORS",
    "UNSEEN",
    "UNTRACED",
    "VALUES_MOVED",
    "Cause",
]


@dataclass(frozen=True)
class Cause:
    """One reason why samples are uncertain.

    Args:
        name: What was found, as a phrase.
        state: ``"unattributed"``, ``"unchecked"``, ``"largest"``, ``"repeated"`` or
            ``"beside"``: what follows for the samples (see above in this module).
        explanation: What was found and what to do about it, in sentences.
        link: The link of the chain of custody that is concerned.
        is_said: Whether a warning is given when the cause is found for the first time.
            If not, another message reports it.
    """

    name: str
    state: Literal["unattributed", "unchecked", "largest", "repeated", "beside"]
    explanation: str
    link: Literal["identity", "rows"] = "identity"
    is_said: bool = True


_IN_THE_DATA_SET = "Transform inputs in the data set instead."
#: What follows if an input that the loop computed holds data of several examples.
COUPLED = (
    "If an input was computed from several examples, such as by the mean of the batch, "
    "one example changes the gradients of others, and max_grad_norm does not bound its "
    "influence."
)

# -------------------------------------------------------------- between batch and model
COMPUTED = Cause(
    "the training loop computed the model's inputs",
    "unchecked",
    "The model's inputs are neither the tensors that the data loader delivered nor "
    "copies of them, so samples are assumed to be in the order of the latest batch. If "
    "your loop reorders or mixes samples after loading, or takes them from elsewhere, "
    "such as another loader or batches that it kept, norms are recorded for the wrong "
    f"examples. {COUPLED} Transform inputs in the data set or in collate_fn instead.",
)
CHANGED_IN_PLACE = Cause(
    "the delivered batch was changed in place",
    "unchecked",
    "The loop wrote to the delivered batch before the model saw it, so samples are "
    "assumed to have kept their positions. If the loop also reorders or mixes samples, "
    f"this is wrong. {COUPLED} {_IN_THE_DATA_SET}",
)
MOVED_AND_CHANGED = Cause(
    "some samples were moved and others were changed",
    "unattributed",
    "The loop moved some samples to other positions and changed others, so the changed "
    "ones cannot be matched. " + _IN_THE_DATA_SET,
)
VALUES_MOVED = Cause(
    "the training loop moved values of the batch to other positions",
    "unattributed",
    "An example is one number in each tensor, and the model was given the numbers of "
    "the delivered batch in other positions. So it is not known which sample belongs "
    "to which example. Keep the order in which the data loader delivers, or reorder in "
    "collate_fn.",
)
EQUAL_NUMBERS = Cause(
    "the model's inputs are numbers that several examples share",
    "unchecked",
    "The model was given copies of the delivered numbers, one for each sample, and "
    "several examples of a batch have equal ones. So samples are assumed to be in the "
    "order of the batch. If your loop exchanges examples with equal numbers, this is "
    "wrong. Give the model the tensors that the data loader delivered.",
)
MIXED = Cause(
    "the training loop mixes examples",
    "unattributed",
    "The loop made each input of the model from several examples, as mixup and cutmix "
    "do, so its gradient belongs to no single example. Give the model samples of one "
    "example each.",
)
UNTRACED = Cause(
    "the model's inputs cannot be traced to one batch",
    "unattributed",
    "The model's inputs are neither the tensors that the data loader delivered nor "
    "copies of them, and may come from several batches: some that were delivered "
    "before had not been recognised in the model. Give the model each batch before "
    "the next one is delivered, or transform inputs in the data set or in collate_fn.",
)
OTHER_SIZE = Cause(
    "the model's inputs have another number of samples than the batch",
    "unattributed",
    "The model's inputs are not what the data loader delivered, and have more or fewer "
    "samples than the latest batch, so it is not known which examples they are. If the "
    "loop computed them, transform inputs in the data set, and give the model one "
    "sample for each example. If another loader delivered them, use the one that "
    "make_private returned.",
)
OTHER_BATCHES = Cause(
    "the model's inputs are examples of other batches",
    "unattributed",
    "The model was given examples of the data set that are not in the latest batch, as "
    "another loader over the same data delivers them, or a loop that trains on batches "
    "it kept from earlier. The accounting does not know when such examples were drawn. "
    "Train on the batches of the loader that make_private returned, each when it is "
    "delivered.",
)
BESIDE_BATCHES = Cause(
    "the training loop gives the model other inputs beside the batches",
    "unattributed",
    "The model's inputs are neither the tensors that the data loader delivered nor "
    "copies of them, and the loop also gave the model delivered batches beside such "
    "inputs. So it is not known what they were computed from. If they were computed "
    "from the batch, compute them in the data set or in collate_fn instead.",
)
NOT_DELIVERED = Cause(
    "the data loader did not deliver these inputs",
    "unattributed",
    "The model was given samples that the data loader did not deliver, for example "
    "generated samples, so they cannot be matched to examples. If they were computed "
    "from examples of the data set, compute them in the data set instead.",
)
TWO_TENSORS = Cause(
    "two tensors of a batch entered the model in one input",
    "unattributed",
    "An input of the model had samples of two tensors of the delivered batch, such as "
    "two views of each item that were concatenated. So an example had several samples "
    "in the update, and max_grad_norm does not bound what it contributes. Let one "
    "sample hold both tensors, and combine them within the model, or call the model "
    "once for each of them.",
    link="rows",
)
SEVERAL_BATCHES = Cause(
    "samples of several batches entered the model together",
    "unattributed",
    "One forward pass was given samples that are equal to those of several delivered "
    "batches, so they cannot be matched to one batch. Call the model once for each "
    "batch, with batches of the loader that make_private returned.",
)
ALIKE = Cause(
    "examples look alike",
    "unattributed",
    "Some examples of a batch are equal in all entries that are compared, so copies of "
    "them cannot be distinguished. Give the model the tensors that the data loader "
    "delivered.",
)
EQUAL_INPUTS = Cause(
    "examples have equal inputs and different targets",
    "largest",
    "Some examples of a batch have equal inputs and different targets, and the loop "
    "gave the model copies of them. So it is not known which of their norms belongs to "
    "which example: each is charged the largest of them, and a RenyiFilter leaves them "
    "out of the update. Give the model the tensors that the data loader delivered, or "
    "remove such examples from the data set.",
)
EQUAL_COPIES = Cause(
    "equal examples have different gradients",
    "largest",
    "Some examples of a batch are equal in inputs and targets, their gradients differ, "
    "as with dropout, and the loop or collate_fn changed the order of the batch. So it "
    "is not known which of their norms belongs to which example: each is charged the "
    "largest of them, and a RenyiFilter leaves them out of the update. Keep the order "
    "in which the data loader delivers, or remove such examples from the data set.",
)
TRUSTED = Cause(
    "examples with equal inputs were assumed to be in their places",
    "unchecked",
    "Some examples of a batch have equal inputs, and the loop gave the model copies of "
    "them. They were assumed to be in the delivered order, like all other samples "
    "until then, but later the loop moved samples. Give the model the tensors that the "
    "data loader delivered.",
)
# ------------------------------------------------------------- between model and update
UNSEEN = Cause(
    "no forward pass was seen",
    "unattributed",
    "No forward pass of the model in training mode was seen for these gradients. Call "
    "the model itself, not its layers. If another engine prepared the same model "
    "afterwards, only that engine sees its forward passes: use one engine.",
)
PASSES_DISAGREE = Cause(
    "forward passes of one loss have different examples in the same position",
    "unattributed",
    "Several forward passes that entered one loss had different examples in the same "
    "position. Opacus adds up their gradients position by position, so one gradient "
    "depends on several examples and max_grad_norm bounds none of them. Give all "
    "passes the same examples in the same order, or form pairs of examples in the data "
    "set. Use one batch per loss.",
    link="rows",
)
TAKEN_OVER = Cause(
    "a later run has taken the model over",
    "unattributed",
    "The model was prepared again by a later make_private, and its forward passes are "
    "reported to that run since, so the samples of this one are not known. Train a "
    "model with one engine: neither the ledger nor get_epsilon of the first covers the "
    "updates of the second.",
)
MISMATCH = Cause(
    "gradients and forward passes have different numbers of samples",
    "unattributed",
    "The number of samples of the gradients differs from that of the forward passes. "
    "This happens, for example, if several batches enter one loss, or if the model "
    "gives a layer only some of the examples. Use one batch per loss, and give each "
    "layer one row for each example.",
)
ROWS_IN_MODEL = Cause(
    "layers have more rows than the batch has examples",
    "unattributed",
    "A layer was given more rows than the batch has samples, and only one forward pass "
    "of the model entered the loss. This happens if the model makes several rows of "
    "each example, such as the frames of a video or a mirrored copy. Opacus clips each "
    "row by itself, so max_grad_norm does not bound what an example contributes. Put "
    "the rows of an example along another dimension than the first. Or use "
    'grad_sample_mode="fast", which computes such gradients by running the model again '
    "for each example; this is slow.",
    link="rows",
)
BY_HAND = Cause(
    "the training loop computed the per-example gradients",
    "unchecked",
    "The per-example gradients were set by the training loop, without a backward pass "
    "of the model, so they are assumed to be those of the latest batch, in its order. "
    'Use grad_sample_mode="hooks" to have them computed and matched.',
)
ANOTHER_PASS = Cause(
    "another forward pass entered the same loss",
    "unchecked",
    "The loss also used a forward pass over inputs that the data loader did not "
    "deliver, such as generated ones. It is assumed that they were not computed from "
    "the examples of the batch, and are no examples of the training set. If they were "
    "computed from the batch, compute them in the data set instead.",
    link="rows",
    is_said=False,  # a GAN's discriminator is trained like this, rightly
)
MOVED_IN_DATA_SET = Cause(
    "the data set moves examples",
    "unattributed",
    "The data set returned for an index what it had returned for another index before, "
    "so an index may not stand for one example. A data set that permutes itself "
    "between epochs, chooses at random what it returns, or has another order after a "
    "run was resumed does this, and so may random changes of items that have few "
    "possible contents. Keep its order fixed, and let the data loader shuffle or "
    "sample.",
)
LABELS_CHANGED = Cause(
    "the data set returns other labels",
    "unattributed",
    "The data set returned for an index other content and another label than before, "
    "so an index may not stand for one example. A data set that augments its examples "
    "and permutes them between epochs, or has another order after a run was resumed, "
    "does this, and so does one that draws labels at random. Keep its order fixed, and "
    "let the data loader shuffle or sample.",
)
CONTENTS_OF_OTHERS = Cause(
    "the data set returns contents of other indices",
    "unchecked",
    "The data set returned other content for an index than before, and mostly content "
    "that other indices had. Many of its items are equal, so this may be chance, as it "
    "is for random flips of small items. If it chooses at random what it returns, or "
    "permutes its examples, norms are recorded for the wrong examples. If each index "
    "stands for one example, nothing needs to be done.",
)
OWN_BATCHES = Cause(
    "the data set loads a batch at once",
    "unchecked",
    "The data set has its own __getitems__, which loads a batch at once, and has not "
    "returned the same content for an index a second time. So it was not seen whether "
    "its items are in the order of the indices that it was given. If it sorts them, "
    "return the items in the given order.",
)
LABELS_KEPT = Cause(
    "the data set changes its items",
    "unchecked",
    "The data set returned other content for an index than before, as random "
    "augmentation does, so the contents do not show whether an index always stands for "
    "one example. The labels of the indices stayed the same. A data set that exchanges "
    "examples of equal labels would not be noticed. If yours keeps its order, nothing "
    "needs to be done.",
    is_said=False,  # nearly every data set that augments keeps its order
)
NOTHING_KEPT = Cause(
    "the data set changes all of its items",
    "unchecked",
    "The data set returned other content for an index than before, as random "
    "augmentation does, and no label in its items that stays the same shows whether an "
    "index always stands for one example. If your data set permutes its examples "
    "between epochs, or chooses at random what it returns, norms are recorded for the "
    "wrong examples. If it keeps its order, nothing needs to be done.",
)
# ------------------------------------------------------------------ the rows of a batch
NO_DELIVERY = Cause(
    "no batch was delivered",
    "unattributed",
    "No batch of the data loader that make_private returned was seen before this "
    "forward pass, so its samples cannot be matched to examples. Iterate over that "
    "loader itself, and begin after make_private. Batches are not seen if their "
    "iterator was begun before make_private, or if they come from another loader: one "
    "that was passed to make_private and replaced by the returned one, or one that "
    "another library made: leave the loader out of accelerator.prepare(...).",
)
NO_INDICES = Cause(
    "the batches have no indices",
    "unattributed",
    "The data loader's batches have no indices in the data set (an iterable data set, "
    "or keys that are not whole numbers of at least 0). Use a map-style data set, and "
    "a sampler of positions from 0.",
)
INPUTS_DISAGREE = Cause(
    "the model's inputs have different examples in the same position",
    "unattributed",
    "Two inputs of one forward pass have different examples in the same position, so "
    "one gradient depends on two examples and max_grad_norm bounds neither. Give "
    "every input the same examples in the same order, or form pairs of examples in "
    "the data set.",
    link="rows",
)
ANOTHER_INPUT = Cause(
    "another input of the model could not be checked",
    "unchecked",
    "The loop computed one of the model's inputs, so it is assumed to have the same "
    "examples in the same order as the other inputs. Compute this input in the data "
    "set, or within the model.",
    link="rows",
)
SHARED_INPUT = Cause(
    "an input that all examples share changed",
    "beside",
    "The loop gave the model, beside the examples, a number or a tensor that does not "
    "have one row for each example, and its values changed from one forward pass to "
    "another. If the loop computed them from examples, such as a mean of the batch, or "
    "kept them from an earlier batch, such as a hidden state, the gradient of an "
    "example depends on others, and max_grad_norm does not bound what they contribute. "
    "Then compute them from each example alone, in the data set or within the model, "
    "and begin each batch with a new hidden state. If they do not depend on the data, "
    "as a schedule or random numbers do not, nothing needs to be done.",
    link="rows",
)
CUT_INPUT = Cause(
    "the size of an input changed",
    "beside",
    "A size of one of the model's inputs, such as its number of time steps, rose and "
    "fell from one forward pass to another, although the data loader delivered batches "
    "of the same sizes. If the loop cuts or pads each batch to a "
    "length that it computes from the examples, such as that of the longest, the "
    "gradient of an example may depend on others, and max_grad_norm does not bound "
    "what they contribute. Then give all batches the same length, or cut and pad in "
    "collate_fn and call engine.audit(criterion), which compares the gradients of an "
    "example in batches of different lengths. If only padding is cut away or added, "
    "and the model ignores padding, for example by a mask, or if the sizes do not "
    "depend on the data, nothing needs to be done.",
    link="rows",
)
ROWS_OF_OTHERS = Cause(
    "an input has entries of other examples of the batch",
    "beside",
    "The loop computed an input of the model, and batch after batch this input had "
    "more entries of other examples than chance explains: copies of them, or mixtures. "
    "So the gradient of an example depends on other examples of its batch, and "
    "max_grad_norm does not bound what they contribute. This happens if a second "
    "forward pass gets negatives that are drawn from the batch, or a mixup of it. Draw "
    "negatives from all items, independently of the batch, or form pairs of examples "
    "in the data set. If each entry is computed from its own example, and neighbours "
    "in the order of the data belong together, nothing needs to be done.",
    link="rows",
)
REPEATED = Cause(
    "an example is in a batch more than once",
    "repeated",
    "An example occurs more than once in the samples of one forward pass, so "
    "max_grad_norm does not bound what it contributes. Use each delivered sample once.",
    link="rows",
    is_said=False,  # the update that it enters is refused, and says so
)
# --------------------------------------------------------------------------- collate_fn
COLLATE = Cause(
    "collate_fn could not be checked",
    "unchecked",
    "What collate_fn returns cannot be compared with the items of the data set (text, "
    "images, or items that it transforms), so samples are assumed to be in the order "
    "in which their items were loaded. If collate_fn sorts, drops or mixes items, this "
    "is wrong. Do such transforms in the data set; samples can then be matched.",
)
MIXED_IN_COLLATE = Cause(
    "collate_fn mixes examples",
    "unattributed",
    "collate_fn returned samples that are made of several items of the data set, as "
    "mixup and cutmix do, so they belong to no single example. Use a collate_fn that "
    "does not combine items.",
)
CHANGED_IN_COLLATE = Cause(
    "collate_fn moves items and changes items",
    "unattributed",
    "collate_fn returned items in other positions, and changed some of them or all, so "
    "the changed ones cannot be matched. " + _IN_THE_DATA_SET,
)
ALIKE_IN_COLLATE = Cause(
    "collate_fn moves items that look alike",
    "unattributed",
    "collate_fn returned items in other positions, and some of them are equal in all "
    "that can be compared, so it is not known which of them is which. Keep the order "
    "of the items, or have the sampler choose another order.",
)
PARTS_IN_COLLATE = Cause(
    "collate_fn makes several samples of one item",
    "unattributed",
    "collate_fn made a sample of each row of an item, so max_grad_norm bounds what a "
    "row contributes, but not what an item with several rows does. Make each row an "
    "item of the data set, or return one sample for each item.",
    link="rows",
)
NUMBER_IN_COLLATE = Cause(
    "collate_fn returns another number of samples than items",
    "unattributed",
    "collate_fn returned more or fewer samples than it was given items, and none of "
    "them is equal to an item, so they cannot be matched. If an item is in several "
    "samples, max_grad_norm does not bound what it contributes. Return one sample for "
    "each item.",
)
ADDED_IN_COLLATE = Cause(
    "collate_fn adds to items",
    "unchecked",
    "collate_fn returned more than the items of the data set: padding, masks, or "
    "values that it computed. It was not checked whether what it adds to one example "
    "depends on the other examples of its batch and changes its gradient, as padding "
    "to the longest example does if the model averages over it. Call "
    "engine.audit(criterion), which collates examples with others and compares their "
    "gradients.",
    link="rows",
    is_said=False,  # nearly every padded batch is harmless
)

CAUSES: dict[str, Cause] = {
    value.name: value for value in list(vars().values()) if isinstance(value, Cause)
}
