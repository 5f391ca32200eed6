"""SQL-like filters over catalogue columns, with the number of samples that each clause drops."""

import re
from functools import cache

import duckdb
import numpy as np
import pyarrow as pa

_TOKEN = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"[^\"]*\"|[()\[\]{}]|\w+|\s+|.", re.DOTALL)
_QUERIES = {"select", "over", "table", "describe", "show", "summarize", "pivot", "unpivot"}
_CLOSES = {")": "(", "]": "[", "}": "{"}
# Nothing but columns: no files, no network, no variables of this program.
_SAFE: dict[str, str | bool | int | float | list[str]] = {
    "threads": 1,
    "enable_external_access": False,
    "python_enable_replacements": False,
    "lock_configuration": True,
}


def split_clauses(where: str) -> list[str]:
    """The parts of an expression that AND joins at its top level ("a BETWEEN 1 AND 2" is one)."""
    clauses, current, depth, between = [], "", 0, False
    for token in _TOKEN.findall(where):
        word = token.upper()
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif depth == 0 and word == "BETWEEN":
            between = True
        elif depth == 0 and word == "AND":
            if not between:
                clauses.append(current)
                current = ""
                continue
            between = False
        current += token
    clauses.append(current)
    if len(clauses) > 1 and any(_has_top_level_or(clause) for clause in clauses):
        # AND binds tighter than OR: only the whole expression keeps its meaning.
        clauses = [where]
    return [clause.strip() for clause in clauses]


def _has_top_level_or(clause: str) -> bool:
    depth = 0
    for token in _TOKEN.findall(clause):
        depth += (token in "([{") - (token in ")]}")
        if depth == 0 and token.upper() in ("OR", "CASE"):
            return True
    return False


def apply_filter(
    table: pa.Table, where: str, name: str, *, allow_empty: bool = False
) -> tuple[pa.Table, dict[str, int]]:
    """Rows for which `where` holds (NULL counts as false), and the rows dropped by each clause.

    Clauses apply in order, so the drops add up, over the parts of a table too: with `allow_empty`
    nothing may be left of one part. `name` appears in errors.

    Raises:
        ValueError: the expression is not valid over the catalogue's columns, or leaves nothing.
    """
    dropped: dict[str, int] = {}
    connection = duckdb.connect(":memory:", config=_SAFE)
    try:
        _check_expression(where)
        for clause in split_clauses(where):
            connection.register("catalogue", table)
            query = f"SELECT coalesce(CAST(({clause}\n) AS BOOLEAN), false) AS keep FROM catalogue"
            keep = connection.execute(query).fetchnumpy()["keep"]
            connection.unregister("catalogue")
            if len(keep) != table.num_rows:
                raise duckdb.Error(f"{clause!r} does not look at one row at a time")
            kept = table.filter(pa.array(np.asarray(keep, dtype=bool)))
            dropped[clause] = dropped.get(clause, 0) + table.num_rows - kept.num_rows
            table = kept
    except duckdb.Error as error:
        columns = ", ".join(table.column_names)
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: where={where!r}: {reason}; columns: {columns}") from error
    finally:
        connection.close()
    if table.num_rows == 0 and not allow_empty:
        drops = ", ".join(f"{clause!r} drops {count}" for clause, count in dropped.items())
        raise ValueError(f"{name}: where={where!r} leaves no sample: {drops}")
    return table, dropped


def _check_expression(where: str) -> None:
    """One expression over the columns of one row, with one value for ever.

    Raises:
        duckdb.Error: it is not; a clause in brackets could else end the query and begin another.
    """
    opened: list[str] = []
    before = word = ""
    for token in _TOKEN.findall(where):
        before, word = (word, token.lower()) if not token.isspace() else (before, word)
        if token in _CLOSES.values():
            opened.append(token)
        elif token in _CLOSES and (not opened or opened.pop() != _CLOSES[token]):
            raise duckdb.Error(f"{token!r} closes nothing")
        elif token == ";":
            raise duckdb.Error("';' is no part of an expression")
        elif word in _QUERIES or (word == "from" and before != "distinct"):
            raise duckdb.Error(f"{token} looks at other rows: a filter looks at one at a time")
        elif word in _changing_functions():
            raise duckdb.Error(f"{token} gives another value every time; hash(key) does not")
    if opened:
        raise duckdb.Error(f"{opened[-1]!r} is not closed")


@cache
def _changing_functions() -> frozenset[str]:
    """Functions such as random and now: every rank and every resume must filter alike."""
    with duckdb.connect(":memory:", config=_SAFE) as connection:
        rows = connection.execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
        ).fetchall()
    return frozenset(name for (name,) in rows) | {"current_timestamp", "localtimestamp"}
