"""Data frames of pandas, an optional dependency that is imported when one is made."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["frame"]


def frame(columns: Mapping[str, Any], index: str | None = None) -> "pd.DataFrame":
    """Return a data frame.

    Args:
        columns: The values of each column, ``(k,)`` each, by its name.
        index: The column that is to be the index; None: rows are numbered.

    Raises:
        ImportError: If pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(
            "to_frame() needs pandas, which is not installed. Run: pip install pandas"
        ) from error
    table = pd.DataFrame(dict(columns))
    return table if index is None else table.set_index(index)
