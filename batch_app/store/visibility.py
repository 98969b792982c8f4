"""The filter of every query that the API makes: a caller sees what is their own."""

from __future__ import annotations

from typing import Any, TypeVar

from sqlalchemy import Select, Table

from batch_app.keys import Caller

Q = TypeVar("Q", bound=Select[Any])


def visible(query: Q, table: Table, seen_by: Caller) -> Q:
    """The query, narrowed to rows of this table that the caller may know of."""
    return query if seen_by.sees_all else query.where(table.c.owner == seen_by.owner)
