"""What an audit says of an update that could not be made, and what to try then."""

# Modes in which Opacus itself differentiates modules that own parameters
_BY_OPACUS = ("hooks", "functorch", "ghost")


def notes_of(error: Exception) -> str:
    """Return the notes that were added to an error, as one text.

    Args:
        error: The error. Python 3.10 has its notes among the arguments.
    """
    more = [*error.args[1:], ""]
    return " ".join(map(str, getattr(error, "__notes__", more))).strip()


def _beginning(error: Exception) -> str:
    """Return the first line of an error, or the first sentences of those that it lists.

    Opacus's validator raises one error with a list: one for each layer, and most of
    them with the same long text.

    Args:
        error: Of Opacus or torch.
    """
    what = [*error.args, ""][0]
    if isinstance(what, list):
        return "; ".join(dict.fromkeys(str(one).split(". ")[0] for one in what))
    return [*str(what).splitlines(), ""][0]


def failed_update(error: Exception, mode: str) -> str:
    """Say with which error an update failed, and what to do.

    No advice leads to another mode and back: where every mode refuses the model, only a
    change of the model is advised. If the error has notes, they say more than the error
    of torch, and take the place of the general advice.

    Args:
        error: Of Opacus or torch.
        mode: The ``grad_sample_mode``.

    >>> failed_update(RuntimeError("no rule for Net"), "hooks")[-33:]
    'yet, try grad_sample_mode="fast".'
    """
    first = _beginning(error)
    other = "hooks" if mode == "fast" else "fast"
    if notes := notes_of(error):  # a cause that was found, and its remedy
        remedy = notes
    elif isinstance(error, TypeError) and mode in _BY_OPACUS:
        remedy = (
            "Opacus runs a module that has parameters of its own once more, with its "
            "first input only. Move these parameters into a layer of their own with "
            f'one input, or, if you have not yet, try grad_sample_mode="{other}".'
        )
    elif "layer with buffers" in first:
        remedy = (
            "Opacus refuses, in every mode, a module that has both buffers and "
            "trainable parameters of its own. Move the parameters into a layer without "
            "buffers."
        )
    else:
        remedy = (
            "Change the model as the error says, or, if you have not yet, try "
            f'grad_sample_mode="{other}".'
        )
    return (
        f"An update with these examples failed ({type(error).__name__}: {first}). "
        f"Training would fail, too. {remedy}"
    )
