"""SQL-like filters over catalogue columns, with the number of samples that each clause drops."""

import re

import duckdb
import numpy as np
import pyarrow as pa

_TOKEN = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|[()\[\]{}]|\w+|\s+|.", re.DOTALL)


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


def apply_filter(table: pa.Table, where: str, name: str) -> tuple[pa.Table, dict[str, int]]:
    """Rows for which `where` holds (NULL counts as false), and the rows dropped by each clause.

    Clauses apply in order, so the drops add up. `name` appears in errors.

    Raises:
        ValueError: the expression is not valid over the catalogue's columns, or leaves nothing.
    """
    dropped: dict[str, int] = {}
    connection = duckdb.connect(":memory:", config={"threads": 1})
    try:
        # An expression from a config file must not read files or the network.
        connection.execute("SET enable_external_access = false")
        for clause in split_clauses(where):
            connection.register("catalogue", table)
            query = f"SELECT coalesce(CAST(({clause}\n) AS BOOLEAN), false) AS keep FROM catalogue"
            keep = connection.execute(query).fetchnumpy()["keep"]
            connection.unregister("catalogue")
            kept = table.filter(pa.array(np.asarray(keep, dtype=bool)))
            dropped[clause] = table.num_rows - kept.num_rows
            table = kept
    except duckdb.Error as error:
        columns = ", ".join(table.column_names)
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: where={where!r}: {reason}; columns: {columns}") from error
    finally:
        connection.close()
    if table.num_rows == 0:
        drops = ", ".join(f"{clause!r} drops {count}" for clause, count in dropped.items())
        raise ValueError(f"{name}: where={where!r} leaves no sample: {drops}")
    return table, dropped
